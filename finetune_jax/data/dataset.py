"""The splits of a run, decoded: from `config.data` to arrays of examples."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from finetune_jax import lookup
from finetune_jax.data import sources
from finetune_jax.data.source import Source
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.splits import named_splits, per_class, select
from finetune_jax.errors import UserError, problems_error

# Rec. 601, as Pillow converts colour to grey.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one split, decoded and resized when they are taken.

    Attributes:
        source: Where they come from.
        indices: Which they are, in the concatenation of the source's splits.
        label: Class index of each.
        shape: Of one example's inputs after decoding.
    """

    source: Source
    indices: np.ndarray
    label: np.ndarray
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.indices)

    def take(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'inputs' and 'label' of the examples at some positions of the split."""
        wanted = self.indices[positions]
        parts = list(self.source.splits.values())
        ends = np.cumsum([len(part) for part in parts])
        owner = np.searchsorted(ends, wanted, side="right")
        dtype = np.dtype(parts[0].dtype)
        inputs = np.empty((len(wanted), *self.shape), dtype)
        for index in np.unique(owner):
            rows = np.flatnonzero(owner == index)
            start = ends[index] - len(parts[index])
            values = parts[index].inputs(wanted[rows] - start)
            if isinstance(values, np.ndarray) and values.shape[1:] == self.shape:
                inputs[rows] = values
            else:
                for row, value in zip(rows, values):
                    inputs[row] = decode(value, self.shape)
        return {"inputs": inputs, "label": self.label[positions]}


def decode(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an image resized (bilinear, antialiased) and with the channels wanted.

    Args:
        image: Bytes or float32, [H, W, C].
        shape: (H, W, C) wanted; C is 1 or 3.
    """
    height, width, channels = shape
    if image.shape[:2] != (height, width):
        planes = [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(image[..., plane])).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            )
            for plane in range(image.shape[-1])
        ]
        image = np.stack(planes, axis=-1)
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image[..., :1], 3, axis=-1)
    grey = (image[..., :3] @ _LUMINANCE)[..., None]
    return np.round(grey).astype(image.dtype) if image.dtype == np.uint8 else grey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains and measures itself on.

    Attributes:
        spec: What the examples look like.
        train: The training split.
        held_out: 'validation' and 'test', where the config names them.
        fingerprint: Of the source; the config says what was selected.
        warnings: What a reader of the result should know.
    """

    spec: DataSpec
    train: Dataset
    held_out: Mapping[str, Dataset]
    fingerprint: str
    warnings: tuple[str, ...]


def load_source(name: str, directory: str | None) -> Source:
    """Returns the source that `config.data.name` names.

    Raises:
        UserError: No such source, or its data cannot be read.
    """
    module, _, argument = name.partition(":")
    found = lookup.module(sources, module, "config.data.name")
    return found.load(directory, argument or None)


def make_data(config: Mapping[str, Any], *, seed: int) -> Data:
    """Returns the splits that `config.data` describes.

    Args:
        config: The section `config.data`.
        seed: Of the run; draws the examples of `per_class`.

    Raises:
        UserError: A split that is wrong or empty, a class absent from training.
    """
    source = load_source(config["name"], config["dir"])
    label = {name: part.label for name, part in source.splits.items()}
    everything = np.concatenate(list(label.values()))
    splits = named_splits(label, config["split_seed"])
    chosen = {
        key: select(splits, config[key], f"config.data.{key}")
        for key in ("train", "validation", "test")
        if config[key] is not None
    }
    if config["per_class"] is not None:
        chosen["train"] = per_class(
            chosen["train"], everything[chosen["train"]], config["per_class"], seed
        )
    _check_classes(source, everything, chosen["train"])
    shape = _shape(source, config["image_size"], config["channels"])
    made = {
        key: Dataset(source=source, indices=i, label=everything[i], shape=shape)
        for key, i in chosen.items()
    }
    train = made.pop("train")
    spec = DataSpec(
        shape=shape,
        dtype=next(iter(source.splits.values())).dtype,
        class_names=source.class_names,
        train_examples=len(train),
        mean=config["mean"],
        std=config["std"],
        augment=config["augment"],
    )
    check_channels(spec)
    return Data(
        spec=spec,
        train=train,
        held_out=made,
        fingerprint=source.fingerprint,
        warnings=tuple(_overlaps(chosen)),
    )


def _shape(
    source: Source, image_size: int | None, channels: int | None
) -> tuple[int, ...]:
    shapes = {part.shape for part in source.splits.values()}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is not None and len(shape) == 1:
        for key, value in (("image_size", image_size), ("channels", channels)):
            if value is not None:
                raise UserError(
                    f"config.data.{key}: {value}, but {source.name} has no images"
                )
        return shape
    if image_size is None and shape is None:
        raise UserError(
            f"config.data.image_size: the images of {source.name} differ in size; "
            "say which size they shall have"
        )
    height, width = (image_size, image_size) if image_size else shape[:2]  # type: ignore
    return height, width, channels or (shape[2] if shape else 3)


def check_channels(spec: DataSpec) -> None:
    """Checks that the preprocessing fits the inputs.

    Raises:
        UserError: Mean or deviation of another number of channels; augmentation of what
            is no image.
    """
    problems = [
        f"config.data.{name}: {len(value)} numbers, but inputs have {spec.shape[-1]} "
        "channels; give one number or one for each"
        for name, value in (("mean", spec.mean), ("std", spec.std))
        if len(value) not in (1, spec.shape[-1])
    ]
    if spec.augment and len(spec.shape) != 3:
        problems.append("config.data.augment: the data has no images")
    if problems:
        raise problems_error("The preprocessing does not fit the data:", problems)


def _check_classes(source: Source, label: np.ndarray, train: np.ndarray) -> None:
    seen = set(np.unique(label[train]).tolist())
    absent = [
        name for index, name in enumerate(source.class_names) if index not in seen
    ]
    if absent:
        raise UserError(
            f"config.data.train: {len(absent)} of {len(source.class_names)} classes "
            f"have no training example: {', '.join(absent[:20])}. A model cannot learn "
            "what it never sees; choose another split."
        )


def _overlaps(chosen: Mapping[str, np.ndarray]) -> list[str]:
    found = []
    for one, other in (
        ("train", "test"),
        ("train", "validation"),
        ("validation", "test"),
    ):
        if one in chosen and other in chosen:
            shared = len(np.intersect1d(chosen[one], chosen[other]))
            if shared:
                found.append(
                    f"data.{one} and data.{other} share {shared} examples: what is "
                    f"measured on data.{other} says little about new data"
                )
    return found
