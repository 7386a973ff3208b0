"""The contents of a weight file of any format."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Keys of class names in training programs: torchvision's tutorials, mmpretrain 0 and 1.
_LISTS = ("class_names", "classes", "CLASSES", "label_names", "labels")
_NUMBERED = ("class_to_idx", "label2id", "label_map", "idx_to_class", "id2label")
_SECTIONS = ("meta", "dataset_meta", "hyper_parameters")
_MOST = 10**5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """Tensors of a weight file, and its other contents.

    Attributes:
        tensors: Tensors by name.
        notes: Lines about the chosen entry and ignored contents.
        class_names: Class names in the order of the logits; empty if unknown.
        arch: Name of the network that a training program wrote; empty if unknown.
    """

    tensors: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    arch: str = ""


def listed_classes(top: Any) -> tuple[str, ...]:
    """Returns the class names that a training checkpoint lists; () if it lists none.

    >>> listed_classes({"meta": {"CLASSES": ("cat", "dog")}})
    ('cat', 'dog')
    >>> listed_classes({"class_to_idx": {"dog": 1, "cat": 0}})
    ('cat', 'dog')
    """
    sections = [top]
    for values in sections:
        if not isinstance(values, Mapping) or len(sections) > 2 * len(_SECTIONS):
            continue
        if found := _names(values):
            return found
        sections += [values[key] for key in _SECTIONS if key in values]
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
            names, places = list(found), list(found.values())
            if all(isinstance(name, str) for name in places):  # Names by their numbers.
                names, places = places, names
            try:
                by_place = dict(zip(map(int, places), names))
            except (TypeError, ValueError):
                continue
            if sorted(by_place) == list(range(len(found))):
                return tuple(str(by_place[place]) for place in range(len(found)))
    return ()


def named_network(top: Any) -> str:
    """Returns the name of the network in a checkpoint of timm or torchvision; '' if none.

    >>> named_network({"arch": "resnet50", "state_dict": {}})
    'resnet50'
    """
    arch = top.get("arch") if isinstance(top, Mapping) else None
    return arch[:100] if isinstance(arch, str) else ""
