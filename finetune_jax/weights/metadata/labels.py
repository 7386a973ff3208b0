"""Class names of a pretrained head that is kept, compared with those of the data."""

import dataclasses
import json
import pathlib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, first_of, listed
from finetune_jax.core.paths import user_path
from finetune_jax.core.pytrees import like, named
from finetune_jax.core.registry import closest
from finetune_jax.weights.fields import loads
from finetune_jax.weights.metadata.files import read_beside

# Leaves whose last axis is the classes.
_OUTPUTS = re.compile(r"(.*/)?logits(_[^/]+)?/(kernel|bias|lora_b)")
# Names of transformers for classes without names.
_NUMBERED = re.compile(r"LABEL_\d+")
_WHOLE = re.compile(r"[+-]?\d+\.0+")
# Number of folders from a checkpoint's arrays up to the run: checkpoints/STEP/state.
_ABOVE = 3
_ADVICE = (
    "A head for the data's starts anew: config.init.fresh=('head/.*',). "
    "config.init.accept=('classes',) keeps this one, class by class as it stands."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptHead:
    """A pretrained head that is kept for the data.

    Attributes:
        order: Position in the head of each class of the data; None keeps all positions.
        told: Line for the user; None if the classes are the same.
    """

    order: tuple[int, ...] | None = None
    told: str | None = None

    def placed(self, variables: Any, stage: str) -> Any:
        """Returns variables with the logits of a head in the order of the data.

        Args:
            variables: Loaded variables, with 'params'.
            stage: Name of the head's stage.
        """
        if self.order is None:
            return variables
        leaves = dict(named(variables))
        for name, leaf in leaves.items():
            if is_output(name, stage):
                rest = [k for k in range(leaf.shape[-1]) if k not in self.order]
                leaves[name] = np.asarray(leaf)[..., [*self.order, *rest]]
        return like(variables, leaves)


def is_output(name: str, stage: str) -> bool:
    """Returns whether a leaf's last axis is the classes of a head.

    >>> is_output("params/head/logits/bias", "head")
    True
    >>> is_output("params/head/hidden1/bias", "head")
    False
    """
    rest = name.partition("/")[2]
    return rest.startswith(f"{stage}/") and bool(_OUTPUTS.fullmatch(rest))


def check_labels(
    address: str,
    class_names: Sequence[str],
    known: Sequence[str] = (),
    accept: Collection[str] = (),
) -> KeptHead:
    """Returns the conversion of a pretrained head to the classes of the data.

    Args:
        address: Address of the weights.
        class_names: Class names of the data, in the order of the labels.
        known: Class names in the weight file; if empty, those in files beside it.
        accept: `config.init.accept`; 'classes' keeps a head of other classes unchanged.

    Raises:
        UserError: Lists every class that the head does not have.
    """
    known = tuple(known) or names_at(address)
    if not class_names:
        return KeptHead()
    if not known:
        shown = listed(class_names)
        return KeptHead(
            told=f"{address}: the head is kept, and nothing says what its classes are; "
            f"in their order they are taken for {shown}"
        )
    ours, theirs = keys(class_names, known)
    if ours == theirs[: len(ours)]:
        return _in_place(address, class_names, known)
    lacking = [n for n, key in zip(class_names, ours) if key not in theirs]
    if not lacking:
        return _moved(address, class_names, known, ours, theirs)
    if are_places(class_names) and not set(ours) & set(theirs):
        if len(class_names) <= len(known):
            pairs = ", ".join(f"{a} is {b!r}" for a, b in zip(class_names, known))
            told = f"the data's classes have numbers for names: {pairs[:300]}"
            return KeptHead(told=f"{address}: the head is kept; {told}")
    if "classes" in accept:
        return KeptHead(
            told=f"{address}: the head is kept for other classes: it has "
            f"{listed(known)}; the data {listed(class_names)}"
        )
    problems = [
        f"{name!r}: not a label of the weights{closest(name, known)}"
        if name in lacking
        else f"{name!r}: label {place} of the data, but {theirs.index(key)} of the weights"
        for place, (name, key) in enumerate(zip(class_names, ours))
        if theirs[place : place + 1] != [key]
    ]
    problems = first_of(problems)
    more = [n for n, key in zip(known, theirs) if key not in ours]
    if more:
        problems.append(f"the data has no {listed(more)}")
    raise UserError(
        *problems,
        header=f"config.init.pretrained: {address} has the labels {listed(known)}; "
        "those of the data are others:",
        advice=_ADVICE,
    )


def _in_place(
    address: str, class_names: Sequence[str], known: Sequence[str]
) -> KeptHead:
    told = []
    if list(known[: len(class_names)]) != list(class_names):
        told.append("its classes differ in writing alone")
    if len(known) > len(class_names):
        told.append(f"it also has {listed(known[len(class_names) :])}")
    line = f"{address}: the head is kept; {'; '.join(told)}" if told else None
    return KeptHead(told=line)


def _moved(
    address: str, class_names: Sequence[str], known: Sequence[str],
    ours: Sequence[str], theirs: Sequence[str],
) -> KeptHead:  # fmt: skip
    order = tuple(theirs.index(key) for key in ours)
    more = [n for n, key in zip(known, theirs) if key not in ours]
    also = f"; it also has {listed(more)}" if more else ""
    return KeptHead(
        order=order,
        told=f"{address}: the head is kept; its classes {listed(known)} are put into the "
        f"order of the data's: {listed(class_names)}{also}",
    )


def keys(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns names for comparison, without case and separators of words.

    If this makes two names of one list equal, all names keep them.

    >>> keys(["New_York"], ["new york"])
    (['new york'], ['new york'])
    >>> keys(["a", "A"], ["A", "a"])
    (['a', 'A'], ['A', 'a'])
    """
    folded = [list(map(_folded, names)) for names in (ours, theirs)]
    if all(len(set(names)) == len(names) for names in folded):
        return folded[0], folded[1]
    return list(map(_plain, ours)), list(map(_plain, theirs))


def _plain(name: str) -> str:
    found = unicodedata.normalize("NFC", str(name)).strip()
    return found.partition(".")[0] if _WHOLE.fullmatch(found) else found


def _folded(name: str) -> str:
    words = re.split(r"[\s_-]+", _plain(name).casefold())
    return " ".join(words) if any(words) else _plain(name)


def are_places(names: Sequence[str]) -> bool:
    """Returns whether class names are the numbers from 0 on."""
    return [_plain(name) for name in names] == [str(n) for n in range(len(names))]


def names_at(address: str) -> tuple[str, ...]:
    """Returns the class names of the weights at an address; () if they are unknown."""
    kind, _, place = address.partition(":")
    if kind == "orbax" and (
        found := _of_run(user_path(place, "config.init.pretrained"))
    ):
        return found
    return labels_beside(address)


def _of_run(place: pathlib.Path) -> tuple[str, ...]:
    """Returns the class names in the manifest of a run or of a checkpoint's run."""
    folder = place.absolute()
    for one in (folder, *list(folder.parents)[:_ABOVE]):
        try:
            data = json.loads((one / "manifest.json").read_text("utf-8"))["data"]
            for key in ("class_names", "targets", "pixel_classes"):
                if data.get(key):
                    return tuple(map(str, data[key]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # No manifest, or one without class names.
    return ()


def labels_beside(address: str) -> tuple[str, ...]:
    """Returns the labels in a file beside weights, in their order; () if unknown."""
    for name in ("config.json", "model.json"):
        try:
            text = read_beside(address, name)
            found = _labels(loads(text)) if text is not None else ()
        except (UserError, ValueError, TypeError, AttributeError, KeyError):
            continue  # Missing, not JSON, or of another type.
        if found and not all(map(_NUMBERED.fullmatch, found)):
            return found
    return ()


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels in a file of transformers, of timm, or of this project."""
    numbered, places = values.get("id2label"), values.get("label2id")
    if isinstance(numbered, list):
        return tuple(map(str, numbered))
    if numbered:
        return tuple(str(numbered[str(number)]) for number in range(len(numbered)))
    if places:
        by_place = {int(place): str(name) for name, place in places.items()}
        return tuple(by_place[number] for number in range(len(places)))
    # timm writes them beside or inside `pretrained_cfg`.
    inner = values.get("pretrained_cfg") or {}
    listed = values.get("label_names") or inner.get("label_names")
    listed = listed or values.get("labels") or values.get("targets")
    return tuple(map(str, listed or ()))
