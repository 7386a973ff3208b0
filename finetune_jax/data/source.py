"""The contract of a data source: named splits of random-access examples."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data.images.decoding import Geometry, fit_named
from finetune_jax.data.images.pixels import Images, Pixels, read_images
from finetune_jax.data.labels import (
    MANY_CLASSES,
    Classes,
    classes_of,
    near_twins,
    spelling_of,
)


class ExampleReader(Protocol):
    """Random access to the examples of one split."""

    @property
    def label(self) -> np.ndarray:
        """Class index of every example, int32 [N]; or its targets, float32 [N, T].

        Zeros where images have masks.
        """
        ...

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example's inputs, (H, W, C) or (F,); None where they differ.

        A mask is not counted.
        """
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the inputs: 'uint8' or 'float32'."""
        ...

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns the inputs of one example; called by many threads.

        Where images have masks, their last channel is the mask, which is fitted too.

        Args:
            index: Index of the example.
            geometry: How the example is fitted, from `Kind.geometry`; None: as stored.

        Raises:
            UserError: Names the example, which cannot be read or fitted.
        """
        ...

    def name(self, index: int) -> str:
        """Returns the name of the example, such as its file."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayExamples:
    """Examples in memory (or memory-mapped)."""

    values: np.ndarray
    label: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's inputs."""
        return self.values.shape[1:]

    @property
    def dtype(self) -> str:
        """The dtype of the inputs."""
        return str(self.values.dtype)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.values)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns the inputs of one example, fitted to a geometry where there is one."""
        value = self.values[index]
        if geometry is None:
            return value
        return fit_named(value, geometry, self.name(index))

    def name(self, index: int) -> str:
        """Returns the number of one example."""
        return f"example {index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as stored.

    Attributes:
        name: For messages.
        splits: Examples by the name of their split; a source without splits of its own
            has the one split 'all'.
        class_names: Names of the classes, in the order of the labels; empty where the
            labels are numbers, or images have masks.
        targets: Names of the numbers to predict.
        pixel_classes: Names of the classes of a mask's pixels, in the order of their
            indices.
        fingerprint: Returns a digest of the content; may read all of it.
        groups: By split, how many examples belong together, one group after another, so
            that no two splits share a group; None: each example is a group.
        notes: Objects that metrics and predictions read besides the labels, an array with
            one for each example, the splits one after another; None: no notes.
        warnings: Lines about doubtful data, such as near-equal class names.
        not_used: Lines about files or rows that were left out, with counts and reasons.
        pixels: How the values of image arrays were read, if they were not bytes.
    """

    name: str
    splits: Mapping[str, ExampleReader]
    class_names: tuple[str, ...]
    fingerprint: Callable[[], str]
    targets: tuple[str, ...] = ()
    pixel_classes: tuple[str, ...] = ()
    groups: Mapping[str, np.ndarray] | None = None
    notes: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()
    pixels: Pixels | None = None


def array_source(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> Source:
    """Returns a source of arrays, checked.

    Args:
        name: For messages.
        splits: (inputs, labels) by split: inputs are feature vectors [N, F], of which
            bytes stay bytes and all other numbers become float32, or images [N, H, W] or
            [N, H, W, C], which `read_images` reads. Labels are integers or strings [N] or
            [N, 1], which are classes, or floating-point numbers [N] or [N, T] to predict.
        class_names: Names of the classes, in the order of the labels; by default the
            labels that occur.
        targets: Names of the T numbers.

    Raises:
        UserError: Lists all that does not fit together.
    """
    inputs = {split: array for split, (array, _) in splits.items()}
    label = {split: _flat(array) for split, (_, array) in splits.items()}
    problems = _target_problems(label, class_names, targets)
    for split, array in inputs.items():
        found = _split_problems(array, label[split])
        problems += [f"split {split!r}: {text}" for text in found]
    shapes = {split: array.shape[1:] for split, array in inputs.items()}
    if len(set(shapes.values())) > 1:
        problems.append(f"the splits differ in shape: {shapes}")
    raise_if(problems, f"The data {name} cannot be used:")
    read = _read_inputs(inputs)
    lines, problems = [*read.warnings], [*read.problems]
    if any(array.dtype.kind == "f" for array in label.values()):
        names = ()
        indices = {
            split: array.reshape(len(array), -1).astype(np.float32)
            for split, array in label.items()
        }
        width = next(iter(indices.values())).shape[1]
        if targets is None:
            numbered = [f"target{i + 1}" for i in range(width)]
            targets = numbered if width > 1 else ["target"]
        lines += _likely_classes(label)
    else:
        classes, indices = _classes(label, class_names)
        names, targets = classes.names, ()
        lines += classes.warnings
        problems += classes.problems
    raise_if(problems, f"The data {name} cannot be used:")
    examples = {
        split: ArrayExamples(values=read.values[split], label=indices[split])
        for split in splits
    }
    return Source(
        name=name,
        splits=examples,
        class_names=names,
        targets=tuple(targets),
        fingerprint=lambda: digest_of_arrays(examples),
        warnings=tuple(f"{name}: {line}" for line in lines),
        pixels=read.pixels,
    )


def _flat(label: np.ndarray) -> np.ndarray:
    """Returns labels; those of classes, a column, as [N]."""
    is_column = label.ndim == 2 and label.shape[1] == 1 and label.dtype.kind != "f"
    return label[:, 0] if is_column else label


def _split_problems(inputs: np.ndarray, label: np.ndarray) -> list[str]:
    """Returns the problems of the arrays of a split."""
    problems = []
    if len(inputs) != len(label):
        hint = ""
        if inputs.ndim == 4 and inputs.shape[-1] == len(label):
            hint = "; if the examples come last: x.transpose(3, 0, 1, 2)"
        problems.append(f"{len(inputs)} inputs, {len(label)} labels{hint}")
    ranks = (1, 2) if label.dtype.kind == "f" else (1,)
    if inputs.ndim not in (2, 3, 4) or label.ndim not in ranks:
        hint = "; rows with a 1 for the class: y.argmax(axis=1)"
        problems.append(
            f"inputs {inputs.shape}, labels {label.shape}; needed are inputs "
            "[N, F], [N, H, W] or [N, H, W, C] and labels [N], or numbers [N, T]"
            + (hint if _is_one_hot(label) else "")
        )
    if inputs.dtype.kind not in "uifb":
        problems.append(f"inputs are {inputs.dtype}, not numbers")
    elif problem := infinity_problem(inputs):
        problems.append(problem)
    return problems + _label_problems(label)


def _read_inputs(inputs: Mapping[str, np.ndarray]) -> Images:
    """Returns inputs by split as they are read, images or vectors."""
    if all(array.ndim > 2 for array in inputs.values()):
        return read_images(inputs)
    values = {
        split: array if array.dtype == np.uint8 else array.astype(np.float32)
        for split, array in inputs.items()
    }
    problems = []
    if len({array.dtype for array in values.values()}) > 1:
        dtypes = {split: str(array.dtype) for split, array in inputs.items()}
        problems.append(f"the splits differ in the dtype of inputs: {dtypes}")
    return Images(values=values, problems=tuple(problems))


def _classes(
    label: Mapping[str, np.ndarray], class_names: Sequence[str] | None
) -> tuple[Classes, dict[str, np.ndarray]]:
    """Returns the classes of labels, integers or text, and the class index of each."""
    uniques = {
        split: np.unique(array, return_inverse=True, return_counts=True)
        for split, array in label.items()
    }
    counts: collections.Counter[str] = collections.Counter()
    for found, _, times in uniques.values():
        for value, count in zip(found, times):
            counts[str(spelling_of(value))] += int(count)
    is_text = any(array.dtype.kind in "US" for array in label.values())
    if class_names is not None and not is_text:  # Integers are places in the names.
        outside = sorted(
            set(counts) - {str(n) for n in range(len(class_names))}, key=int
        )
        counts_of = {name: counts[str(n)] for n, name in enumerate(class_names)}
        classes = classes_of(counts_of, "labels", given=class_names, unit="examples")
        if outside:
            problem = (
                f"labels {', '.join(outside[:20])}, but there are {len(class_names)} "
                f"classes, numbered from 0 to {len(class_names) - 1}"
            )
            classes = dataclasses.replace(
                classes, problems=(*classes.problems, problem)
            )
        return classes, {s: array.astype(np.int32) for s, array in label.items()}
    classes = classes_of(counts, "labels", given=class_names, unit="examples")
    return classes, {
        split: classes.of(str(spelling_of(value)) for value in found)[inverse]
        for split, (found, inverse, _) in uniques.items()
    }


def _is_one_hot(label: np.ndarray) -> bool:
    """Returns whether labels are rows of zeros with a 1 for the class."""
    if label.ndim != 2 or label.shape[1] < 2 or label.dtype.kind not in "uifb":
        return False
    return bool(((label == 0) | (label == 1)).all() and (label.sum(axis=1) == 1).all())


def _likely_classes(label: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a line if floating-point labels look like classes."""
    arrays = list(label.values())
    kind = arrays[0].dtype
    if all(map(_is_one_hot, arrays)):
        return [
            f"labels {kind} {arrays[0].shape} are taken as numbers to predict; each row "
            "has a single 1: to classify, save y.argmax(axis=1)"
        ]
    values = np.concatenate([array.reshape(-1) for array in arrays])
    if arrays[0].size != len(arrays[0]) or (values != np.rint(values)).any():
        return []
    different = len(np.unique(values))
    if different > min(MANY_CLASSES, len(values) // 2):
        return []
    return [
        f"labels {kind} are taken as numbers to predict; they have {different} different "
        "values, all whole: to classify, save y.astype(int)"
    ]


def _label_problems(label: np.ndarray) -> list[str]:
    """Returns the problems of the labels of a split."""
    if label.dtype.kind == "b":
        return ["labels are bool, not numbers or text; save y.astype(int)"]
    if label.dtype.kind not in "uiUSf":
        return [f"labels are {label.dtype}, not numbers or text"]
    if label.dtype.kind not in "US":
        return []
    try:
        missing = [value for value in np.unique(label) if spelling_of(value) is None]
    except UnicodeDecodeError as error:
        return [f"labels are not UTF-8 ({error}); save y as text"]
    if not missing:
        return []
    blank = np.flatnonzero(np.isin(label, np.array(missing)))
    return [
        f"{len(blank)} labels are blank or NaN, the first is number {int(blank[0])}; "
        "give those examples a class, or leave them out"
    ]


def infinity_problem(
    values: np.ndarray, wrong: str = "NaN or infinity (in float32)"
) -> str | None:
    """Returns how many examples have floats that are not finite as float32, if any.

    Args:
        values: Numbers [N, ...].
        wrong: Name of such floats, for the message.
    """
    if values.dtype.kind != "f":
        return None
    is_right = np.abs(values) <= np.finfo(np.float32).max
    bad = np.flatnonzero(~is_right.reshape(len(values), -1).all(axis=1))
    if not len(bad):
        return None
    return f"{len(bad)} examples have {wrong}, the first is number {int(bad[0])}"


def _target_problems(
    label: Mapping[str, np.ndarray],
    class_names: Sequence[str] | None,
    targets: Sequence[str] | None,
) -> list[str]:
    """Returns the problems of labels that are floating-point numbers."""
    kinds = {split: str(values.dtype) for split, values in label.items()}
    if all(values.dtype.kind != "f" for values in label.values()):
        return [] if targets is None else [f"names of targets, but labels are {kinds}"]
    problems = []
    if class_names is not None:
        problems.append(
            f"names of classes, but labels are {kinds}: integers are classes"
        )
    if any(values.dtype.kind != "f" for values in label.values()):
        problems.append(f"the splits differ in what labels are: {kinds}")
    widths = {values.shape[1:] or (1,) for values in label.values()}
    if len(widths) > 1:
        problems.append(f"the splits differ in the shape of labels: {sorted(widths)}")
    elif targets is not None and (len(targets),) not in widths:
        problems.append(f"{len(targets)} names of targets, but labels have {widths}")
    for split, values in label.items():
        if problem := infinity_problem(values, "labels that are NaN or infinite"):
            problems.append(f"split {split!r}: {problem}")
    return problems


def digest_of_arrays(
    splits: Mapping[str, ArrayExamples], rest: bytes = b"", *, dtypes: bool = True
) -> str:
    """Returns a digest of examples in memory.

    Args:
        splits: Examples by split.
        rest: Other content that counts.
        dtypes: Whether dtypes of inputs count, which are the same for all texts.
    """
    digester = hashlib.sha256(rest)
    for name, examples in sorted(splits.items()):
        dtype = examples.dtype if dtypes else ""
        digester.update(f"{name}{examples.values.shape}{dtype}".encode())
        digester.update(np.ascontiguousarray(examples.values).data)
        digester.update(np.ascontiguousarray(examples.label).data)
    return digester.hexdigest()


def check_no_classes(source: Source, config: Mapping[str, Any]) -> None:
    """Checks that no option needs a class for every example.

    Raises:
        UserError: Lists the keys of `config.data` that do.
    """
    problems = [
        f"config.data.{key}: {config[key]!r} needs classes; leave it at {default!r}"
        for key, default in (("per_class", None), ("sampling", "uniform"), ("mix", ()))
        if config[key] != default
    ]
    kinds = {"numbers": source.targets, "masks": source.pixel_classes}
    kind = next((name for name, given in kinds.items() if given), "parts of texts")
    raise_if(problems, f"The labels of {source.name} are {kind}:")


def check_classes(source: Source, label: np.ndarray, train: np.ndarray) -> None:
    """Checks that every class occurs in training.

    Args:
        source: Source with the classes.
        label: Labels of all its examples.
        train: Indices of the training examples.

    Raises:
        UserError: Names the classes that do not.
    """
    seen = set(np.unique(label[train]).tolist()) if source.class_names else set()
    absent = [
        name for index, name in enumerate(source.class_names) if index not in seen
    ]
    if absent:
        raise UserError(
            f"config.data.train: {len(absent)} of {len(source.class_names)} classes "
            f"have no training example: {', '.join(absent[:20])}. A model cannot learn "
            "what it never sees; choose another split."
            + "".join(f"\n  {line}" for line in near_twins(source.class_names))
        )


def check_labelled(
    source: Source,
    label: np.ndarray,
    chosen: Mapping[str, np.ndarray],
    *,
    training: bool,
) -> None:
    """Checks that the examples of every split have a class.

    Args:
        source: Source with the classes.
        label: Class index of all its examples; below 0 where there is none.
        chosen: Indices of the examples by split, 'train' among them.
        training: Whether training needs labels.

    Raises:
        UserError: Lists the splits that have examples without a class.
    """
    if not source.class_names:
        return
    problems = [
        f"config.data.{split}: {count} of {len(indices)} examples have no class"
        for split, indices in chosen.items()
        if (training or split != "train") and (count := int((label[indices] < 0).sum()))
    ]
    advice = "Choose another split; labels of test splits are often not published."
    raise_if(problems, f"The data {source.name} cannot be used:", advice)
