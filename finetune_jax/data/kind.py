"""The contract of a kind of data, and the kinds that there are.

A kind is a package in `data/` with a module `kind` that has an object `KIND`, such as
`data/text/kind.py`; its name is that of the folder. No other package branches on the
kind: it asks the object. A folder outside of this package counts too (see
`registry.open_path`), and so do its sources.
"""

import abc
import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune_jax import config as configs
from finetune_jax import data
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data import sources
from finetune_jax.data.source import Source

if TYPE_CHECKING:
    from finetune_jax.data.dataset import Data, Dataset
    from finetune_jax.data.spec import DataSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Content of files that a kind may need besides its section of the config.

    Attributes:
        fitted: State that a run has kept, from `Kind.restore`; None fits it anew.
        tokenizer: Returns the text of the tokenizer.json of a run; None if there is none.
        tokenizer_files: Returns the texts of the tokenizer's other files, by name.
    """

    fitted: Any = None
    tokenizer: Callable[[], str | None] = lambda: None
    tokenizer_files: Callable[[], Mapping[str, str]] = dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data whose examples are as a model takes them, but for decoding.

    Attributes:
        source: Splits with inputs and labels.
        shape: Shape of one example's inputs.
        train_shape: Shape of a training example before augmentation.
        inputs: The kind's own part of `DataSpec`.
        fitted: State that a run keeps and `Kind.save` writes; None keeps none.
        files: Returns texts that a run keeps in its workdir, by file name.
        warnings: Lines about doubtful values.
    """

    source: Source
    shape: tuple[int, ...]
    train_shape: tuple[int, ...]
    inputs: Any
    fitted: Any = None
    files: Callable[[], Mapping[str, str]] = dict
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """Data before its splits are chosen.

    Attributes:
        kind: Name of the kind, which may depend on the arrays that were found.
        source: Splits with labels; inputs need not be encoded yet.
        prepare: Takes the indices of the training examples in the concatenated splits,
            to which a kind may fit its encoding.
    """

    kind: str
    source: Source
    prepare: Callable[[np.ndarray], Prepared]


class Lengths(Protocol):
    """Batching of examples whose arrays have been padded to the longest one."""

    def of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the length of each example of a batch, int [n]."""
        ...

    def shortened(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch with no more padding than its longest example needs."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRule:
    """Files that a model takes for prediction.

    Attributes:
        name: Name of such files, in the plural.
        why_not: Returns why a file in a folder is not one of them; None if it is.
        why_not_named: The same for a file that the user names.
        advice: End of the message about files that are refused.
        warnings: Returns lines about doubtful files among those that are used.
    """

    name: str
    why_not: Callable[[pathlib.Path], str | None]
    why_not_named: Callable[[pathlib.Path], str | None]
    advice: str
    warnings: Callable[[Sequence[pathlib.Path]], list[str]] = lambda _: []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """An example as a person reads it: an image, texts, words or columns.

    Attributes:
        image: The image, uint8 [H, W, C], C 1 or 3, before normalisation.
        texts: Pairs (name of a column, its text).
        words: The words of a text, if each has a label of its own.
        columns: Pairs (name of a column, its value).
    """

    image: np.ndarray | None = None
    texts: tuple[tuple[str, str], ...] = ()
    words: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()


class InputReader(Protocol):
    """Reader of new inputs for a finished run."""

    @property
    def files(self) -> FileRule:
        """Files that can be read."""
        ...

    def read(
        self, paths: Sequence[pathlib.Path], errors: list[UserError | None]
    ) -> "Iterator[tuple[list[str], Dataset]]":
        """Yields the names of inputs and the inputs, some at a time.

        Args:
            paths: Files that `files` admits.
            errors: Gets an entry for each file, None for a file that was read.
        """
        ...

    def convert(self, given: Any) -> "tuple[bool, list[tuple[Sequence[int], Dataset]]]":
        """Returns whether `given` is a single input, and inputs with their positions.

        Args:
            given: One Python object, or several.

        Raises:
            UserError: Lists the objects that cannot be read.
        """
        ...


class Kind(abc.ABC):
    """A kind of data, such as images. Methods with a body suit most kinds.

    Attributes:
        keys: Keys of `config.data` that only this kind and others that list them read.
        absent: End of the message about such a key where the data is of another kind;
            `{name}` stands for `config.data.name`.
        hint: End of the message of a task that does not take this kind.
        can_mix: Whether data of this kind can be one of `config.data.domains`.
        weight_keys: Keys of `config.data` that files beside pretrained weights may set.
    """

    keys: tuple[str, ...] = ()
    absent: str = "{name} has no such data"
    hint: str = ""
    can_mix: bool = True
    weight_keys: tuple[str, ...] = (
        "image_size",
        "resize",
        "interpolation",
        "mean",
        "std",
    )

    def claims(self, section: Mapping[str, Any]) -> bool:
        """Returns whether `config.data` names data of this kind, of those of its source."""
        return True

    @abc.abstractmethod
    def open(self, section: Mapping[str, Any], resources: Resources) -> Opened:
        """Returns the data that `config.data` describes.

        Raises:
            UserError: The data cannot be read, or an option does not fit it.
        """

    def check(self, spec: "DataSpec") -> None:
        """Checks that the preprocessing fits the inputs.

        Raises:
            UserError: Lists all that does not.
        """
        return None

    @abc.abstractmethod
    def inputs_from_json(self, plain: Mapping[str, Any], section: Mapping) -> Any:
        """Returns the kind's own part of a spec.

        Args:
            plain: Entry 'data' of a manifest, with the keys that `inputs_to_json` wrote.
            section: `config.data` of the run.

        Raises:
            KeyError, TypeError, ValueError: `plain` is damaged.
        """

    @abc.abstractmethod
    def inputs_to_json(self, spec: "DataSpec") -> dict[str, Any]:
        """Returns what a manifest has besides the config, by key."""

    @abc.abstractmethod
    def reader(
        self, spec: "DataSpec", section: Mapping[str, Any], workdir: pathlib.Path
    ) -> InputReader:
        """Returns the reader of new inputs for a run.

        Args:
            spec: Description of the run's data.
            section: `config.data` of the run.
            workdir: Workdir of the run.

        Raises:
            UserError: A file that the run has kept is gone or damaged.
        """

    @abc.abstractmethod
    def describe(self, spec: "DataSpec") -> str:
        """Returns what an example is, in a few words, such as 'uint8 28x28x1'."""

    def columns(self, spec: "DataSpec") -> str:
        """Returns the parts of an example in one line; '' where they have no names."""
        return ""

    def lines(self, spec: "DataSpec") -> list[str]:
        """Returns the parts of an example, one a line, for `--mode=plan`."""
        return []

    def without_data(
        self, section: Mapping[str, Any], classes: int | None
    ) -> "DataSpec | None":
        """Returns the spec that the config alone describes; None if it cannot.

        Args:
            section: `config.data`.
            classes: `config.model.classes`.

        Raises:
            UserError: Lists the keys that would have to be given.
        """
        return None

    def domain_spec(
        self, spec: "DataSpec", source: Source, given: Mapping[str, Any], where: str
    ) -> "DataSpec":
        """Returns the spec of other data, in the form that a run's model takes.

        Args:
            spec: Description of the run's data.
            source: The other data.
            given: Values of 'mean', 'std' and 'resize'.
            where: Config entry of the other data, for messages.

        Raises:
            UserError: The model cannot take the data.
        """
        raise UserError(
            f"{where}name: a run on {spec.kind} cannot be measured on other data"
        )

    def geometry(self, spec: "DataSpec", *, training: bool) -> Any:
        """Returns how `ExampleReader.read` fits an example; None reads it as stored."""
        return None

    def lengths(self, spec: "DataSpec") -> Lengths | None:
        """Returns how batches are cut to their longest example; None for equal shapes."""
        return None

    def restore(self, workdir: pathlib.Path) -> Any:
        """Returns the state that `save` wrote; None if there is none."""
        return None

    def save(self, workdir: pathlib.Path, fitted: Any) -> None:
        """Writes the state that a run keeps besides its manifest."""
        return None

    def serving_spec(self, spec: "DataSpec") -> "DataSpec":
        """Returns the spec of an exported model, whose inputs may be larger."""
        return spec

    def serving_shape(self, spec: "DataSpec") -> tuple[int | str, ...]:
        """Returns the shape of one input of an exported model; a letter is any size."""
        return spec.shape

    def serving_inputs(self, spec: "DataSpec") -> dict[str, Any]:
        """Returns how a program prepares inputs for an exported model, ready for JSON."""
        return {}

    def random_inputs(self, spec: "DataSpec", count: int) -> np.ndarray:
        """Returns inputs [count, ...] that a model of such data can read, for a check."""
        rng = np.random.default_rng(0)
        if np.issubdtype(np.dtype(spec.dtype), np.integer):
            return rng.integers(0, 256, (count, *spec.shape)).astype(spec.dtype)
        return rng.normal(size=(count, *spec.shape)).astype(np.float32)

    def examples(
        self, data: "Data", dataset: "Dataset", positions: np.ndarray
    ) -> list[Example] | None:
        """Returns examples for the report; None if a person could not read them.

        Args:
            data: Data of the run.
            dataset: One of its splits.
            positions: Places of the examples in the split.
        """
        return None

    def record_writer(
        self, spec: "DataSpec", folder: pathlib.Path
    ) -> Callable[[dict[str, Any], str], dict[str, Any]]:
        """Returns a function that makes the record of a named input ready for JSON.

        Args:
            spec: Description of the run's data.
            folder: Folder for what a record cannot hold, such as masks; need not exist.
        """
        return lambda record, name: record


def kind_names() -> list[str]:
    """Returns the names of all kinds."""
    return registry.packages_with(data, "kind")


@functools.cache
def kind_named(name: str) -> Kind:
    """Returns a kind.

    Raises:
        KeyError: There is no kind of this name.
    """
    if name not in kind_names():
        raise KeyError(f"no kind of data {name!r}; there are {', '.join(kind_names())}")
    return importlib.import_module(f"{data.__name__}.{name}.kind").KIND


def kind_of(section: Mapping[str, Any]) -> str:
    """Returns the name of the kind of data that `config.data` names.

    A source module lists the kinds that it can hold in `KINDS`, images by default.

    Raises:
        UserError: No such source, or none of its kinds.
    """
    where, name = "config.data.name", section["name"]
    module = registry.module(sources, name.partition(":")[0], where)
    kinds = getattr(module, "KINDS", ("images",))
    if section["text"] and "text" not in kinds:
        raise UserError(
            f"config.data.text: {section['text']}, but {name!r} holds no texts; leave it "
            "empty"
        )
    for kind in kinds:
        if kind_named(kind).claims(section):
            return kind
    raise UserError(
        f"{where}: {name!r} holds texts; name their columns in config.data.text, such "
        "as ('sentence',)"
    )


def weight_keys(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys of `config.data` that files beside pretrained weights may set."""
    return kind_named(kind_of(section)).weight_keys


def restored(section: Mapping[str, Any], workdir: pathlib.Path) -> Any:
    """Returns the state that a run has kept besides its manifest; None if there is none.

    Args:
        section: `config.data` of the run.
        workdir: Workdir of the run, which need not be there yet.
    """
    return None if section["domains"] else kind_named(kind_of(section)).restore(workdir)


def check_keys(section: Mapping[str, Any], name: str) -> None:
    """Checks that `config.data` has no key of another kind than the data's.

    Raises:
        UserError: Lists such keys.
    """
    plain, own, problems = configs.default().data, kind_named(name).keys, {}
    for other in kind_names():
        kind = kind_named(other)
        advice = kind.absent.format(name=repr(section["name"]))
        problems |= {
            key: f"config.data.{key}: {section[key]!r}, but {advice}"
            for key in kind.keys
            if key not in own and section[key] != plain[key]
        }
    raise_if(problems.values(), "config.data does not fit:")


def suffix_rule(suffixes: Collection[str], what: str, more: str = "") -> FileRule:
    """Returns the rule of files that are known by their suffix.

    Args:
        suffixes: Such as '.csv'; '' is none.
        what: Name of such files, in the plural.
        more: End of the advice.
    """
    listed = ", ".join(suffix or "without suffix" for suffix in suffixes)

    def why_not(path: pathlib.Path) -> str | None:
        return None if path.suffix.lower() in suffixes else f"no {what}"

    advice = f"It takes {listed}{f'; {more}' if more else '.'}"
    return FileRule(
        name=f"files {listed}", why_not=why_not, why_not_named=why_not, advice=advice
    )
