"""LoRA: low-rank updates of kernels.

A kernel W of any layer is read as a matrix [inputs, outputs], where the places of a
convolution count as inputs, and becomes W + alpha / rank * A B. The leaves `lora_a` and
`lora_b` are siblings of `kernel`, and ordinary parameters for rules, optimizers and
checkpoints. Merged kernels run as fast as plain ones in any layer. The gradients of A and
B are computed from that of the kernel, so an update costs as much as one of all kernels;
LoRA saves optimizer state and storage.

Source: Hu et al. 2021, section 4.1; the initial values are those of its code
(github.com/microsoft/LoRA): A as in a dense layer of torch, B zero.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import collected, raise_if
from finetune_jax.core.pytrees import named
from finetune_jax.core.registry import check_regex, closest

LEAVES = ("lora_a", "lora_b")
UPDATES = "(.*/)?lora_[ab]"  # Regex for the full names of A and B.
# Attention layers whose kernels [D, N, H] have one input axis and several output axes. All
# other kernels have one output axis, the last.
_SPLIT = ("query", "key", "value", "qkv")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A model with low-rank updates; tasks use it like the model.

    Attributes:
        module: The model.
        rank: Rank of the updates.
        alpha: Updates are scaled by alpha / rank.
        targets: Regexes for the full names of kernels with an update.
    """

    module: nn.Module
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the model."""
        return self.module.stages  # type: ignore[attr-defined]

    @property
    def param_dtype(self) -> Any:
        """Dtype of the model's parameters."""
        return self.module.param_dtype  # type: ignore[attr-defined]

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the initial variables of the model and of the updates.

        Raises:
            UserError: A target matches no kernel, or the rank exceeds a kernel's.
        """
        variables = self.module.init(rngs, *args, **kwargs)
        rng = rngs["params"] if isinstance(rngs, Mapping) else rngs
        kernels = {
            name: leaf
            for name, leaf in named(variables["params"]).items()
            if name.endswith("/kernel") and leaf.ndim >= 2
        }
        targeted = [
            name
            for name in kernels
            if any(re.fullmatch(target, name) for target in self.targets)
        ]
        self._check(kernels, targeted)
        params = variables["params"]
        for name in targeted:
            key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            a, b = _initial(key, name, kernels[name], self.rank)
            params = _beside(params, name.split("/"), dict(zip(LEAVES, (a, b))))
        return {**variables, "params": params}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the model with merged parameters."""
        params = merge(variables.get("params", {}), alpha=self.alpha)
        return self.module.apply({**variables, "params": params}, *args, **kwargs)

    def _check(self, kernels: Mapping[str, Any], targeted: list[str]) -> None:
        unmatched = [
            target
            for target in self.targets
            if not any(re.fullmatch(target, name) for name in kernels)
        ]
        problems = [
            f"config.model.lora_targets: {target!r} matches no kernel"
            + closest(target, kernels)
            for target in unmatched
        ]
        for name in targeted:
            inputs, outputs = _sides(name, kernels[name].shape)
            if self.rank > min(inputs, outputs):
                problems.append(
                    f"config.model.lora_rank: {self.rank}, but {name} is a matrix of "
                    f"{inputs} x {outputs}"
                )
        raise_if(
            problems,
            "LoRA does not fit the model:",
            f"The kernels are: {', '.join(kernels)}."
            if unmatched
            else "Lower the rank, or leave these out by config.model.lora_targets.",
        )


def with_lora(
    module: nn.Module,
    *,
    lora_rank: int = 0,
    lora_alpha: float = 1.0,
    lora_targets: tuple[str, ...] = (r"(?!head/).*",),
) -> nn.Module:
    """Returns the model with low-rank updates; with rank 0, the model itself.

    Args:
        module: The model.
        lora_rank: Rank of the updates.
        lora_alpha: Updates are scaled by alpha / rank.
        lora_targets: Regexes for the full names of kernels, such as
            'stage1/dense/kernel', without the prefix that a task gives its models.

    Raises:
        UserError: Lists every argument that is out of range.
    """
    problems: list[Any] = []
    if lora_rank < 0:
        problems.append(f"config.model.lora_rank: {lora_rank}; 0 or more is needed")
    if lora_alpha <= 0:
        problems.append(f"config.model.lora_alpha: {lora_alpha}; not above 0")
    if not lora_targets:
        problems.append("config.model.lora_targets: empty; lora_rank=0 has no LoRA")
    for target in lora_targets:
        with collected(problems):
            check_regex(target, "config.model.lora_targets")
    raise_if(problems, "config.model does not fit:")
    if not lora_rank:
        return module
    # LoRA is no module, but has all attributes of one that tasks use.
    return LoRA(module, lora_rank, lora_alpha, tuple(lora_targets))  # type: ignore


def merge(params: Mapping[str, Any], *, alpha: float) -> dict[str, Any]:
    """Returns the parameters of the plain model that computes the same.

    Args:
        params: Parameters of a model, or of some of its stages.
        alpha: `lora_alpha` of the model.
    """
    merged = {
        name: merge(leaf, alpha=alpha) if isinstance(leaf, Mapping) else leaf
        for name, leaf in params.items()
        if name not in LEAVES
    }
    if LEAVES[0] in params:
        a, b = (params[name] for name in LEAVES)
        # Cheap compared with the layer, and the same on every device.
        product = jnp.tensordot(a, b, axes=1, precision="highest")
        merged["kernel"] = params["kernel"] + alpha / a.shape[-1] * product
    return merged


def is_lora(name: str) -> bool:
    """Returns whether a parameter is part of a low-rank update.

    >>> is_lora("params/stage1/dense/lora_a"), is_lora("params/stage1/dense/kernel")
    (True, False)
    """
    return re.fullmatch(UPDATES, name) is not None


def _split(name: str, shape: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Returns the shape of a kernel's input axes and that of its output axes.

    >>> _split("block1/conv/kernel", (3, 3, 16, 32))
    ((3, 3, 16), (32,))
    >>> _split("attention/query/kernel", (64, 4, 16))
    ((64,), (4, 16))
    """
    inputs = 1 if name.split("/")[-2] in _SPLIT else len(shape) - 1
    return shape[:inputs], shape[inputs:]


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    inputs, outputs = _split(name, shape)
    return int(np.prod(inputs)), int(np.prod(outputs))


def _initial(
    rng: jax.Array, name: str, kernel: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    inputs, outputs = _split(name, kernel.shape)
    bound = 1 / np.sqrt(np.prod(inputs))
    shape = (*inputs, rank)
    a = jax.random.uniform(rng, shape, kernel.dtype, minval=-bound, maxval=bound)
    return a, jnp.zeros((rank, *outputs), kernel.dtype)


def _beside(tree: Any, path: list[str], leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree with `leaves` added as siblings of the one at `path`."""
    if len(path) == 1:
        return {**tree, **leaves}
    return {**tree, path[0]: _beside(tree[path[0]], path[1:], leaves)}
