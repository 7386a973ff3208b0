"""Feature distillation losses: distance to a teacher's features, one value per example.

Features are maps [B, H, W, C], tokens [B, T, D] or vectors [B, F]. If maps differ in size,
the larger one is averaged over windows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.registry import closest
from finetune_jax.tasks.objectives.losses import widened


def half_square(own: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns half the squared distance, a mean over positions and channels, [B].

    Source: Romero et al. 2015 ("FitNets"), equation 3, there a sum.
    """
    own, teacher = same_size(own, teacher)
    square = jnp.square(widened(own) - widened(teacher))
    return square.mean(axis=tuple(range(1, square.ndim))) / 2


def attention_apart(own: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns the squared distance of attention maps, a mean over positions, [B].

    An attention map is the mean square over channels at each position, with norm 1.

    Source: Zagoruyko & Komodakis 2017, section 3.1, as their code has it:
    https://github.com/szagoruyko/attention-transfer, `at_loss`.
    """
    own, teacher = same_size(own, teacher)
    return jnp.square(_attention(own) - _attention(teacher)).mean(axis=-1)


def _attention(features: jax.Array) -> jax.Array:
    """Returns attention maps [B, positions] of norm 1; zero features give zeros."""
    power = jnp.square(widened(features)).mean(axis=-1)
    power = power.reshape(len(power), -1)
    square = jnp.sum(jnp.square(power), axis=-1, keepdims=True)
    # A root has no gradient at 0. The least norm is that of torch's `normalize`.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return power / jnp.maximum(norm, 1e-12)


def same_size(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two maps with the larger one averaged to the size of the smaller one."""
    shape = [min(a, b) for a, b in zip(one.shape[1:-1], other.shape[1:-1])]
    return _averaged(one, shape), _averaged(other, shape)


def _averaged(features: jax.Array, shape: list[int]) -> jax.Array:
    if list(features.shape[1:-1]) == shape:
        return features
    windows = tuple(have // want for have, want in zip(features.shape[1:-1], shape))
    total = nn.pooling.pool(
        features, 0.0, jax.lax.add, windows, strides=windows, padding="VALID"
    )
    return total / np.prod(windows)


def misfit(own: Any, teacher: Any, *, places: bool) -> str | None:
    """Returns why features of such shapes cannot be compared, or None if they can.

    Args:
        own: Shape of the student's features [B, ...].
        teacher: Shape of the teacher's features.
        places: Whether features must have positions, as attention needs.
    """
    one, other = (getattr(x, "shape", None) for x in (own, teacher))
    if one is None or other is None:
        return "one of the stages returns several arrays"
    if len(one) != len(other) or len(one) < (3 if places else 2):
        needed = "maps or tokens of one kind" if places else "of one kind"
        return f"the model's are {one[1:]}, the teacher's {other[1:]}; not {needed}"
    if any(max(a, b) % min(a, b) for a, b in zip(one[1:-1], other[1:-1])):
        return (
            f"the model's are {one[1:]}, the teacher's {other[1:]}; one size does not "
            "divide the other"
        )
    return None


class Regressors(nn.Module):
    """Linear maps from features to the width of a teacher's, the same at every position.

    Attributes:
        widths: (name, width) of each map.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.

    Source: Romero et al. 2015, section 2.2: a convolution, here of 1x1.
    """

    widths: tuple[tuple[str, int], ...]
    dtype: Any
    param_dtype: Any

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages, one for each map."""
        return tuple(name for name, _ in self.widths)

    @nn.compact
    def __call__(self, x: dict, *, first=None, last=None, train: bool = False) -> dict:
        """Returns features by name, each mapped."""
        del first, last, train
        return {
            name: nn.Dense(
                width, name=name, dtype=self.dtype, param_dtype=self.param_dtype
            )(x[name])
            for name, width in self.widths
        }


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two stages whose features are compared.

    Attributes:
        own: Stage of the student.
        label: Label of the teacher.
        theirs: Stage of the teacher.
    """

    own: str
    label: str
    theirs: str

    @property
    def name(self) -> str:
        """Name of the linear map between them."""
        return f"{self.own}_to_{self.label}_{self.theirs}"


def make_pairs(
    key: str,
    entries: Sequence[Any],
    *,
    own: Mapping[str, Any],
    theirs: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[Pair, ...], list[str]]:
    """Returns the pairs that a key of `config.task` names, and the problems.

    Args:
        key: 'hints' or 'attention'.
        entries: (stage of the student, stage of a teacher), the teacher's with its label
            before it if there are several.
        own: Output shapes of the student's stages, without the last.
        theirs: Output shapes of each teacher's stages.
    """
    pairs, problems = [], []
    for index, entry in enumerate(entries):
        where = f"config.task.{key}[{index}]"
        if not (
            isinstance(entry, tuple)
            and len(entry) == 2
            and all(isinstance(name, str) for name in entry)
        ):
            problems.append(
                f"{where}: {entry!r} is not (stage of the model, stage of a teacher)"
            )
            continue
        label, _, stage = entry[1].rpartition("/")
        if not label and len(theirs) == 1:
            label = next(iter(theirs))
        known = [f"{k}/{s}" for k, shapes in theirs.items() for s in shapes]
        if entry[0] not in own:
            hint = closest(entry[0], own)
            problems.append(
                f"{where}: no stage {entry[0]!r} before the model's head{hint} There are "
                f"{', '.join(own)}."
            )
        elif stage not in theirs.get(label, {}):
            problems.append(
                f"{where}: no stage {entry[1]!r} before a teacher's head"
                f"{closest(entry[1], known) or '.'} There are {', '.join(known)}."
            )
        elif why := misfit(
            own[entry[0]], theirs[label][stage], places=key == "attention"
        ):
            problems.append(f"{where}: features of {entry} cannot be compared: {why}")
        else:
            pairs.append(Pair(entry[0], label, stage))
    if len(set(pairs)) < len(pairs):
        problems.append(f"config.task.{key}: the same pair of stages twice")
    return tuple(pairs), problems


def regressor_widths(
    pairs: Sequence[Pair], own: Mapping[str, Any], theirs: Mapping[str, Mapping]
) -> tuple[tuple[str, int], ...]:
    """Returns (name, width) of each pair whose features differ in width."""
    widths = [(pair, theirs[pair.label][pair.theirs].shape[-1]) for pair in pairs]
    return tuple((p.name, w) for p, w in widths if own[p.own].shape[-1] != w)
