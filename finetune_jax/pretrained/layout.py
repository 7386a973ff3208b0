"""A layout: what the tensors of a published weight file are called, and how they lie."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from finetune_jax import lookup
from finetune_jax.errors import UserError

# Ours, without the collection that it says; theirs are torch's.
_LEAVES = {
    "params/kernel": "weight",
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
}
_FIELD = re.compile(r"\{(\w)([+-]\d+)?\}")
_BLOCK = re.compile(r"(stage\d+/block\d+)/")
# A count that torch keeps beside running averages; nothing here needs it.
_NEEDLESS = re.compile(r"(.*\.)?num_batches_tracked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A name table between our modules and those of a published layout.

    Attributes:
        name: For messages.
        rows: (our module, theirs), the first that matches counts. `{s}` stands for a
            number, `{s-1}` for the same less one, and `{n}` for the number of blocks
            before this one over all stages.
    """

    name: str
    rows: tuple[tuple[str, str], ...]

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str]]:
        return [
            (re.compile(_FIELD.sub(r"(?P<\1>\\d+)", ours)), theirs)
            for ours, theirs in self.rows
        ]

    def names(self, ours: Iterable[str]) -> dict[str, str]:
        """Returns their name of each of our leaves that the table knows.

        Args:
            ours: Such as 'params/stem/conv/kernel', all leaves of a model.
        """
        ours = list(ours)
        blocks = sorted(
            {match[1] for name in ours if (match := _BLOCK.search(name))},
            key=lambda block: [int(n) for n in re.findall(r"\d+", block)],
        )
        places = {block: index for index, block in enumerate(blocks)}
        found = {}
        for name in ours:
            collection, _, path = name.partition("/")
            module, _, leaf = path.rpartition("/")
            kind = _LEAVES.get(f"{collection}/{leaf}")
            theirs = self._module(module, places)
            if kind and theirs:
                found[name] = f"{theirs}.{kind}"
        return found

    def _module(self, module: str, places: Mapping[str, int]) -> str | None:
        for pattern, theirs in self._patterns:
            if match := pattern.fullmatch(module):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                if block := _BLOCK.match(f"{module}/"):
                    numbers["n"] = places[block[1]]
                return _filled(theirs, numbers)
        return None

    def value(self, ours: str, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor as we keep it: kernels end with [input, output] channels."""
        if ours.endswith("/kernel") and tensor.ndim == 4:
            return tensor.transpose(2, 3, 1, 0)
        if ours.endswith("/kernel") and tensor.ndim == 2:
            return tensor.T
        return tensor


def _filled(template: str, numbers: Mapping[str, int]) -> str:
    return _FIELD.sub(
        lambda field: str(numbers[field[1]] + int(field[2] or 0)), template
    )


class OurLayout(Layout):
    """The layout of this project's own files: the names of the model."""

    def names(self, ours: Iterable[str]) -> dict[str, str]:
        """Returns every name as it is."""
        return {name: name for name in ours}

    def value(self, ours: str, tensor: np.ndarray) -> np.ndarray:
        """Returns the tensor."""
        del ours
        return tensor


OURS = OurLayout(name="finetune_jax", rows=())


def layouts() -> list[Layout]:
    """Returns all layouts, this project's own first."""
    from finetune_jax.pretrained import layouts as package

    found = [layout for m in lookup.modules(package).values() for layout in m.LAYOUTS]
    return [OURS, *found]


def recognise(ours: Iterable[str], theirs: Iterable[str], where: str) -> Layout:
    """Returns the layout in which the names of a file cover most of the model's.

    Args:
        ours: All leaves of the model.
        theirs: All names in the file.
        where: The address, for the message.

    Raises:
        UserError: No layout has a name in common.
    """
    ours, theirs = list(ours), set(theirs)
    known = layouts()
    shared = [len(theirs & set(layout.names(ours).values())) for layout in known]
    if not max(shared):
        some = ", ".join(sorted(theirs)[:3])
        raise UserError(
            f"config.init.pretrained: {where} has {len(theirs)} tensors ({some}, ...), "
            "none of which this model has in any layout that is known: "
            f"{', '.join(layout.name for layout in known)}."
        )
    return known[shared.index(max(shared))]


def needed(names: Iterable[str]) -> set[str]:
    """Returns the names in a file without those that no layout needs."""
    return {name for name in names if not _NEEDLESS.fullmatch(name)}
