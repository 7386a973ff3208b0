"""The splits of a run, decoded: from `config.data` to arrays of examples."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finetune_jax.core.array_store import aligned_zeros
from finetune_jax.core.errors import Problem, collected, raise_if, under
from finetune_jax.core.pytrees import digest
from finetune_jax.data.kind import (
    Lengths,
    Opened,
    Resources,
    check_keys,
    kind_named,
    kind_of,
)
from finetune_jax.data.reading.threads import attempts, check_readable
from finetune_jax.data.source import (
    ArrayExamples,
    Source,
    check_classes,
    check_labelled,
    check_no_classes,
)
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.splits import choose, overlaps, per_class

ADVICE = "Mend them, take them out, or pass them over: config.data.on_error=skip."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one split, decoded and resized when they are taken.

    Attributes:
        source: Source of the examples.
        indices: Places of the examples in the concatenation of the source's splits.
        label: Class index of each example, int32 [N]; or its targets, float32 [N, T];
            zeros where images have masks.
        geometry: How examples are fitted when they are read; None: as stored.
        shape: Shape of one example's inputs after that.
        lengths: How batches are cut to their longest example; None for equal shapes.
        decoded: All examples as `source` reads them, if they are kept in memory.
        missing: Which of `decoded` have not been read yet, bool [N]; None: all were.
        unreadable: Messages by index for examples that could not be read and have weight
            0; None raises an error instead.
    """

    source: Source
    indices: np.ndarray
    label: np.ndarray
    geometry: Any
    shape: tuple[int, ...]
    lengths: Lengths | None = None
    decoded: np.ndarray | None = None
    missing: np.ndarray | None = None
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

    @functools.cached_property
    def key(self) -> str:
        """Key of the split in memory: `about`, and the labels."""
        return repr((self.about, digest({"label": self.label})))

    @property
    def sha256(self) -> str:
        """Digest of `key`."""
        return hashlib.sha256(self.key.encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that keeping all examples in memory takes; 0 if they are there already."""
        owners, _ = self._owners(self.indices)
        parts = list(self.source.splits.values())
        are_ready = all(self._is_ready(parts[owner]) for owner in np.unique(owners))
        if self.decoded is not None or are_ready:
            return 0
        return len(self) * math.prod(self._read_shape) * self._dtype.itemsize

    def in_memory(self, *, lazily: bool = False) -> "Dataset":
        """Returns the split with all examples decoded.

        Args:
            lazily: Whether an example is decoded when it is first taken: one of several
                processes does not take all of them.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        if not self.nbytes:
            return self
        if lazily:
            decoded = aligned_zeros((len(self), *self._read_shape), self._dtype)
            missing = np.ones(len(self), bool)
            return dataclasses.replace(self, decoded=decoded, missing=missing)
        everything = self._read(np.arange(len(self)))
        return dataclasses.replace(self, decoded=everything)

    def take(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'inputs', 'label' and 'weight' of examples at positions of the split.

        Where images have masks, 'mask' is uint8 [n, H, W]. An example that could not be
        read has weight 0 and zeros for inputs; all others have weight 1.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        kept = self.decoded
        if kept is not None and self.missing is not None:
            wanted = np.unique(positions[self.missing[positions]])
            if len(wanted):
                kept[wanted] = self._read(wanted)
                self.missing[wanted] = False
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
        return self.selected(readable)

    def selected(self, chosen: np.ndarray | slice) -> "Dataset":
        """Returns some of the examples, by a mask, positions or a slice."""
        names = "indices", "label", "decoded", "missing"
        arrays = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self, **{k: None if v is None else v[chosen] for k, v in arrays.items()}
        )

    def without_labels(self) -> "Dataset":
        """Returns the split with zeros for labels."""
        return dataclasses.replace(self, label=np.zeros_like(self.label))

    def messages(self) -> dict[str, str]:
        """Returns messages about examples that could not be read so far, by name."""
        places = {int(index): at for at, index in enumerate(self.indices)}
        return {
            self.name(places[index]): message
            for index, message in sorted((self.unreadable or {}).items())
        }

    def name(self, position: int) -> str:
        """Returns the name of the example at a position, such as its file."""
        owners, places = self._owners(self.indices[[position]])
        return list(self.source.splits.values())[owners[0]].name(int(places[0]))

    def names(self, positions: np.ndarray) -> list[str]:
        """Returns the names of examples, with the split of the source that has them."""
        owners, places = self._owners(self.indices[positions])
        parts = list(self.source.splits.items())
        return [
            f"{parts[owner][0]}/{parts[owner][1].name(place)}"
            for owner, place in zip(owners.tolist(), places.tolist())
        ]

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
        changes = self.geometry is not None and self.geometry.changes(part.shape)
        is_array = isinstance(part, ArrayExamples)
        return is_array and part.shape == self.shape and not changes


def unaugmented(split: Dataset, spec: DataSpec) -> Dataset:
    """Returns a training split as evaluation reads it, without augmentation.

    Args:
        split: Training split.
        spec: Description of the data.
    """
    if not spec.augment:
        return split
    geometry = kind_named(spec.kind).geometry(spec, training=False)
    return dataclasses.replace(
        split, geometry=geometry, shape=spec.shape, decoded=None, missing=None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Data that a run is trained on and measured on.

    Attributes:
        spec: Description of the examples.
        train: Training split, a `Dataset`, or a `DomainMixture` of several domains.
        held_out: Splits 'validation' and 'test', as far as the config names them.
        fingerprint: Returns the source's fingerprint; the config has the selection.
        warnings: Lines that a reader of the result should know.
        not_used: Lines about files or rows that were left out, with counts and reasons.
        fitted: State of the kind that the run keeps, such as the statistics of a table.
        files: Returns texts that the run keeps in its workdir, by file name.
    """

    spec: DataSpec
    train: Any
    held_out: Mapping[str, Any]
    fingerprint: Callable[[], str]
    warnings: tuple[str, ...]
    not_used: tuple[str, ...] = ()
    fitted: Any = None
    files: Callable[[], Mapping[str, str]] = dict

    def label_counts(self) -> tuple[int, ...]:
        """Returns the training examples of each class, or the words of each tag."""
        label = self.train.label if isinstance(self.train, Dataset) else np.zeros(0)
        if label.ndim == 1 or not self.spec.class_names:
            return self.spec.train_counts
        counts = np.bincount(label[label >= 0], minlength=len(self.spec.class_names))
        return tuple(counts.tolist())

    def unreadable(self) -> dict[str, str]:
        """Returns messages about examples that could not be read so far, by name."""
        found = {}
        for part in (self.train, *self.held_out.values()):
            found |= part.messages()
        return found

    def in_memory(self, limit: float, *, lazily: bool = False) -> "Data":
        """Returns the data decoded, if that takes no more than `limit` bytes.

        Args:
            limit: Bytes.
            lazily: As in `Dataset.in_memory`.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        if sum(part.nbytes for part in (self.train, *self.held_out.values())) > limit:
            return self
        parts, problems = {"train": self.train, **self.held_out}, list[Problem]()
        for name, part in parts.items():
            with collected(problems), under(f"config.data.{name}"):
                parts[name] = part.in_memory(lazily=lazily)
        raise_if(problems)
        return dataclasses.replace(self, train=parts.pop("train"), held_out=parts)


def no_data(spec: DataSpec) -> Data:
    """Returns data without examples."""
    nothing = Source(name="nothing", splits={}, class_names=(), fingerprint=str)
    return Data(
        spec=spec,
        train=dataset_of(nothing, spec, np.arange(0), np.zeros(0, np.int32)),
        held_out={},
        fingerprint=nothing.fingerprint,
        warnings=(),
    )


def unlabelled(
    inputs: np.ndarray,
    spec: DataSpec,
    *,
    name: str = "inputs",
    label: np.ndarray | None = None,
    notes: np.ndarray | None = None,
) -> Dataset:
    """Returns inputs [N, ...], as the model takes them, as a dataset for prediction.

    Args:
        inputs: The inputs.
        spec: Description of the run's data.
        name: Name of the inputs, for messages.
        label: Stand-ins for the labels; None is zeros.
        notes: Notes of the examples, as `Source` has them.
    """
    label = np.zeros(len(inputs), np.int32) if label is None else label
    source = Source(
        name=name,
        splits={"all": ArrayExamples(values=inputs, label=label)},
        class_names=(),
        fingerprint=str,
        notes=notes,
    )
    return dataset_of(source, spec, np.arange(len(inputs)), label)


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
        source: Source of the examples.
        spec: Description of the data.
        indices: Places of the examples in the concatenation of the source's splits.
        label: Class index, or targets, of each example.
        training: Whether augmentation follows, which may take larger images.
        skip: Whether examples that cannot be read get weight 0.
    """
    kind = kind_named(spec.kind)
    return Dataset(
        source=source,
        indices=indices,
        label=label,
        geometry=kind.geometry(spec, training=training),
        shape=spec.train_shape if training else spec.shape,
        lengths=kind.lengths(spec),
        unreadable={} if skip else None,
    )


def make_data(
    config: Mapping[str, Any],
    *,
    seed: int,
    labelled: bool = True,
    resources: Resources | None = None,
) -> Data:
    """Returns the splits that `config.data` describes.

    Args:
        config: The section `config.data`.
        seed: Seed of the run; draws the examples of `per_class`.
        labelled: Whether training may know labels. Otherwise nothing that training sees,
            not even which examples are in it, depends on them.
        resources: Content of files that the kind of data may need; None: of none.

    Raises:
        UserError: A split that is wrong or empty, a class absent from training, or an
            option that needs classes where there are none.
    """
    opened = _opened(config, resources or Resources())
    source = opened.source
    label = {name: part.label for name, part in source.splits.items()}
    everything = np.concatenate(list(label.values()))
    if not source.class_names or everything.ndim > 1:
        check_no_classes(source, config)
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
    prepared = opened.prepare(chosen["train"])
    source = prepared.source
    spec = DataSpec(
        kind=opened.kind,
        shape=prepared.shape,
        train_shape=prepared.train_shape,
        dtype=next(iter(source.splits.values())).dtype,
        inputs=prepared.inputs,
        class_names=source.class_names,
        targets=source.targets,
        pixel_classes=source.pixel_classes,
        train_counts=_counts(source, everything[chosen["train"]], labelled=labelled),
        augment=config["augment"],
        mix=config["mix"],
        labelled=labelled,
    )
    kind_named(spec.kind).check(spec)
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
        warnings=(*opened.source.warnings, *overlaps(chosen), *prepared.warnings),
        not_used=source.not_used,
        fitted=prepared.fitted,
        files=prepared.files,
    )


def _opened(section: Mapping[str, Any], resources: Resources) -> Opened:
    """Returns the data that `config.data` describes, its splits not chosen yet."""
    kind = kind_of(section)
    check_keys(section, kind)
    opened = kind_named(kind).open(section, resources)
    check_keys(section, opened.kind)
    return opened


def _counts(source: Source, label: np.ndarray, *, labelled: bool) -> tuple[int, ...]:
    """Returns the training examples of each class, or, without classes, of all."""
    if not (source.class_names and label.ndim == 1 and labelled):
        return (len(label),)
    return tuple(map(int, np.bincount(label, minlength=len(source.class_names))))
