"""Common prefixes of names in a weight file, such as `model.` of a Lightning module."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.formats.entries import is_averaged
from finetune_jax.weights.layout import OURS, Layout, layouts

# Most parts of a prefix; `module.model.backbone.` has three.
_MOST_PARTS = 5
# The model's last layer, which wrappers keep outside of the backbone.
_HEAD = ("params/head/logits/kernel", "params/head/logits/bias")


class _Fit(NamedTuple):
    """Names without a prefix, and the number of them that a layout has."""

    shared: int
    names: dict[str, str]
    told: str


def without_prefix(weights: Weights, ours: Iterable[str]) -> Weights:
    """Returns weights without a prefix that no layout has.

    Weights whose names fit a layout better with the prefix are returned unchanged.

    Args:
        weights: Weights of any layout.
        ours: Names of all leaves of the model.
    """
    ours, theirs = list(ours), list(weights.tensors)
    tables = [(layout, layout.names(ours)) for layout in layouts()]
    best = _shared(tables, theirs)
    if best * 2 > len(ours):
        return weights
    found: _Fit | None = None
    for prefix in _prefixes(theirs):
        for fit in _fits(tables, theirs, prefix):
            if fit.shared > best:
                best, found = fit.shared, fit
    if found is None:
        return weights
    kept = found.names
    tensors = {kept[name]: t for name, t in weights.tensors.items() if name in kept}
    place = weights.address.partition(":")[2].rpartition("/")[2] or weights.address
    notes = (*weights.notes, f"{place}: {found.told}")
    return dataclasses.replace(weights, tensors=tensors, notes=notes)


def _shared(
    tables: Sequence[tuple[Layout, Mapping[str, str]]], theirs: Iterable[str]
) -> int:
    known = set(theirs)
    return max(len(known & set(names.values())) for _, names in tables)


def _prefixes(theirs: Sequence[str]) -> list[str]:
    """Returns the prefixes of at least a quarter of all names, averaged weights last."""
    counts: collections.Counter[str] = collections.Counter()
    for name in theirs:
        for sign in (".", "/"):
            parts = name.split(sign)[:-1][:_MOST_PARTS]
            counts.update(
                sign.join(parts[: index + 1]) + sign for index in range(len(parts))
            )
    common = [prefix for prefix, count in counts.items() if count * 4 >= len(theirs)]
    return sorted(common, key=lambda prefix: (_is_averaged(prefix), len(prefix)))


def _is_averaged(name: str) -> bool:
    return any(map(is_averaged, re.split("[./]", name)))


def _fits(
    tables: Sequence[tuple[Layout, Mapping[str, str]]],
    theirs: Sequence[str],
    prefix: str,
) -> Iterable[_Fit]:
    """Yields ways to remove a prefix; names without it may belong to the head."""
    others = [name for name in theirs if not name.startswith(prefix)]
    names = {name: name.removeprefix(prefix) for name in theirs}
    whole, averaged = f"left out the prefix {prefix!r} of", ""
    if not others:
        yield _Fit(_shared(tables, names.values()), names, f"{whole} all names")
        return
    # As for checkpoints with entries, raw weights are the default.
    mean = [] if _is_averaged(prefix) else [n for n in others if _is_averaged(n)]
    if mean:
        entry = re.split("[./]", mean[0])[0]
        averaged = f"; left out {len(mean)} averaged tensors, which "
        averaged += f"config.init.entry={entry!r} takes"
        others = [name for name in others if not _is_averaged(name)]
        names = {name: names[name] for name in theirs if name not in set(mean)}
    for layout, ours in tables:
        heads = {} if layout is OURS else _as_head(others, ours)
        if set(heads.values()) & set(names.values()):
            heads = {}  # The model has one already.
        renamed = {**names, **heads}
        if len(set(renamed.values())) < len(renamed):
            continue
        told = f"{whole} {len(names) - len(others)} of {len(theirs)} names"
        if heads:
            told += f"; took {' and '.join(map(repr, heads))} as the head"
        elif others and not set(others) <= set(ours.values()):
            told += f"; config.init.entry={prefix.rstrip('./')!r} takes these alone"
        shared = len(set(renamed.values()) & set(ours.values()))
        yield _Fit(shared, renamed, told + averaged)


def _as_head(others: Sequence[str], ours: Mapping[str, Any]) -> dict[str, str]:
    """Returns a layout's names of the head by the file's, if one layer can be the head."""
    modules = {name.rpartition(".")[0] for name in others}
    leaves = [name for name in others if name.rpartition(".")[2] in ("weight", "bias")]
    heads = [ours[leaf] for leaf in _HEAD if leaf in ours]
    if len(modules) != 1 or len(leaves) != len(others):
        return {}
    by_leaf = {name.rpartition(".")[2]: name for name in heads}
    found = {name: by_leaf.get(name.rpartition(".")[2], "") for name in others}
    return found if all(found.values()) else {}
