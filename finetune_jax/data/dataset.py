"""The splits of a run, decoded: from `config.data` to arrays of examples."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finetune_jax.core.array_store import aligned_zeros
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest
from finetune_jax.data.images.decoding import Geometry
from finetune_jax.data.loading import load_source as load_source
from finetune_jax.data.loading import opened
from finetune_jax.data.source import (
    ArrayExamples,
    Source,
    check_classes,
    check_labelled,
)
from finetune_jax.data.spec import DataSpec, check_preprocessing, preprocessing_of
from finetune_jax.data.splits import choose, overlaps, per_class
from finetune_jax.data.tables.encoding import Fitted
from finetune_jax.data.threads import attempts, check_readable

ADVICE = "Mend them, take them out, or pass them over: config.data.on_error=skip."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one split, decoded and resized when they are taken.

    Attributes:
        source: Where they come from.
        indices: Which they are, in the concatenation of the source's splits.
        label: Class index of each, int32 [N]; or its targets, float32 [N, T]; zeros
            where images have masks.
        geometry: How images become what batches hold; None for feature vectors.
        shape: Of one example's inputs after that.
        decoded: All examples as `source` reads them, where they are kept in memory.
        unreadable: Messages by index, of what could not be read and has weight 0; None
            stops there.
    """

    source: Source
    indices: np.ndarray
    label: np.ndarray
    geometry: Geometry | None
    shape: tuple[int, ...]
    decoded: np.ndarray | None = None
    unreadable: dict[int, str] | None = None

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.indices)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Fingerprint of the source and of the examples chosen from it."""
        return {
            "data": self.source.fingerprint(),
            "splits": [[name, len(part)] for name, part in self.source.splits.items()],
            "examples": digest({"indices": self.indices}),
            "geometry": repr((self.geometry, self.shape)),
        }

    @property
    def key(self) -> str:
        """`about` as a key in memory."""
        return repr(self.about)

    @property
    def nbytes(self) -> int:
        """Bytes that keeping all examples in memory takes; none where they are there."""
        owners, _ = self._owners(self.indices)
        parts = list(self.source.splits.values())
        are_ready = all(self._is_ready(parts[owner]) for owner in np.unique(owners))
        if self.decoded is not None or are_ready:
            return 0
        return len(self) * math.prod(self._read_shape) * self._dtype.itemsize

    def in_memory(self) -> "Dataset":
        """Returns the split with all examples decoded.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        if not self.nbytes:
            return self
        everything = self._read(np.arange(len(self)))
        return dataclasses.replace(self, decoded=everything)

    def take(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'inputs', 'label' and 'weight' of examples at positions of the split.

        And 'mask' where images have one, uint8 [n, H, W]. The weight of what could not be
        read is 0, its inputs are zeros; of all others 1.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        kept = self.decoded
        return {
            **self.parts(self._read(positions) if kept is None else kept[positions]),
            "label": self.label[positions],
            "weight": self.readable(positions).astype(np.float32),
        }

    def on_host(self) -> dict[str, np.ndarray]:
        """Returns 'label', and 'note' where there are notes, as metrics read them."""
        found = {"label": self.label}
        if self.source.notes is not None:
            found["note"] = self.source.notes[self.indices]
        return found

    def readable(self, positions: np.ndarray) -> np.ndarray:
        """Returns which examples, taken already, could be read, bool [n]."""
        return ~np.isin(self.indices[positions], list(self.unreadable or ()))

    def parts(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'inputs', and 'mask' where there is one, of examples as they are read."""
        if not self.source.pixel_classes:
            return {"inputs": examples}
        return {"inputs": examples[..., :-1], "mask": examples[..., -1]}

    @property
    def _read_shape(self) -> tuple[int, ...]:
        """The shape of an example as it is read: a mask is a channel more."""
        masks = 1 if self.source.pixel_classes else 0
        return (*self.shape[:-1], self.shape[-1] + masks)

    def _read(self, positions: np.ndarray) -> np.ndarray:
        owners, places = self._owners(self.indices[positions])
        parts = list(self.source.splits.values())
        ready = np.array([self._is_ready(part) for part in parts])[owners]
        inputs = aligned_zeros((len(places), *self._read_shape), self._dtype)
        for owner in np.unique(owners[ready]):
            rows = np.flatnonzero(owners == owner)
            inputs[rows] = parts[owner].values[places[rows]]

        def read(row):
            inputs[row] = parts[owners[row]].read(int(places[row]), self.geometry)

        rows = np.flatnonzero(~ready)
        errors = [error for _, error in attempts(read, rows)]
        if self.unreadable is None:
            check_readable(errors, ADVICE)
            return inputs
        for row, error in zip(rows, errors):
            if error is not None:
                self.unreadable[int(self.indices[positions[row]])] = str(error)
        return inputs

    def kept(self) -> "Dataset":
        """Returns the split without what could not be read."""
        readable = self.readable(np.arange(len(self)))
        if readable.all():
            return self
        decoded = None if self.decoded is None else self.decoded[readable]
        return dataclasses.replace(
            self,
            indices=self.indices[readable],
            label=self.label[readable],
            decoded=decoded,
        )

    def without_labels(self) -> "Dataset":
        """Returns the split with zeros for labels."""
        return dataclasses.replace(self, label=np.zeros_like(self.label))

    def messages(self) -> dict[str, str]:
        """Returns what was passed over so far: messages by name."""
        places = {int(index): at for at, index in enumerate(self.indices)}
        return {
            self.name(places[index]): message
            for index, message in sorted((self.unreadable or {}).items())
        }

    def name(self, position: int) -> str:
        """Returns what a person knows the example at a position by."""
        owners, places = self._owners(self.indices[[position]])
        return list(self.source.splits.values())[owners[0]].name(int(places[0]))

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(next(iter(self.source.splits.values())).dtype)

    def _owners(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the split of the source that has each example, and its place there."""
        sizes = [len(part) for part in self.source.splits.values()]
        ends = np.cumsum(sizes)
        owners = np.searchsorted(ends, wanted, side="right")
        return owners, wanted - (ends - sizes)[owners]

    def _is_ready(self, part: Any) -> bool:
        """Returns whether a split's arrays are what batches hold, unchanged."""
        resizes = self.geometry is not None and self.geometry.resize is not None
        is_array = isinstance(part, ArrayExamples)
        return is_array and part.shape == self.shape and not resizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains and measures itself on.

    Attributes:
        spec: What the examples look like.
        train: The training split, a `Dataset`, or a `Mixture` of several domains.
        held_out: 'validation' and 'test', where the config names them; likewise.
        fingerprint: Returns that of the source; the config says what was selected.
        warnings: What a reader of the result should know.
        not_used: Lines about files or rows that were left out, with counts and reasons.
        tokenizer: What the tokenizer.json of texts holds; None of what is no text.
        fitted: What a run keeps of a table; None of what is no table.
    """

    spec: DataSpec
    train: Any
    held_out: Mapping[str, Any]
    fingerprint: Callable[[], str]
    warnings: tuple[str, ...]
    not_used: tuple[str, ...] = ()
    tokenizer: str | None = None
    fitted: Fitted | None = None

    def unreadable(self) -> dict[str, str]:
        """Returns what was passed over so far: messages by name."""
        found = {}
        for part in (self.train, *self.held_out.values()):
            found |= part.messages()
        return found

    def in_memory(self, limit: float) -> "Data":
        """Returns the data decoded, if that takes no more than `limit` bytes.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        if sum(part.nbytes for part in (self.train, *self.held_out.values())) > limit:
            return self
        parts, problems = {"train": self.train, **self.held_out}, []
        for name, part in parts.items():
            try:
                parts[name] = part.in_memory()
            except UserError as error:
                problems.append(f"config.data.{name}: {error}")
        if problems:
            raise UserError("\n".join(problems))
        return dataclasses.replace(self, train=parts.pop("train"), held_out=parts)


def no_data(spec: DataSpec) -> Data:
    """Returns data of which only the looks are known: no examples."""
    nothing = Source(name="nothing", splits={}, class_names=(), fingerprint=str)
    return Data(
        spec=spec,
        train=dataset_of(nothing, spec, np.arange(0), np.zeros(0, np.int32)),
        held_out={},
        fingerprint=nothing.fingerprint,
        warnings=(),
    )


def dataset_of(
    source: Source,
    spec: DataSpec,
    indices: np.ndarray,
    label: np.ndarray,
    *,
    training: bool = False,
    skip: bool = False,
) -> Dataset:
    """Returns some examples of a source, preprocessed as a spec says.

    Args:
        source: Has the examples.
        spec: What they become.
        indices: Which, in the concatenation of the source's splits.
        label: Class index, or targets, of each.
        training: Whether augmentation follows, which may take larger images.
        skip: Whether examples that cannot be read are passed over.
    """
    return Dataset(
        source=source,
        indices=indices,
        label=label,
        geometry=spec.geometry(training),
        shape=spec.train_shape if training else spec.shape,
        unreadable={} if skip else None,
    )


def make_data(
    config: Mapping[str, Any],
    *,
    seed: int,
    tokenizer: str | None = None,
    labelled: bool = True,
    fitted: Fitted | None = None,
) -> Data:
    """Returns the splits that `config.data` describes.

    Args:
        config: The section `config.data`.
        seed: Of the run; draws the examples of `per_class`.
        tokenizer: What a tokenizer.json holds, for texts.
        labelled: Whether training may know labels. Otherwise nothing that training sees,
            not even which examples are in it, depends on them.
        fitted: What a run has kept of a table; None fits it to the training rows.

    Raises:
        UserError: A split that is wrong or empty, a class absent from training, what
            classes are needed for where there are none.
    """
    source, text, table = opened(config, tokenizer, fitted)
    label = {name: part.label for name, part in source.splits.items()}
    everything = np.concatenate(list(label.values()))
    stratified = labelled and config["stratified"]
    chosen = choose(label, source.groups, config, stratified=stratified)
    if config["per_class"] is not None:
        chosen["train"] = per_class(
            chosen["train"], everything[chosen["train"]], config["per_class"], seed
        )
    if everything.ndim == 1:
        if labelled:
            check_classes(source, everything, chosen["train"])
        check_labelled(source, everything, chosen, training=labelled)
    warnings = [*source.warnings, *overlaps(chosen)]
    if table is not None:
        source, fitted = table.fitted(chosen["train"], fitted, warnings)
    shape = _shape(source, config)
    spec = DataSpec(
        shape=shape,
        train_shape=train_shape(shape, config["train_size"]),
        dtype=next(iter(source.splits.values())).dtype,
        class_names=source.class_names,
        targets=source.targets,
        pixel_classes=source.pixel_classes,
        train_counts=_counts(source, everything[chosen["train"]], labelled=labelled),
        text=text,
        labelled=labelled,
        table=fitted and fitted.spec,
        pixels=source.pixels,
        **preprocessing_of(config),
    )
    check_preprocessing(spec)
    skip = config["on_error"] == "skip"
    made = {
        key: dataset_of(
            source, spec, i, everything[i], training=key == "train", skip=skip
        )
        for key, i in chosen.items()
    }
    train = made.pop("train")
    return Data(
        spec=spec,
        train=train if labelled else train.without_labels(),
        held_out=made,
        fingerprint=source.fingerprint,
        warnings=tuple(warnings),
        not_used=source.not_used,
        tokenizer=tokenizer if text else None,
        fitted=fitted,
    )


def _counts(source: Source, label: np.ndarray, *, labelled: bool) -> tuple[int, ...]:
    """Returns the training examples of each class, or, without classes, of all."""
    if not (source.class_names and label.ndim == 1 and labelled):
        return (len(label),)
    return tuple(map(int, np.bincount(label, minlength=len(source.class_names))))


def _shape(source: Source, config: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = {part.shape for part in source.splits.values()}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is not None and len(shape) < 3:
        for key in ("image_size", "channels", "train_size"):
            if config[key] is not None:
                raise UserError(
                    f"config.data.{key}: {config[key]}, but {source.name} has no images"
                )
        return shape
    image_size, channels = config["image_size"], config["channels"]
    if image_size is None and shape is None:
        raise UserError(
            f"config.data.image_size: the images of {source.name} differ in size; "
            "say which size they shall have"
        )
    height, width = (image_size, image_size) if image_size else shape[:2]  # type: ignore
    return height, width, channels or (shape[2] if shape else 3)


def train_shape(shape: tuple[int, ...], train_size: int | None) -> tuple[int, ...]:
    """Returns the shape of training examples before augmentation."""
    if train_size is None or len(shape) < 3:
        return shape
    return train_size, train_size, shape[2]
