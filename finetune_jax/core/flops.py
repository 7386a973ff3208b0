"""Floating-point operations of a traced program, counted without lowering it."""

import functools
import math
from collections.abc import Iterator
from typing import Any

# These move or make values, or find places, and compute nothing.
_FREE = frozenset({
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "dynamic_slice",
    "dynamic_update_slice", "gather", "iota", "pad", "reshape", "rev", "scatter",
    "slice", "split", "squeeze", "stack", "stop_gradient", "transpose", "pbroadcast",
    "pvary",
})  # fmt: skip
_WINDOWS = frozenset({"reduce_window_max", "reduce_window_sum", "select_and_scatter_add",
                      "select_and_gather_add", "reduce_window"})  # fmt: skip


def count_flops(jaxpr: Any) -> float:
    """Returns the operations of a program: a multiplication and an addition are two.

    Convolutions count the products that are not with padding or holes, reductions what
    they take, all else a value that it makes. XLA counts the same but for exponentials
    and the like, which it counts apart.

    Args:
        jaxpr: Jaxpr of the program, such as `jax.jit(f).trace(...).jaxpr`.
    """
    needed = {id(variable) for variable in jaxpr.outvars}
    total = 0.0
    # XLA does not compute unused values.
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed |= {id(variable) for variable in equation.invars}
            total += _equation(equation)
    return total


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    sizes = [math.prod(v.aval.shape) for v in equation.outvars]
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    if inner := list(inner_programs(params)):
        return params.get("length", 1) * sum(map(count_flops, inner))
    if name in _FREE:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * sizes[0] * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return 2.0 * _products(equation)
    if name in _WINDOWS:
        # The gradient is as large as what the windows gave, or they gave the output.
        number = min(
            math.prod(v.aval.shape) for v in equation.invars + equation.outvars
        )
        return float(number * math.prod(params["window_dimensions"]))
    if name.startswith(("reduce_", "arg", "cum", "scatter")):
        return float(max(math.prod(v.aval.shape) for v in equation.invars))
    return float(sizes[0])


def inner_programs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs that an equation runs."""
    for name, value in params.items():
        # Those of a custom gradient that has not been asked for are functions.
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            if name != "cond_jaxpr":
                yield getattr(value, "jaxpr", value)


def _products(equation: Any) -> float:
    """Returns the number of products of a convolution."""
    params = equation.params
    lhs, rhs, out = params["dimension_numbers"]
    x, kernel = (v.aval.shape for v in equation.invars)
    y = equation.outvars[0].aval.shape
    places = 1
    for axis in range(len(lhs) - 2):
        places *= _places(
            x[lhs[2 + axis]],
            kernel[rhs[2 + axis]],
            y[out[2 + axis]],
            params["window_strides"][axis],
            params["padding"][axis][0],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
    inputs = x[lhs[1]] / params["feature_group_count"]
    return places * inputs * y[out[1]] * x[lhs[0]] / params["batch_group_count"]


@functools.cache
def _places(
    size: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int
) -> int:
    """Returns the pairs (place of the output, place of the kernel) that meet a value."""
    end = (size - 1) * holes

    def meets(of_out: int, of_kernel: int) -> bool:
        place = of_out * stride - pad + of_kernel * spread
        return 0 <= place <= end and place % holes == 0

    return sum(meets(o, k) for o in range(out) for k in range(kernel))
