"""Split strings, in the syntax of TFDS: `train[:80%]`, `train[100:200]+validation`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError

# How a source without splits of its own is cut, in an order that is stratified; chosen
# by us. 'all' is the whole in the same order.
CUTS = {
    "all": (0.0, 1.0),
    "train": (0.0, 0.6),
    "validation": (0.6, 0.8),
    "test": (0.8, 1.0),
}
_PART = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUND = re.compile(r"-?\d+%?")


def stratified_order(label: np.ndarray, seed: int) -> np.ndarray:
    """Returns an order of which every stretch has the classes in their proportions.

    Within a class the order is random; the i-th of n examples of a class is placed at
    (i + 1/2) / n of the whole.

    Args:
        label: Class indices [N].
        seed: Seed of the random order.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(label))
    place = np.empty(len(label))
    for value in np.unique(label):
        members = shuffled[label[shuffled] == value]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def named_splits(
    label: Mapping[str, np.ndarray], seed: int, *, stratified: bool = True
) -> dict[str, np.ndarray]:
    """Returns the indices of each named split into the concatenation of all examples.

    Args:
        label: Labels by the source's own splits, in their order; {'all': ...} for a
            source that has none and is cut here.
        seed: Seed of that cut.
        stratified: Whether the cut keeps the proportions of the classes. Data without
            classes are cut at random, as if all were of one class.
    """
    if set(label) == {"all"}:
        values = label["all"]
        if not stratified or values.ndim > 1:
            values = np.zeros(len(values))
        order = stratified_order(values, seed)
        size = len(order)
        return {
            name: order[round(start * size) : round(stop * size)]
            for name, (start, stop) in CUTS.items()
        }
    ends = np.cumsum([len(values) for values in label.values()])
    return dict(zip(label, np.split(np.arange(ends[-1]), ends[:-1])))


def select(splits: Mapping[str, np.ndarray], text: str, where: str) -> np.ndarray:
    """Returns the indices that a split string names.

    Args:
        splits: From `named_splits`.
        text: Such as `train[:80%]+validation`. Percentages round to the nearest example.
        where: The config key that it comes from, for messages.

    Raises:
        UserError: Wrong syntax, no such split, nothing selected, or something twice.
    """
    chosen = []
    for part in text.replace(" ", "").split("+"):
        match = _PART.fullmatch(part)
        bounds = [] if match is None else [match["start"], match["stop"]]
        if match is None or any(b and not _BOUND.fullmatch(b) for b in bounds):
            raise UserError(
                f"{where}: {part!r} is not a split; write train, train[:80%], "
                "train[100:200] or several joined by +"
            )
        if match["name"] not in splits and match["name"] in CUTS and "train" in splits:
            raise UserError(
                f"{where}: the data has no split {match['name']!r}, but "
                f"{', '.join(sorted(splits))}. None goes without; or cut one off, as in "
                "config.data.train='train[:80%]' and config.data.validation='train[80%:]'"
            )
        indices = registry.choose(splits, match["name"], where)
        start, stop = (_bound(bound, len(indices)) for bound in bounds)
        chosen.append(indices[start:stop])
    selected = np.concatenate(chosen)
    if not len(selected):
        sizes = ", ".join(f"{name} {len(i)}" for name, i in splits.items())
        raise UserError(f"{where}: {text!r} is empty; the splits hold {sizes}.")
    if repeated := len(selected) - len(np.unique(selected)):
        raise UserError(f"{where}: {text!r} names {repeated} examples twice")
    return selected


def _bound(text: str | None, size: int) -> int | None:
    if not text:
        return None
    if not text.endswith("%"):
        return int(text)
    percent = int(text[:-1])
    if not -100 <= percent <= 100:
        raise UserError(f"A split cannot begin or end at {percent}%.")
    return round((percent + 100 * (percent < 0)) * size / 100)


def per_class(
    indices: np.ndarray, label: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Returns `count` of the indices of each class, drawn at random, in their order.

    Args:
        indices: A split.
        label: Class index of each of them.
        count: Examples of each class.
        seed: Seed of the draw.

    Raises:
        UserError: A class has fewer.
    """
    rng = np.random.default_rng(seed)
    keep = np.zeros(len(indices), bool)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        if len(members) < count:
            raise UserError(
                f"config.data.per_class: {count}, but class {value} has only "
                f"{len(members)} training examples"
            )
        keep[rng.permutation(members)[:count]] = True
    return indices[keep]


def choose(
    label: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray] | None,
    config: Mapping[str, Any],
    *,
    stratified: bool = True,
) -> dict[str, np.ndarray]:
    """Returns the indices of the examples of each split that the config names.

    Args:
        label: Labels by the source's own splits.
        groups: The sizes of groups of examples, likewise, which stay together.
        config: The section `config.data`.
        stratified: Whether a cut keeps the proportions of the classes.

    Raises:
        UserError: A split that is wrong or empty.
    """
    splits = named_splits(
        label if groups is None else groups,
        config["split_seed"],
        stratified=stratified and groups is None,
    )
    chosen = {
        key: select(splits, config[key], f"config.data.{key}")
        for key in ("train", "validation", "test")
        if config[key] is not None
    }
    if groups is None:
        return chosen
    sizes = np.concatenate(list(groups.values()))
    return {key: _members(indices, sizes) for key, indices in chosen.items()}


def _members(groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the examples of some groups, in their order.

    Args:
        groups: Indices of groups.
        sizes: How many examples each group has, one group after another.

    >>> _members(np.array([2, 0]), np.array([2, 1, 3])).tolist()
    [3, 4, 5, 0, 1]
    """
    examples = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    return np.concatenate([examples[group] for group in groups])


def overlaps(chosen: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a warning for any two splits that share examples."""
    pairs = (("train", "test"), ("train", "validation"), ("validation", "test"))
    found = []
    for one, other in pairs:
        shared = np.intersect1d(chosen.get(one, ()), chosen.get(other, ()))
        if len(shared):
            found.append(
                f"data.{one} and data.{other} share {len(shared)} examples: what is "
                f"measured on data.{other} says little about new data"
            )
    return found
