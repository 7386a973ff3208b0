"""The contract of a data source: named splits of random-access examples."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from finetune_jax.data.images import Geometry, fit_named
from finetune_jax.errors import problems_error


class Examples(Protocol):
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
            index: Of the example.
            geometry: What an image is to fit; None leaves it in its own size.

        Raises:
            UserError: Names the example, which cannot be read or fitted.
        """
        ...

    def name(self, index: int) -> str:
        """Returns what a person knows the example by."""
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
    """A data set as it lies there.

    Attributes:
        name: For messages.
        splits: Examples by the name of their split; a source without splits of its own
            has the one split 'all'.
        class_names: In the order of the labels; empty where the labels are numbers, or
            images have masks.
        targets: Names of these numbers.
        pixel_classes: Names of the classes of a mask's pixels, in the order of their
            indices.
        fingerprint: Returns what changes when the content does; may read all of it.
        groups: By split, how many examples belong together, one group after another, so
            that no two splits share a group; None: each example is a group.
        notes: What metrics and predictions read of each example besides its label, an
            array of objects, the splits one after another; None: nothing.
        warnings: Lines about what is doubtful in the data, such as near-equal class names.
        not_used: Lines about files or rows that were left out, with counts and reasons.
    """

    name: str
    splits: Mapping[str, Examples]
    class_names: tuple[str, ...]
    fingerprint: Callable[[], str]
    targets: tuple[str, ...] = ()
    pixel_classes: tuple[str, ...] = ()
    groups: Mapping[str, np.ndarray] | None = None
    notes: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()


def array_source(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> Source:
    """Returns a source of arrays, checked.

    Args:
        name: For messages.
        splits: (inputs, labels) by split: inputs [N, H, W], [N, H, W, C] or [N, F]; bytes
            stay bytes, all other numbers become float32. Labels are integers or strings
            [N], which are classes, or floating-point numbers [N] or [N, T] to predict.
        class_names: In the order of the labels; by default the labels that occur.
        targets: Names of the T numbers.

    Raises:
        UserError: Lists all that does not fit together.
    """
    problems = _target_problems(splits, class_names, targets)
    for split, (inputs, label) in splits.items():
        where = f"split {split!r}"
        if len(inputs) != len(label):
            problems.append(f"{where}: {len(inputs)} inputs, {len(label)} labels")
        ranks = (1, 2) if label.dtype.kind == "f" else (1,)
        if inputs.ndim not in (2, 3, 4) or label.ndim not in ranks:
            problems.append(
                f"{where}: inputs {inputs.shape}, labels {label.shape}; needed are inputs "
                "[N, F], [N, H, W] or [N, H, W, C] and labels [N], or numbers [N, T]"
            )
        if inputs.dtype.kind not in "uifb":
            problems.append(f"{where}: inputs are {inputs.dtype}, not numbers")
        elif inputs.dtype.kind == "f" and len(bad := _not_finite(inputs)):
            problems.append(
                f"{where}: {len(bad)} examples have NaN or infinity (in float32), "
                f"the first is number {int(bad[0])}"
            )
        problems += [f"{where}: {text}" for text in _label_problems(label)]
    if len({inputs.shape[1:] for inputs, _ in splits.values()}) > 1:
        shapes = {split: inputs.shape[1:] for split, (inputs, _) in splits.items()}
        problems.append(f"the splits differ in shape: {shapes}")
    if problems:
        raise problems_error(f"The data {name} cannot be used:", problems)
    if any(label.dtype.kind == "f" for _, label in splits.values()):
        return _source_of_numbers(name, splits, targets)
    values = np.unique(np.concatenate([label for _, label in splits.values()]))
    if class_names is None or values.dtype.kind in "US":
        class_names = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    else:
        outside = [int(v) for v in values if not 0 <= v < len(class_names)]
        if outside:
            raise problems_error(
                f"The data {name} cannot be used:",
                [f"labels {outside}, but there are {len(class_names)} classes"],
            )
        values = np.arange(len(class_names))
    examples = {
        split: ArrayExamples(
            values=_numbers(inputs),
            label=np.searchsorted(values, label).astype(np.int32),
        )
        for split, (inputs, label) in splits.items()
    }
    return Source(
        name=name,
        splits=examples,
        class_names=tuple(class_names),
        fingerprint=lambda: _fingerprint(examples),
    )


def _label_problems(label: np.ndarray) -> list[str]:
    """Returns what is wrong with the labels of a split, whatever else it has."""
    if label.dtype.kind not in "uiUSf":
        return [f"labels are {label.dtype}, not numbers or text"]
    if label.dtype.kind in "US":
        blank = np.flatnonzero(np.strings.str_len(np.strings.strip(label)) == 0)
        if len(blank):
            return [
                f"{len(blank)} labels are blank, the first is number {int(blank[0])}; "
                "give those examples a class, or leave them out"
            ]
    return []


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Returns the rows that have numbers that are not finite as float32."""
    is_right = np.abs(values) <= np.finfo(np.float32).max
    return np.flatnonzero(~is_right.reshape(len(values), -1).all(axis=1))


def _target_problems(
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None,
    targets: Sequence[str] | None,
) -> list[str]:
    """Returns what does not fit about labels that are floating-point numbers."""
    label = {split: label for split, (_, label) in splits.items()}
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
        if values.dtype.kind == "f":
            if len(bad := _not_finite(values)):
                problems.append(
                    f"split {split!r}: {len(bad)} examples have labels that are NaN or "
                    f"infinite, the first is number {int(bad[0])}"
                )
    return problems


def _source_of_numbers(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    targets: Sequence[str] | None,
) -> Source:
    examples = {
        split: ArrayExamples(
            values=_numbers(inputs),
            label=label.reshape(len(label), -1).astype(np.float32),
        )
        for split, (inputs, label) in splits.items()
    }
    width = next(iter(examples.values())).label.shape[1]
    if targets is None:
        targets = [f"target{i + 1}" for i in range(width)] if width > 1 else ["target"]
    return Source(
        name=name,
        splits=examples,
        class_names=(),
        targets=tuple(targets),
        fingerprint=lambda: _fingerprint(examples),
    )


def _numbers(inputs: np.ndarray) -> np.ndarray:
    inputs = inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32)
    return inputs[..., None] if inputs.ndim == 3 else inputs


def _fingerprint(splits: Mapping[str, ArrayExamples]) -> str:
    digester = hashlib.sha256()
    for name, examples in sorted(splits.items()):
        digester.update(f"{name}{examples.values.shape}{examples.dtype}".encode())
        digester.update(np.ascontiguousarray(examples.values).data)
        digester.update(np.ascontiguousarray(examples.label).data)
    return digester.hexdigest()
