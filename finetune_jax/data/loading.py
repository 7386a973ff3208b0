"""From `config.data` to a source of images or feature vectors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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


def open_arrays(
    section: Mapping[str, Any],
    shapes: Callable[[Source, Mapping[str, Any]], tuple[tuple[int, ...], ...]],
) -> Opened:
    """Returns the images or vectors that `config.data` describes.

    Args:
        section: `config.data`.
        shapes: Returns the shape of images, and that before augmentation.

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
        pair = (found[0], found[0]) if is_vectors else shapes(source, section)
        inputs = array_spec(section, source.pixels)
        return Prepared(
            source=source, shape=pair[0], train_shape=pair[1], inputs=inputs
        )

    kind = "vectors" if is_vectors else "images"
    return Opened(kind=kind, source=source, prepare=prepare)
