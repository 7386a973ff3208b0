"""From `config.data` to a source of images or feature vectors."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data import sources
from finetune_jax.data.kind import Opened, Prepared
from finetune_jax.data.preprocessing import array_spec
from finetune_jax.data.shifts import shifted
from finetune_jax.data.source import Source


def load_source(name: str, directory: str | None) -> Source:
    """Returns the source of images or vectors that `config.data.name` names.

    Raises:
        UserError: No such source, or its data cannot be read.
    """
    module, _, argument = name.partition(":")
    found = registry.module(sources, module, "config.data.name")
    if not hasattr(found, "load"):
        raise UserError(
            f"config.data.name: {name!r} holds texts or tables; images or vectors are "
            "needed here"
        )
    source = found.load(directory, argument or None)
    # It may read all of the data.
    once = functools.cache(source.fingerprint)
    return dataclasses.replace(source, fingerprint=once)


def open_arrays(section: Mapping[str, Any]) -> Opened:
    """Returns the images or vectors that `config.data` describes.

    Raises:
        UserError: No such source, its data cannot be read, or cannot be shifted.
    """
    source = load_source(section["name"], section["dir"])
    if section["shift"]:
        source = shifted(source, section["shift"])
    found = [shape for part in source.splits.values() if (shape := part.shape)]
    is_vectors = any(len(shape) < 3 for shape in found)

    def prepare(train: Any) -> Prepared:
        del train
        shape = found[0] if is_vectors else _image_shape(source, section)
        return Prepared(
            source=source,
            shape=shape,
            train_shape=train_shape(shape, section["train_size"]),
            inputs=array_spec(section, source.pixels),
        )

    kind = "vectors" if is_vectors else "images"
    return Opened(kind=kind, source=source, prepare=prepare)


def _image_shape(source: Source, section: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape of images as a model takes them.

    Raises:
        UserError: The images differ in size and `config.data` gives none.
    """
    found = {part.shape for part in source.splits.values()}
    shape = found.pop() if len(found) == 1 else None
    image_size, channels = section["image_size"], section["channels"]
    if image_size is None and shape is None:
        raise UserError(
            f"config.data.image_size: the images of {source.name} differ in size; "
            "say which size they shall have"
        )
    height, width = (image_size, image_size) if image_size else shape[:2]  # type: ignore
    return height, width, channels or (shape[2] if shape else 3)


def train_shape(shape: tuple[int, ...], train_size: int | None) -> tuple[int, ...]:
    """Returns the shape of images before augmentation, by `config.data.train_size`."""
    return shape if train_size is None else (train_size, train_size, shape[2])
