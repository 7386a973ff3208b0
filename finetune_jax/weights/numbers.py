"""Numbers of weights that are loaded only if `config.init.accept` allows it.

Integers and 8-bit floats are mostly quantised, and wrong without their scales. NaN and
infinity make every prediction NaN.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from finetune_jax.config.schema import ACCEPTED
from finetune_jax.core.errors import listed

KEY = "config.init.accept"
# Names of tensors that quantisation programs add.
_QUANTISED = re.compile(r".*(absmax|quant|qweight|qzeros|SCB|zero_point|_scale(_inv)?)")
_SHOWN = 3


def kind_of(dtype: np.dtype) -> str:
    """Returns 'float', 'float8', 'integer' or 'complex'.

    >>> kind_of(np.dtype("float16")), kind_of(np.dtype(bool))
    ('float', 'integer')
    """
    if dtype.kind == "c":
        return "complex"
    if dtype.kind in "iub":
        return "integer"
    if not jnp.issubdtype(dtype, jnp.floating):
        return "other"
    return "float8" if dtype.itemsize == 1 else "float"


def is_finite(array: np.ndarray) -> bool:
    """Returns whether no number is NaN or infinite."""
    if kind_of(array.dtype) == "integer" or not array.size:
        return True
    # The sum needs no second array, but can be infinite also for finite numbers.
    with np.errstate(all="ignore"):
        total = np.sum(array)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


class Doubts:
    """Loaded tensors with doubtful numbers.

    Args:
        accept: Kinds of numbers that are accepted, as `config.init.accept`; None accepts
            none, and messages name no key.
    """

    def __init__(self, accept: Collection[str] | None):
        """Starts without tensors."""
        self._accept = accept
        self._found: dict[tuple[str, str], list[str]] = {}

    def look(
        self, name: str, saved: np.ndarray, dtype: np.dtype, loaded: np.ndarray
    ) -> None:
        """Checks a loaded tensor.

        Args:
            name: Name of the tensor in the file.
            saved: Tensor in the file.
            dtype: Dtype of the model's leaf.
            loaded: The leaf.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            return
        kind = kind_of(saved.dtype)
        if kind != "float":
            self._found.setdefault((kind, saved.dtype.name), []).append(name)
        elif not is_finite(loaded):
            self._found.setdefault(("nan", "not finite"), []).append(name)

    def problems(self, total: int, names: Iterable[str]) -> list[str]:
        """Returns a line for each kind of numbers that is not accepted.

        Args:
            total: Number of tensors in the file.
            names: Names of the tensors in the file.
        """
        return [
            self._line(kind, dtype, found, total, names)
            for (kind, dtype), found in self._found.items()
            if kind not in (self._accept or ())
        ]

    def _line(
        self, kind: str, dtype: str, found: list[str], total: int, names: Iterable[str]
    ) -> str:
        found = list(dict.fromkeys(found))
        shown = listed((name[:100] for name in found), _SHOWN)
        told = {
            "nan": "have NaN or infinite numbers",
            "complex": f"have complex numbers ({dtype}), and the model has floats",
        }.get(kind, f"are {dtype}, and the model has floats")
        line = f"{len(found)} of {total} tensors {told}: {shown}"
        if kind in ("integer", "float8"):
            is_told = any(map(_QUANTISED.fullmatch, names))
            line += (
                "; these weights are quantised" if is_told else "; quantised weights?"
            )
            line += ": take those that are not"
        if self._accept is None or kind not in ACCEPTED:
            return line
        return f"{line}. {KEY}=({kind!r},) takes them as they are"


def told_of_numbers(
    address: str, tensors: Mapping[str, np.ndarray], precision: str
) -> list[str]:
    """Returns lines about the dtypes of weights.

    Args:
        address: Address of the weights.
        tensors: Tensors by name.
        precision: Precision of the run's computation.
    """
    kinds = [tensor.dtype for tensor in tensors.values()]
    names = [dtype.name for dtype in kinds if kind_of(dtype) in ("float", "float8")]
    lines = []
    for name in sorted(set(names) - {"float32", precision}):
        told = "have no more digits for it"
        if name == "float64":
            told = "lose digits"
        lines.append(
            f"{address}: {names.count(name)} of {len(kinds)} tensors are {name}; they "
            f"become float32, and {told}"
        )
    return lines


def told_of_accepted(
    address: str, tensors: Mapping[str, np.ndarray], accept: Collection[str]
) -> list[str]:
    """Returns a line about integers that are loaded unchanged.

    Args:
        address: Address of the weights.
        tensors: Tensors by name.
        accept: `config.init.accept`.
    """
    if "integer" not in accept:
        return []
    found = [
        name
        for name, tensor in tensors.items()
        if kind_of(tensor.dtype) == "integer" and tensor.ndim
    ]
    shown = listed((name[:100] for name in found), _SHOWN)
    told = f"{address}: {len(found)} tensors of integers are taken as they are: {shown}"
    return [told] if found else []
