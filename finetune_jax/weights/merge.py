"""The strict merge of weights into a model; all misfits are reported at once."""

import collections
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import like, named
from finetune_jax.core.registry import closest
from finetune_jax.models.peft.lora import UPDATES, is_lora
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.formats.mapped import copied
from finetune_jax.weights.layout import COUNT, OURS, Layout, Place, recognise
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.numbers import Doubts
from finetune_jax.weights.prefixes import without_prefix

# With more misfits the file belongs to another model, and similar names are no hints.
_HINTS = 20
# Most lines about misfits of one kind while training.
_SHOWN = 10


def fresh_in(
    weights: Weights, fresh: Sequence[str], prefix: str = ""
) -> Callable[[str], bool]:
    """Returns a function that tells by its name whether a leaf keeps its initial value.

    Args:
        weights: Weights to load. If they have no low-rank updates, those of the model keep
            their initial values.
        fresh: Regexes of names, without the collection.
        prefix: Prefix of the model in these names, which the leaves do not have.
    """
    kept = fresh if any(map(is_lora, weights.tensors)) else (*fresh, UPDATES)
    before = f"{prefix}/" if prefix else ""
    return lambda name: any(
        re.fullmatch(pattern, before + name.partition("/")[2]) for pattern in kept
    )


def load_weights(
    variables: Mapping[str, Any],
    weights: Weights,
    *,
    fresh: Sequence[str] = (),
    adapt_stem: str | None = None,
    left_out: Sequence[str] = (),
    prefix: str = "",
    accept: Collection[str] | None = (),
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns `variables` with every leaf taken from the weights.

    Args:
        variables: 'params' and 'batch_stats': initial values, or only shapes of those that
            are not `fresh_in` the weights.
        weights: Weights in this project's layout (`params/...`, `batch_stats/...`), or in
            one of `weights.layouts`.
        fresh: Regexes of names, without the collection, that keep their initial value.
        adapt_stem: Name of the first stage, whose kernels are adapted to the model's number
            of channels by their mean, so that grey images give the same outputs. None
            adapts none.
        left_out: Names of variables, with the collection, that the weights may have and
            that are not loaded.
        prefix: Prefix of the model, if it is one of several.
        accept: Kinds of numbers that are taken unchanged, as `config.init.accept`. None
            takes none, and messages name no key.
        model: Name and arguments of the model, such as `config.model`. With it, the model
            is compared with the network that the files beside the weights describe; names
            and shapes of tensors do not tell heads, epsilons or strides.

    Raises:
        UserError: The model is another network than that of the weights. Or lists every
            leaf that the weights lack or have in another shape, every unused tensor,
            numbers that a model of floats does not take, and, without `prefix`, every
            regex in `fresh` that matches nothing.
    """
    if model is not None:
        one = architecture.Described("model", prefix, model, weights.address)
        architecture.check([one], tuple(fresh))
        architecture.named(one, weights.arch, tuple(fresh))
    names = named(dict(variables))
    weights = without_prefix(weights, names)
    saved, doubts = weights.tensors, Doubts(accept)
    layout = recognise(names, saved, weights.address)
    is_fresh = fresh_in(weights, fresh, prefix)
    merged, missing, misfits, used = _merged(
        names,
        weights,
        layout,
        is_fresh=is_fresh,
        stem=adapt_stem,
        doubts=doubts,
    )
    used |= set(layout.names([*names, *left_out]).values()) if left_out else set()
    # In our own layout `fresh` also says which tensors of the file are not wanted.
    unused = [
        name
        for name in sorted(layout.needed(saved) - used)
        if not (layout is OURS and is_fresh(name))
    ]
    fold = (lambda lines: lines) if weights.is_header else _folded
    problems = [*_in_short(missing, unused), *fold(misfits)]
    for lines in _each(missing, unused, saved, names):
        problems += fold(lines)
    everything = [name.partition("/")[2] for name in (*names, *saved)]
    problems += [
        f"config.init.fresh: {pattern!r} matches nothing{closest(pattern, everything)}"
        for pattern in fresh
        if not prefix and not any(re.fullmatch(pattern, name) for name in everything)
    ]
    problems += doubts.problems(len(saved), saved)
    if problems:
        problems += [f"(it was read so: {note})" for note in weights.notes]
        raise UserError(
            *problems,
            header=f"{weights.address} (layout: {layout.name}) does not fit the model"
            f"{f' {prefix!r}' if prefix else ''}:",
            advice="Name what should keep its initial value in config.init.fresh, such as "
            "('head/.*',); config.init.input_channels='adapt' fits a stem to other "
            "channels.",
        )
    return jax.tree.map(np.asarray, like(dict(variables), merged))


def _merged(
    names: Mapping[str, Any],
    weights: Weights,
    layout: Layout,
    *,
    is_fresh: Callable[[str], bool],
    stem: str | None,
    doubts: Doubts,
) -> tuple[dict[str, Any], list[tuple[str, str]], list[str], set[str]]:
    """Returns the leaves by name, missing ones, misfits, and the names of used tensors.

    Args:
        names: The model's leaves at their initial values.
        weights: Weights to load.
        layout: Layout of the weights.
        is_fresh: Whether a leaf keeps its initial value.
        stem: Stage whose kernels are adapted to other channels; None for none.
        doubts: Collects doubtful numbers of the loaded tensors.
    """
    saved, places = weights.tensors, layout.places(names)
    merged, missing, misfits, used = dict(names), [], [], set()
    for name, leaf in names.items():
        place = places.get(name, Place(tensor=name))
        if is_fresh(name):
            used.add(place.tensor)
            continue
        if place.tensor not in saved:
            missing.append((name, place.name))
            continue
        used.add(place.tensor)
        try:
            value = place.value(saved[place.tensor])
        except ValueError:  # Another number of axes, or no equal parts.
            value = saved[place.tensor]
        in_stem = name.startswith(f"params/{stem}/") and value.ndim == 4
        if stem is not None and in_stem and value.shape != leaf.shape:
            value = _other_channels(value, leaf.shape[2])
        if name.endswith(f"/{POSITIONS}"):
            prefix = int(f"{name.removesuffix(POSITIONS)}class_token" in names)
            value = resized(value, leaf.shape[1], prefix)
        if value.shape != leaf.shape:
            misfits.append(
                f"{_both(name, place.name)}: model {leaf.shape}, weights {value.shape}"
                + _more_logits(name, leaf.shape, value.shape)
            )
        dtype, tensor = np.dtype(leaf.dtype), saved[place.tensor]
        if weights.is_header:
            merged[name] = value
            doubts.look(place.tensor, tensor, dtype, np.zeros(()))
            continue
        # Always a copy, as the mapped file may change or be deleted.
        with np.errstate(over="ignore", invalid="ignore"):  # Doubts reports them.
            real = np.real(value) if value.dtype.kind == "c" else value
            merged[name] = copied(real, dtype)
        doubts.look(place.tensor, tensor, dtype, merged[name])
    return merged, missing, misfits, used


def _both(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"{ours} ({theirs})"


def _more_logits(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """Returns a hint for a head with more logits than the data has classes."""
    is_head = re.fullmatch(r"params/(.*/)?head/logits/(kernel|bias)", name)
    if not is_head or ours[:-1] != theirs[:-1] or not ours or ours[-1] > theirs[-1]:
        return ""
    return f"; config.model.classes={theirs[-1]} keeps all logits of the weights"


def _each(
    missing: Sequence[tuple[str, str]],
    unused: Sequence[str],
    saved: Iterable[str],
    names: Iterable[str],
) -> tuple[list[str], list[str]]:
    """Returns lines about missing leaves, and lines about unused tensors."""
    hints = len(missing) + len(unused) <= _HINTS
    left = set(saved) - set(names)
    absent = [
        f"{_both(name, source)}: not in the weights"
        + (closest(source, left) if hints else "")
        for name, source in missing
    ]
    spare = [
        f"{name}: in the weights, but not in the model"
        + (closest(name, names) if hints else "")
        for name in unused
    ]
    return absent, spare


def _folded(lines: Sequence[str]) -> list[str]:
    """Returns the first lines of one kind, and how many more there are."""
    more = len(lines) - _SHOWN
    if more <= 1:
        return [*lines]
    return [
        *lines[:_SHOWN],
        f"... and {more} more of this kind (--mode=plan lists all)",
    ]


def _in_short(missing: Sequence[tuple[str, str]], unused: Sequence[str]) -> list[str]:
    """Returns a summary of a long list."""
    if len(missing) + len(unused) <= _HINTS:
        return []
    return [
        f"{len(missing)} of the model's leaves are not in the weights, and {len(unused)} "
        "tensors of the weights are not in the model: is config.model.name the model "
        "that these weights were made for?"
    ]


def _other_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    mean = kernel.mean(axis=2, keepdims=True) * (kernel.shape[2] / channels)
    return np.repeat(mean, channels, axis=2)


def taken_line(
    variables: Mapping[str, Any],
    weights: Weights,
    layout: Layout,
    is_fresh: Callable[[str], bool],
    prefix: str = "",
) -> str:
    """Returns a line about the loaded arrays, the initial ones, and unused tensors.

    Args:
        variables: 'params' and 'batch_stats' of the model.
        weights: Weights that fit it.
        layout: Layout of the weights.
        is_fresh: Whether a leaf keeps its initial value, by its name.
        prefix: Prefix of the model among several.
    """
    names = list(named(dict(variables)))
    kept = [name.partition("/")[2] for name in names if is_fresh(name)]
    needed = set(layout.names(n for n in names if not is_fresh(n)).values())
    left = [n for n in weights.tensors if n not in needed and not n.endswith(COUNT)]
    line = (
        f"{prefix + ': ' if prefix else ''}{weights.address} (layout: {layout.name}), "
    )
    line += f"{len(names) - len(kept)} of {len(names)} arrays taken"
    if kept:
        line += f"; initial values kept: {_by_first(kept)}"
    return line + (f"; left in the file: {_by_first(left)}" if left else "")


def _by_first(names: Sequence[str]) -> str:
    """Returns the first parts of names, with the number of names of each.

    >>> _by_first(["head/logits/bias", "params/head/logits/kernel", "cls.bias"])
    'head (2), cls (1)'
    """
    plain = [re.sub("^(params|batch_stats)/", "", name) for name in names]
    counts = collections.Counter(re.split("[/.]", name)[0] for name in plain)
    shown = [f"{name} ({number})" for name, number in counts.most_common(6)]
    return ", ".join(shown) + (" and others" if len(counts) > 6 else "")


POSITIONS = "position_embedding"  # Name of these leaves.


def resized(positions_1xTxD: np.ndarray, tokens: int, prefix: int) -> np.ndarray:
    """Returns position embeddings, resized from one square grid of patches to another.

    Grids that are not square or have the right size are returned unchanged.

    Args:
        positions_1xTxD: Embeddings of the class token, if any, and of the patches.
        tokens: Number of tokens after resizing.
        prefix: Number of tokens before the patches: 1 with a class token, otherwise 0.

    Source: timm/layers/pos_embed.py, `resample_abs_pos_embed`: bicubic, antialiased.
    """
    if positions_1xTxD.ndim != 3:
        return positions_1xTxD
    counts = positions_1xTxD.shape[1] - prefix, tokens - prefix
    old, new = (math.isqrt(max(count, 0)) for count in counts)
    if old == new or (old**2, new**2) != counts or not old:
        return positions_1xTxD
    first = positions_1xTxD[:, :prefix]
    grid = positions_1xTxD[0, prefix:].reshape(old, old, -1)
    shares = _shares(old, new)
    found = np.einsum("ih,jw,hwd->ijd", shares, shares, np.asarray(grid, np.float64))
    found = found.astype(grid.dtype).reshape(1, new**2, -1)
    return np.concatenate([first, found], axis=1)


def _shares(old: int, new: int) -> np.ndarray:
    """Returns the weight of each old place in each new one, [new, old].

    Exact and on the host, unlike `jax.image.resize`, which compiles a program.
    Source: Keys 1981, equation 15, widened for smaller grids.
    """
    step = old / new
    centres = (np.arange(new)[:, None] + 0.5) * step
    far = np.abs(np.arange(old) + 0.5 - centres) / max(step, 1)
    near = (1.5 * far - 2.5) * far**2 + 1
    beyond = ((-0.5 * far + 2.5) * far - 4) * far + 2
    shares = np.where(far < 1, near, np.where(far < 2, beyond, 0))
    return shares / shares.sum(axis=1, keepdims=True)
