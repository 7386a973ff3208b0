"""Every key of a config with its default, and what may stand in it."""

from typing import Any

import ml_collections
from ml_collections import config_dict

# An ml_collections.ConfigDict: its values have no static types.
Config = Any

# What a resumed run may change, since no result depends on it.
NO_RESULT_DEPENDS_ON = (
    "report", "checkpoint.keep", "checkpoint.grace_s", "data.memory_gb",
    "data.cache", "data.cache_gb", "data.cache_dir", "parallel.steps_per_call",
)  # fmt: skip
# Sections whose other keys belong to what `name` chooses; the constructor checks them.
OPEN_SECTIONS = ("model", "task")
# What `seed` may be divided into, so that variance can be attributed: the start, the
# draw and order of examples, and what is random in updates.
SEEDS = ("init", "order", "augmentation", "dropout")
CHOICES = {
    "precision": ("float32", "bfloat16", "float64"),
    "parallel.mode": ("jit", "pmap"),
    "nonfinite.policy": ("stop", "skip", "rollback"),
    "data.channels": (1, 3),
    "data.interpolation": ("bilinear", "bicubic"),
    "data.decode": ("fast", "exact"),
    "data.sampling": ("uniform", "balanced"),
    "data.on_error": ("stop", "skip"),
    "data.cache": ("auto", "off"),
    "data.labels": ("classes", "numbers", "tags", "answers"),
    "data.mixing": ("weights", "size", "round_robin"),
    "init.input_channels": ("strict", "adapt"),
}
# Doubtful weights that `init.accept` allows: integers, floats of 8 bits, numbers that are
# not finite, and a kept head of other classes.
ACCEPTED = ("integer", "float8", "nan", "classes")
MOST_CLASSES = 10**6
POSITIVE = (
    "data.batch_size", "data.image_size", "data.train_size", "data.resize",
    "data.per_class", "data.cache_views", "data.max_tokens", "data.hash_rows",
    "data.min_count", "data.mixing_temperature", "evaluate.batch_size",
    "evaluate.every_steps",
    "evaluate.every_epochs", "evaluate.cka", "init.fisher_examples",
    "checkpoint.every_steps", "checkpoint.keep", "checkpoint.grace_s",
    "parallel.devices", "parallel.fsdp", "parallel.steps_per_call",
    "report.every_steps", "nonfinite.limit",
)  # fmt: skip

# The fields of a phase (plan.Phase documents them); None is "not given".
PHASE: dict[str, Any] = {
    "name": "train",
    "steps": None,
    "epochs": None,
    "optimizer": "adamw",
    "optimizer_args": {},
    "peak_lr": 1e-3,
    "schedule": "cosine",
    "schedule_args": {},
    "warmup_steps": 0,
    "end_lr_scale": 0.0,
    "clip_norm": None,
    "clip_value": None,
    "clip_adaptive": None,
    "fixed_batch": False,
    "accumulate_steps": 1,
    "weight_decay": 0.0,
    "decay": (r"(?!.*(bias|scale)$).*",),
    "regularise": (),
    "rules": ((".*", 1.0),),
    "batch_stats": "update",
    "optimizer_state": "reset",
    "plateau_metric": None,
    "plateau_patience": 3,
    "plateau_min_change": 0.0,
    "plateau_restore": False,
}
# An entry of `evaluate.also`: data on which a run is measured besides. What is None is
# that of `data`.
ALSO: dict[str, Any] = {
    "label": "source",
    "head": "current",
    "name": "digits",
    "dir": None,
    "train": None,
    "test": "test",
    "mean": None,
    "std": None,
    "resize": None,
    "split_seed": 0,
}
# An entry of `model.members`: one of several models. What else may stand in it is what
# may stand in `model`, which says all that an entry does not: see members.py.
MEMBER: dict[str, Any] = {
    "label": None,
    "name": None,
    "pretrained": None,
    "entry": None,
}
# What an entry of `data.domains` may say otherwise than `data`; what is None is that of
# `data`.
OF_DOMAIN: dict[str, type] = {
    "name": str,
    "dir": str,
    "train": str,
    "validation": str,
    "test": str,
    "image_size": int,
    "channels": int,
    "shift": tuple,
    "mean": tuple,
    "std": tuple,
    "resize": int,
    "interpolation": str,
    "decode": str,
    "train_size": int,
    "augment": tuple,
    "mix": tuple,
    "sampling": str,
    "per_class": int,
    "split_seed": int,
    "stratified": bool,
}
DOMAIN: dict[str, Any] = {
    "domain": "",  # Its metrics are `test/DOMAIN/accuracy`.
    "labelled": True,  # False: labels are read where it is measured, nowhere else.
    "weight": 1.0,  # Its share of an update, with data.mixing='weights'.
    **dict.fromkeys(OF_DOMAIN),
}
ENTRIES: dict[str, dict[str, Any]] = {
    "plan": PHASE,
    "evaluate.also": ALSO,
    "model.members": MEMBER,
    "data.domains": DOMAIN,
}
# Tables whose entries have other keys, too, like `OPEN_SECTIONS`.
OPEN_ENTRIES = ("model.members",)
OPTIONAL: dict[str, dict[str, type]] = {
    "plan": {
        "steps": int,
        "epochs": float,
        "clip_norm": float,
        "clip_value": float,
        "clip_adaptive": float,
        "plateau_metric": str,
    },
    "evaluate.also": {
        "dir": str,
        "train": str,
        "mean": tuple,
        "std": tuple,
        "resize": int,
    },
    "model.members": {"label": str, "name": str, "pretrained": str, "entry": str},
    "data.domains": OF_DOMAIN,
}


def default() -> Config:
    """Returns a config with every key at its default; a config file starts from it."""
    optional = config_dict.placeholder
    config: Any = ml_collections.ConfigDict()
    config.seed = 0  # Or a section with one for each of SEEDS.
    config.precision = "float32"  # Of the computation; parameters stay float32.
    config.deterministic = False  # On GPU, the same bits again, for less speed.
    config.task = dict(name="classify")
    config.data = _data()
    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet20"
    config.model.classes = optional(int)  # None: as many as the data has.
    config.model.head = ml_collections.ConfigDict()
    config.model.head.hidden = ()
    config.model.head.activation = "relu"
    config.model.head.dropout = 0.0
    config.model.head.initialiser = "lecun_normal"
    config.model.lora_rank = 0  # Of the low-rank updates; 0 has none.
    config.model.lora_alpha = 1.0  # Their product is scaled by alpha / rank.
    config.model.lora_targets = (r"(?!head/).*",)  # Regexes of the kernels.
    config.model.members = ()  # Of tasks with several models: see members.py.
    config.init = _init()
    config.plan = ()
    config.population = ()  # Members, ((key, value), ...) each: see population.py.
    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.every_steps = optional(int)  # None, None: at the ends of phases.
    config.evaluate.every_epochs = optional(float)
    config.evaluate.batch_size = 256
    config.evaluate.best = optional(str)  # Such as validation/accuracy.
    config.evaluate.also = ()  # Other domains, such as the source: see ALSO.
    config.evaluate.ema_decay = optional(float)  # Also measures averaged weights.
    config.evaluate.distance = False  # Of each stage's parameters from the start.
    config.evaluate.cka = optional(int)  # Examples whose features are compared.
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = optional(int)  # None: at evaluations only.
    config.checkpoint.keep = 1  # Newest ones; the first and the best stay besides.
    config.checkpoint.grace_s = 30.0  # To save in, after a signal to stop.
    config.nonfinite = ml_collections.ConfigDict()
    config.nonfinite.policy = "stop"  # Or 'skip', 'rollback': see nonfinite.py.
    config.nonfinite.limit = 10  # So many updates at most; then the run stops.
    config.parallel = ml_collections.ConfigDict()
    config.parallel.mode = "jit"
    config.parallel.devices = optional(int)  # None: all.
    config.parallel.fsdp = 1  # Devices over which parameters are sharded.
    config.parallel.steps_per_call = optional(int)  # None: as many as take 0.2 s.
    config.report = ml_collections.ConfigDict()
    config.report.every_steps = 10  # Between two lines of training metrics.
    config.report.tensorboard = False  # Event files in the workdir, too.
    config.report.wandb = optional(str)  # A project of Weights & Biases to log to, too.
    config.lock()
    for section in OPEN_SECTIONS:
        config[section].unlock()
    return config


def _init() -> Any:
    optional = config_dict.placeholder
    init: Any = ml_collections.ConfigDict()
    init.pretrained = optional(str)  # A weights address; None starts at random.
    # Entry of a checkpoint with several, such as 'model_ema'; None: the usual one.
    init.entry = optional(str)
    init.accept = ()  # Of ACCEPTED: what weights may have in spite of doubts.
    init.fresh = ()  # Regexes of the names that keep their initial value.
    init.input_channels = "strict"  # 'adapt' fits a stem to other channels.
    init.embeddings = ()  # (regex of fields, file:PATH of word vectors) pairs.
    init.schemes = ()  # (regex, scheme, *arguments) of what starts otherwise.
    init.fisher = optional(str)  # Label in evaluate.also: EWC's first domain.
    init.fisher_examples = 1000
    return init


def _data() -> Any:
    optional = config_dict.placeholder
    data: Any = ml_collections.ConfigDict()
    data.name = "digits"  # A module in data/sources, or tfds:NAME.
    data.dir = optional(str)  # Folder or file; embedded sources need none.
    data.train = "train"  # Split strings: train[:80%]+validation, in TFDS's syntax.
    data.validation = optional(str)  # Chooses the best checkpoint and ends plateaus.
    data.test = optional(str)
    data.batch_size = 64  # Examples in one update, over devices and micro-batches.
    data.text = ()  # Columns of one or two sentences; empty: the data is no text.
    data.label = "label"  # Their column of what is to be predicted.
    data.labels = "classes"  # Or 'numbers', 'tags', 'answers': see your-text.md.
    data.header = ()  # Names of the columns of files that do not begin with them.
    data.columns = ()  # Of tables: (regex, 'number', 'category' or 'ignore') pairs.
    data.log_columns = ()  # Regexes of numbers x that become sign(x) log(1 + |x|).
    data.missing = ()  # Signs of cells without a value in tables, besides pandas' own.
    data.hash_rows = optional(int)  # Of an embedding; None: a row for each value.
    data.min_count = 2  # Training rows that a value needs for a row of its own.
    data.fitted = optional(str)  # Workdir of a run whose columns are continued.
    data.tokenizer = optional(str)  # Its address; None: beside the pretrained weights.
    data.max_tokens = 128  # Of a text; what is longer is cut.
    data.overlap = optional(
        int
    )  # Tokens that windows of a passage share; None: a third.
    data.buckets = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # Lengths of batches.
    data.image_size = optional(int)  # None keeps the size of the data.
    data.channels = optional(int)  # None keeps those of the data.
    # Of these, what is None is as it was for the pretrained weights, where files beside
    # them say so; otherwise 0, 1, bilinear, and the size of the data.
    data.mean = optional(tuple)  # Subtracted from bytes in [0, 1]; one, or a channel's.
    data.std = optional(tuple)
    data.resize = optional(int)  # Shorter side, its centre is cut out; None stretches.
    data.interpolation = optional(str)
    data.decode = "fast"  # Of training photos, a few grey levels off; or 'exact'.
    data.train_size = optional(int)  # Of training images, before a crop.
    data.augment = ()  # Steps such as ("flip",), ("pad_crop", 2).
    data.mix = ()  # ("mixup", 0.2), ("cutmix", 1.0): one of them for each batch.
    data.sampling = "uniform"  # 'balanced' draws every class equally often.
    data.per_class = optional(int)  # Only so many training examples of each class.
    data.on_error = "stop"  # Or 'skip' what cannot be read: it has weight 0.
    data.memory_gb = 4.0  # Decoded examples are kept in memory if they take no more.
    data.cache = (
        "auto"  # Frozen stages run once on each example; 'off': in every update.
    )
    data.cache_views = optional(
        int
    )  # So many augmented versions of each; None: endless.
    data.cache_gb = 10.0  # Tables of features take no more of the disk.
    data.cache_dir = optional(str)  # None: FINETUNE_JAX_CACHE, or the user's cache.
    data.split_seed = 0  # Of the splits that a source without its own is cut into.
    data.stratified = True  # That cut has the classes in their proportions.
    data.shift = ()  # Steps such as ("invert",) that make another domain of the data.
    data.domains = ()  # Several data sets instead of one: see DOMAIN.
    data.mixing = "weights"  # Shares of them in an update; 'size'; 'round_robin'.
    data.mixing_temperature = 1.0  # 'size': examples ** (1 / temperature).
    return data
