"""The contents of one weight file, whatever its format."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Where training programs keep class names: torchvision's tutorials, mmpretrain 0 and 1.
_LISTS = ("class_names", "classes", "CLASSES", "label_names", "labels")
_NUMBERED = ("class_to_idx", "label2id")
_SECTIONS = ("meta", "dataset_meta")
_MOST = 10**5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """Tensors of a weight file, and what else the file tells.

    Attributes:
        tensors: Tensors by name.
        notes: Lines about the entry that was taken and what was left out.
        class_names: Class names in the order of the logits; empty where unknown.
    """

    tensors: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


def listed_classes(top: Any) -> tuple[str, ...]:
    """Returns the class names that a training checkpoint lists; () if it lists none.

    >>> listed_classes({"meta": {"CLASSES": ("cat", "dog")}})
    ('cat', 'dog')
    >>> listed_classes({"class_to_idx": {"dog": 1, "cat": 0}})
    ('cat', 'dog')
    """
    values = top
    for _ in range(1 + len(_SECTIONS)):
        if not isinstance(values, Mapping):
            return ()
        if found := _names(values):
            return found
        values = next((values[key] for key in _SECTIONS if key in values), None)
    return ()


def _names(values: Mapping[str, Any]) -> tuple[str, ...]:
    for key in _LISTS:
        found = values.get(key)
        if isinstance(found, list | tuple) and 1 < len(found) < _MOST:
            if all(isinstance(name, str) for name in found):
                return tuple(found)
    for key in _NUMBERED:
        found = values.get(key)
        if isinstance(found, dict) and 1 < len(found) < _MOST:
            places = list(found.values())
            if all(type(p) is int for p in places):
                if sorted(places) == list(range(len(places))):
                    return tuple(sorted(found, key=found.__getitem__))
    return ()
