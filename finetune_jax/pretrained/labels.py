"""The labels of a head that is kept: the data's have to be the same ones."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.errors import UserError, problems_error
from finetune_jax.lookup import closest
from finetune_jax.pretrained.beside import read_beside


def check_labels(address: str, class_names: Sequence[str]) -> None:
    """Checks that labels mean for the head of some weights what they mean in the data.

    Where no name is the same, they are called otherwise there, and nothing is known.

    Args:
        address: Of weights whose head is kept.
        class_names: Of the data, in the order of the labels.

    Raises:
        UserError: Lists every label that the head does not know, or has elsewhere.
    """
    known = labels_beside(address)
    if not set(known) & set(class_names):
        return
    problems = [
        f"{name!r}: not a label of the weights{closest(name, known)}"
        if name not in known
        else f"{name!r}: label {place} of the data, but {known.index(name)} of the weights"
        for place, name in enumerate(class_names)
        if list(known[place : place + 1]) != [name]
    ]
    if problems:
        raise problems_error(
            f"config.init.pretrained: {address} has the labels {', '.join(known[:20])}; "
            "those of the data are others:",
            problems,
            "A head for the data's starts anew: config.init.fresh=('head/.*',).",
        )


def labels_beside(address: str) -> tuple[str, ...]:
    """Returns the labels that a file beside weights names, in their order, if any does."""
    for name in ("config.json", "model.json"):
        try:
            text = read_beside(address, name)
            found = _labels(json.loads(text)) if text is not None else ()
        except (UserError, ValueError, TypeError, AttributeError, KeyError):
            continue  # Not in the repository, no JSON, or of another kind.
        if found:
            return found
    return ()


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels in a file of transformers, of timm, or of this project."""
    if numbered := values.get("id2label"):
        return tuple(str(numbered[str(number)]) for number in range(len(numbered)))
    listed = values.get("pretrained_cfg", values).get("label_names")
    return tuple(map(str, listed or values.get("labels") or ()))
