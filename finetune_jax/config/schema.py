"""Every key of a config: one dataclass a section, one field a key."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import ml_collections

from finetune_jax.config.fields import Section, key, section
from finetune_jax.config.parallel import LAUNCH, Parallel
from finetune_jax.config.phase import Phase
from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, collected

# Keys that a resumed run may change, since no result depends on them.
NO_RESULT_DEPENDS_ON = (
    "report", "checkpoint.keep", "checkpoint.best_only", "checkpoint.grace_s",
    "data.memory_gb", "data.cache", "data.cache_gb", "data.cache_dir",
    "parallel.steps_per_call", *(f"parallel.{key}" for key in LAUNCH),
    "parallel.join_timeout_s", "parallel.hang_timeout_s", "parallel.work_timeout_s",
    "plugins",
)  # fmt: skip
# Doubtful weights that `init.accept` allows: integers, floats of 8 bits, numbers that are
# not finite, and a kept head of other classes.
ACCEPTED = ("integer", "float8", "nan", "classes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds(Section):
    """A seed for each source of randomness, so that variance can be attributed."""

    init: int = key(0, "Random parameters.", least=0, most=2**32 - 1)
    order: int = key(0, "Order and choice of examples.", least=0, most=2**32 - 1)
    augmentation: int = key(0, "Augmentation.", least=0, most=2**32 - 1)
    dropout: int = key(0, "Dropout, stochastic depth.", least=0, most=2**32 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Data: source, splits, preprocessing, augmentation, caches."""

    name: str = key("digits", "Module in data/sources, or tfds:NAME.")
    dir: str | None = key(None, "Folder or file; None for built-in sources.")
    train: str = key("train", "Split in TFDS's syntax: train[:80%]+validation.")
    validation: str | None = key(
        None, "Split that chooses the best checkpoint and ends plateaus."
    )
    test: str | None = key(None, "Split that is measured only.")
    batch_size: int = key(
        64, "Examples in one update, over devices and micro-batches.", above=0
    )
    text: tuple = key((), "Columns of one or two sentences; empty for other data.")
    label: str = key("label", "Column of the targets in texts and tables.")
    labels: str = key(
        "classes",
        "Kind of the targets; docs/your-text.md explains them.",
        choices=("classes", "numbers", "tags", "answers"),
    )
    header: tuple = key((), "Names of the columns of files without a header line.")
    columns: tuple = key(
        (), "Tables: pairs (regex, 'number', 'category' or 'ignore') of columns."
    )
    log_columns: tuple = key(
        (), "Tables: regexes of numbers x that become sign(x) log(1 + |x|)."
    )
    missing: tuple = key(
        (), "Tables: signs of a missing value besides those of pandas."
    )
    hash_rows: int | None = key(
        None, "Tables: rows of an embedding; None is one for each value.", above=0
    )
    min_count: int = key(
        2, "Tables: training rows that a value needs for its own embedding.", above=0
    )
    fitted: str | None = key(
        None, "Tables: workdir of a run whose column statistics are used."
    )
    tokenizer: str | None = key(
        None, "Address of the tokenizer; None takes that beside the weights."
    )
    max_tokens: int = key(128, "Tokens of a text; longer texts are cut.", above=0)
    overlap: int | None = key(
        None, "Tokens that two windows of a passage share; None is a third."
    )
    buckets: tuple = key(
        (32, 48, 64, 96, 128, 192, 256, 384, 512), "Lengths that texts are padded to."
    )
    image_size: int | None = key(
        None, "Side of images; None is that of the weights or of the data.", above=0
    )
    channels: int | None = key(
        None, "Channels of images; None keeps those of the data.", choices=(1, 3)
    )
    mean: tuple | None = key(
        None,
        "Subtracted from bytes in [0, 1], one or one a channel; None is that of the "
        "weights or 0.",
        each="number",
    )
    std: tuple | None = key(
        None,
        "Divisor after `mean`, one or one a channel; None is that of the weights or 1.",
        each="positive",
    )
    resize: int | None = key(
        None,
        "Shorter side before the centre is cut out; None is that of the weights, or "
        "stretches.",
        above=0,
    )
    interpolation: str | None = key(
        None,
        "Resampling of images; None is that of the weights or bilinear.",
        choices=("bilinear", "bicubic"),
    )
    decode: str = key(
        "fast",
        "Decoding of training photos; 'fast' is a few grey levels off.",
        choices=("fast", "exact"),
    )
    train_size: int | None = key(
        None, "Side of training images before a crop; None is image_size.", above=0
    )
    augment: tuple = key((), 'Augmentation steps such as ("flip",), ("pad_crop", 2).')
    mix: tuple = key(
        (), 'Mixing of examples, ("mixup", 0.2) or ("cutmix", 1.0); one for each batch.'
    )
    sampling: str = key(
        "uniform",
        "Order of training; 'balanced' draws every class equally often.",
        choices=("uniform", "balanced"),
    )
    per_class: int | None = key(
        None, "Training examples of each class; None takes all.", above=0
    )
    on_error: str = key(
        "stop",
        "Unreadable examples; 'skip' gives them weight 0.",
        choices=("stop", "skip"),
    )
    memory_gb: float = key(
        4.0, "Bound of the decoded examples in memory.", least=0, finite=False
    )
    cache: str = key(
        "auto",
        "Outputs of frozen stages; 'auto' computes them once for each example, 'off' in "
        "every update.",
        choices=("auto", "off"),
    )
    cache_views: int | None = key(
        None, "Augmented versions of each example; None is no bound.", above=0
    )
    cache_gb: float = key(
        10.0, "Bound of the cached features on disk.", least=0, finite=False
    )
    cache_dir: str | None = key(
        None, "Folder of the cache; None is FINETUNE_JAX_CACHE or the user's cache."
    )
    split_seed: int = key(
        0, "Seed of the splits of a source without its own.", least=0, most=2**32 - 1
    )
    stratified: bool = key(True, "Whether those splits keep the shares of the classes.")
    shift: tuple = key((), 'Steps such as ("invert",) that make another domain.')
    domains: "tuple[Domain, ...]" = key((), "Several data sets instead of one.")
    mixing: str = key(
        "weights",
        "Share of each domain in an update.",
        choices=("weights", "size", "round_robin"),
    )
    mixing_temperature: float = key(
        1.0, "With 'size', shares are examples ** (1 / temperature).", above=0
    )

    def problems(self) -> list[Problem]:
        """Returns conflicts between values of the section; keys are relative."""
        if not (self.cache_views and self.mix):
            return []
        text = f"{self.cache_views}, but config.data.mix mixes anew in every update"
        return [Problem("cache_views", f"{text}; leave out one of them")]


def _of_data(name: str) -> Any:
    """Returns the field of an entry that may differ from `data`; None is as there."""
    field = Data.__dataclass_fields__[name]
    same = f"`data.{name}` of this entry; None is the value there."
    metadata = {**field.metadata, "meaning": same, "of_data": True}
    return dataclasses.field(default=None, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain(Section):
    """An entry of `data.domains`: one of several data sets."""

    domain: str = key("", "Name of the domain, as in test/NAME/accuracy.")
    labelled: bool = key(True, "Whether training reads the labels.")
    weight: float = key(1.0, "Share of an update, with data.mixing='weights'.", least=0)
    name: str | None = _of_data("name")
    dir: str | None = _of_data("dir")
    train: str | None = _of_data("train")
    validation: str | None = _of_data("validation")
    test: str | None = _of_data("test")
    image_size: int | None = _of_data("image_size")
    channels: int | None = _of_data("channels")
    shift: tuple | None = _of_data("shift")
    mean: tuple | None = _of_data("mean")
    std: tuple | None = _of_data("std")
    resize: int | None = _of_data("resize")
    interpolation: str | None = _of_data("interpolation")
    decode: str | None = _of_data("decode")
    train_size: int | None = _of_data("train_size")
    augment: tuple | None = _of_data("augment")
    mix: tuple | None = _of_data("mix")
    sampling: str | None = _of_data("sampling")
    per_class: int | None = _of_data("per_class")
    split_seed: int | None = _of_data("split_seed")
    stratified: bool | None = _of_data("stratified")


# Keys of `data` that an entry of `data.domains` may have of its own.
OF_DOMAIN = tuple(
    field.name for field in dataclasses.fields(Domain) if field.metadata.get("of_data")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(Section):
    """Head of the model: hidden layers before the last one."""

    hidden: tuple = key((), "Widths of hidden layers.")
    activation: str = key("relu", "Activation after a hidden layer.")
    dropout: float = key(0.0, "Rate of dropout before each layer.")
    initialiser: str = key("lecun_normal", "Initialiser of the kernels.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(Section):
    """An entry of `model.members`; it may also have any key of `model`."""

    is_open: ClassVar[bool] = True
    label: str | None = key(None, "Prefix of its parameters; None is its name.")
    name: str | None = key(None, "Model; None is model.name.")
    pretrained: str | None = key(None, "Address of its weights.")
    entry: str | None = key(None, "Entry of a checkpoint with several.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Section):
    """Model; other keys are arguments of the model that `name` chooses."""

    is_open: ClassVar[bool] = True
    name: str = key("resnet20", "Name in one of the files of models/.")
    classes: int | None = key(
        None, "Outputs; None is as many as the data has.", most=10**6
    )
    head: Head = section(Head)
    lora_rank: int = key(0, "Rank of low-rank updates; 0 has none.")
    lora_alpha: float = key(1.0, "Updates are scaled by lora_alpha / lora_rank.")
    lora_targets: tuple = key((r"(?!head/).*",), "Regexes of the kernels with updates.")
    members: tuple[Member, ...] = key((), "Models of a task that has several.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Section):
    """Task; other keys are arguments of the task that `name` chooses."""

    is_open: ClassVar[bool] = True
    name: str = key("classify", "Module in tasks/.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init(Section):
    """Parameters before the first update."""

    pretrained: str | None = key(
        None, "Address of pretrained weights; None starts at random."
    )
    entry: str | None = key(
        None, "Entry of a checkpoint with several, such as 'model_ema'."
    )
    accept: tuple = key((), "Doubts about weights to pass over.", each=ACCEPTED)
    fresh: tuple = key((), "Regexes of parameters that keep their initial value.")
    input_channels: str = key(
        "strict",
        "Other input channels than those of the weights; 'adapt' fits the stem.",
        choices=("strict", "adapt"),
    )
    embeddings: tuple = key((), "Pairs (regex of fields, file:PATH of word vectors).")
    schemes: tuple = key(
        (), "Rules (regex, scheme, *arguments) of parameters that start otherwise."
    )
    fisher: str | None = key(
        None,
        "Label in evaluate.also of the domain with the Fisher information for EWC.",
    )
    fisher_examples: int = key(1000, "Examples for the Fisher information.", above=0)

    def problems(self) -> list[Problem]:
        """Returns conflicts between values of the section; keys are relative."""
        found: list[Problem] = []
        for pattern in self.fresh:
            with collected(found):
                registry.check_regex(pattern, "fresh")
        if self.entry is not None and self.pretrained is None:
            text = f"{self.entry!r}, but config.init.pretrained is None"
            found.append(Problem("entry", text))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Also(Section):
    """An entry of `evaluate.also`: another domain that the run is measured on."""

    label: str = key("source", "Name of the domain, as in source/accuracy.")
    head: str = key(
        "current", "Parameters of the last stage: current, start, pretrained."
    )
    name: str = key("digits", "Module in data/sources, or tfds:NAME.")
    dir: str | None = key(None, "Folder or file; None for built-in sources.")
    train: str | None = key(None, "Split for the Fisher information.")
    test: str = key("test", "Split that is measured.")
    mean: tuple | None = _of_data("mean")
    std: tuple | None = _of_data("std")
    resize: int | None = _of_data("resize")
    split_seed: int = key(0, "Seed of the splits of a source without its own.", least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """Measurements besides the training loss."""

    every_steps: int | None = key(
        None,
        "Updates between measurements; None and None is the end of phases.",
        above=0,
    )
    every_epochs: float | None = key(None, "Epochs between measurements.", above=0)
    batch_size: int = key(256, "Examples in one batch.", above=0)
    best: str | None = key(
        None, "Metric that chooses the best checkpoint, such as validation/accuracy."
    )
    also: tuple[Also, ...] = key((), "Other domains to measure, such as the source.")
    ema_decay: float | None = key(
        None, "Decay of averaged weights that are measured too.", least=0, below=1
    )
    distance: bool = key(
        False, "Whether to measure the distance of each stage from its start."
    )
    cka: int | None = key(
        None, "Examples whose features are compared with the start (CKA).", above=0
    )

    def problems(self) -> list[Problem]:
        """Returns conflicts between values of the section; keys are relative."""
        if not (self.every_steps and self.every_epochs):
            return []
        text = f"{self.every_steps}, and every_epochs {self.every_epochs}"
        return [Problem("every_steps", f"{text}; give one of them, not both")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """Checkpoints."""

    every_steps: int | None = key(
        None, "Updates between checkpoints; None is at measurements only.", above=0
    )
    keep: int = key(
        1, "Newest checkpoints kept besides the first and the best.", above=0
    )
    best_only: bool = key(
        False, "Whether a finished run keeps only its first and its best checkpoint."
    )
    params: str = key(
        "all",
        "Parameters that are stored; 'trained' leaves those that are never trained to "
        "the weight file of init.pretrained.",
        choices=("all", "trained"),
    )
    grace_s: float = key(30.0, "Seconds to save in after a signal to stop.", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonFinite(Section):
    """Updates whose loss or gradient is not finite."""

    policy: str = key(
        "stop",
        "Stop the run, skip the update, or roll back to the last checkpoint.",
        choices=("stop", "skip", "rollback"),
    )
    limit: int = key(10, "Such updates before the run stops anyway.", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Section):
    """Logs."""

    every_steps: int = key(10, "Updates between lines of training metrics.", above=0)
    tensorboard: bool = key(False, "Whether to write event files to the workdir.")
    wandb: str | None = key(None, "Weights & Biases project to log to.")
    group: str | None = key(
        None, "Group of the run in Weights & Biases; a sweep sets its name."
    )
    tags: tuple = key((), "Tags of the run there; a sweep sets arm, case and stage.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """A resolved config. `model` and `task` are ConfigDicts with any other keys."""

    seed: int | Seeds = key(
        0, "Seed of all randomness, or a section of seeds.", least=0, most=2**32 - 1
    )
    precision: str = key(
        "float32",
        "Precision of the computation; parameters stay float32 but for float64.",
        choices=("float32", "bfloat16", "float64"),
    )
    deterministic: bool = key(
        False, "Whether a GPU gives the same bits again, for less speed."
    )
    task: Any = section(Task)
    data: Data = section(Data)
    model: Any = section(Model)
    init: Init = section(Init)
    plan: tuple[Phase, ...] = key((), "Phases of training, from plans.as_config.")
    population: tuple = key(
        (), "Runs that differ in some keys: tuples of (key, value) pairs; see grid()."
    )
    evaluate: Evaluate = section(Evaluate)
    checkpoint: Checkpoint = section(Checkpoint)
    nonfinite: NonFinite = section(NonFinite)
    parallel: Parallel = section(Parallel)
    report: Report = section(Report)
    extend: str | None = key(
        None, "Workdir of a finished run that this one goes on from; --extend sets it."
    )
    extend_from: str = key(
        "final",
        "Checkpoint of that run.",
        choices=("final", "best"),
    )
    plugins: tuple = key(
        (),
        "Modules, or files as from the config file, that add optimizers and the like.",
    )

    def replaced(self, **sections: Mapping[str, Any]) -> "Config":
        """Returns the config with other values in some sections.

        >>> Config().replaced(data={"batch_size": 3}).data.batch_size
        3
        """
        changed: dict[str, Any] = {}
        for name, values in sections.items():
            before = getattr(self, name)
            if isinstance(before, ml_collections.ConfigDict):
                changed[name] = ml_collections.ConfigDict({**before, **values}).lock()
            else:
                changed[name] = dataclasses.replace(before, **values)
        return dataclasses.replace(self, **changed)
