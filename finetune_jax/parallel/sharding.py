"""Sharding rules: over which axes of the mesh the axes of each parameter are divided.

A rule is a pair (regex, spec). The regex is matched against the full name of a parameter,
such as `block1/attention/query/kernel`, and the first rule that matches decides. A spec is

- a tuple with one entry for each axis of the parameter: an axis of the mesh or None;
- 'fsdp': the longest axis that the devices of 'fsdp' divide, if the array is not small;
- 'replicated': every device has the whole array.

A parameter that no rule matches, and an array that is no parameter, has the spec 'fsdp'.
The optimizer's state, averages and fixed arrays are sharded like the parameter whose name
ends theirs. Config files import this module, so it must not start jax.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from finetune_jax.core.errors import Problem
from finetune_jax.core.registry import closest

# The axes of the mesh. Batches are divided over the first two.
DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")
REPLICATED = "replicated"
KEY = "config.parallel.sharding"
MIB = 2**20

# An axis of the mesh or None for each axis of a parameter, or 'fsdp' or 'replicated'.
Spec = str | tuple[str | None, ...]


def _megatron(columns: str, rows: str) -> tuple[tuple[str, Spec], ...]:
    """Returns the rules of pairs of dense layers with one sum over 'model' for a pair.

    Source: Shoeybi et al. 2019, section 3.

    Args:
        columns: Regex over the first layers, whose outputs are divided: heads, or hidden
            units.
        rows: Regex over the second layers, whose inputs are divided.
    """
    return (
        (rf"(.*/)?block\d+/({columns})/kernel", (FSDP, MODEL)),
        (rf"(.*/)?block\d+/({rows})/kernel", (MODEL, FSDP)),
    )


def _biases(columns: str) -> tuple[tuple[str, Spec], ...]:
    return ((rf"(.*/)?block\d+/({columns})/bias", (MODEL,)),)


_BLOCK = r"attention/(query|key|value)|dense1"
_REST: tuple[tuple[str, Spec], ...] = ((".*", FSDP),)
# Rules of tensor parallelism by family of models, for `config.parallel.sharding`.
# Embeddings are left to 'fsdp': 4 does not divide BERT's vocabulary of 30,522 words.
TENSOR_PARALLEL: Mapping[str, tuple[tuple[str, Spec], ...]] = {
    "bert": (*_megatron(_BLOCK, "attention/output|dense2"), *_biases(_BLOCK), *_REST),
    "vit": (*_megatron(_BLOCK, "attention/out|dense2"), *_biases(_BLOCK), *_REST),
    # Names as in vit, and 'gate', 'up' and 'down' for the gated layers, all without bias.
    # There is no such model yet.
    "llama": (
        *_megatron(r"attention/(query|key|value)|gate|up", "attention/out|down"),
        *_REST,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """The sharding rules of a run.

    Attributes:
        rules: Pairs (regex, spec); the first that matches decides.
        min_bytes: Size of the smallest array that the spec 'fsdp' divides.
        names: Names of the parameters; without them every array has the spec 'fsdp'.
    """

    rules: tuple[tuple[str, Spec], ...] = ()
    min_bytes: float = 4 * MIB
    names: frozenset[str] = frozenset()

    def axes(
        self, name: str, leaf: Any, sizes: Mapping[str, int]
    ) -> tuple[str | None, ...]:
        """Returns the mesh axis that divides each axis of an array.

        Args:
            name: Name of the array in its tree, which may end in that of a parameter.
            leaf: Array, or its shape and dtype.
            sizes: Number of devices along each axis of the mesh.
        """
        shape = np.shape(leaf)
        spec = self._spec(name)
        if spec == REPLICATED:
            return (None,) * len(shape)
        # Factored statistics of an optimizer have other shapes than their parameter.
        if isinstance(spec, tuple) and len(spec) == len(shape):
            if all(
                axis is None or n % sizes[axis] == 0 for n, axis in zip(shape, spec)
            ):
                return spec
        return self._longest(shape, leaf, sizes[FSDP])

    def _spec(self, name: str) -> Spec:
        parts = name.split("/")
        for first in range(len(parts)):
            if (parameter := "/".join(parts[first:])) in self.names:
                return spec_of(self.rules, parameter)
        return FSDP

    def _longest(
        self, shape: tuple[int, ...], leaf: Any, parts: int
    ) -> tuple[str | None, ...]:
        axes: list[str | None] = [None] * len(shape)
        if parts == 1 or math.prod(shape) * leaf.dtype.itemsize < self.min_bytes:
            return tuple(axes)
        divisible = [axis for axis, n in enumerate(shape) if n and n % parts == 0]
        if divisible:
            axes[max(divisible, key=lambda axis: shape[axis])] = FSDP
        return tuple(axes)


def spec_of(rules: tuple[tuple[str, Spec], ...], parameter: str) -> Spec:
    """Returns the spec of a parameter by the first rule that matches its name.

    >>> spec_of(((".*/bias", "replicated"), (".*", "fsdp")), "head/bias")
    'replicated'
    """
    matching = (spec for regex, spec in rules if re.fullmatch(regex, parameter))
    return next(matching, FSDP)


def rule_problems(rules: tuple[Any, ...]) -> list[Problem]:
    """Returns what is wrong with rules, whatever the parameters are.

    Args:
        rules: Value of `config.parallel.sharding`.
    """
    return [
        Problem(f"{KEY}[{index}]", text)
        for index, rule in enumerate(rules)
        for text in _rule_problems(rule)
    ]


def _rule_problems(rule: Any) -> Iterator[str]:
    if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[0], str):
        yield f"{rule!r} is not a pair (regex, spec), such as ('.*', 'fsdp')"
        return
    regex, spec = rule
    try:
        re.compile(regex)
    except re.error as error:
        yield f"{regex!r} is not a regular expression: {error}"
    if spec in (FSDP, REPLICATED):
        return
    if not isinstance(spec, tuple):
        yield (
            f"{spec!r} is not 'fsdp', 'replicated' or a tuple of {', '.join(AXES)} and "
            f"None{closest(str(spec), (FSDP, REPLICATED))}"
        )
        return
    for axis in dict.fromkeys(spec):
        if axis is not None and axis not in AXES:
            hint = closest(str(axis), AXES)
            yield f"no axis {axis!r}{hint or '.'} There are {', '.join(AXES)} and None"
        elif axis is not None and spec.count(axis) > 1:
            yield f"{spec} divides two axes over {axis!r}; name it once"


def parameter_problems(
    rules: tuple[tuple[str, Spec], ...],
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, int],
) -> list[Problem]:
    """Returns the rules that do not fit the parameters of a run.

    Args:
        rules: Rules without other problems.
        sizes: Number of devices along each axis of the mesh.
        shapes: Shape of each parameter, by name.
        heads: Number of attention heads of each stage that has some.
    """
    problems: list[Problem] = []
    taken: set[str] = set()
    for index, (regex, spec) in enumerate(rules):
        key = f"{KEY}[{index}]"
        found = [name for name in shapes if re.fullmatch(regex, name)]
        if not found:
            hint = closest(regex, shapes)
            problems.append(Problem(key, f"{regex!r} matches no parameter{hint}"))
        for name in found:
            if name not in taken and isinstance(spec, tuple):
                text = _misfit(name, shapes[name], spec, sizes, heads)
                problems += [Problem(key, text)] if text else []
        taken.update(found)
    return problems


def _misfit(
    name: str,
    shape: tuple[int, ...],
    spec: tuple[str | None, ...],
    sizes: Mapping[str, int],
    heads: Mapping[str, int],
) -> str | None:
    """Returns why a spec does not fit a parameter, or None if it does."""
    if len(spec) != len(shape):
        return f"{spec} has {len(spec)} entries, but {name} has the shape {shape}"
    for axis, n in zip(spec, shape):
        if axis is not None and n % sizes[axis]:
            return (
                f"{sizes[axis]} devices of {axis!r} do not divide {n} in {name}, which "
                f"has the shape {shape}; change config.parallel.{axis}"
            )
    stage = name.partition("/attention/")[0]
    if MODEL in spec and stage != name and heads.get(stage, 0) % sizes[MODEL]:
        return (
            f"{sizes[MODEL]} devices of 'model' do not divide the {heads[stage]} "
            f"attention heads of {stage}; change config.parallel.model"
        )
    return None
