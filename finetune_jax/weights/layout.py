"""Layouts: names and axes of the tensors in published weight files."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError

# Our leaves by collection, and torch's names for them.
_LEAVES = {
    "params/kernel": "weight",
    "params/embedding": "weight",
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
}
_FIELD = re.compile(r"\{([^{}]+)\}")
_NUMBER = re.compile(r"\{[^{}]+\}|\d+")
_TERM = re.compile(r"([+-]?)(\d*)([a-z]?)")
_BLOCK = re.compile(r"(stage\d+/block\d+)/")
_PART = re.compile(r"(?P<tensor>.*)\[(?P<part>\d+)/(?P<parts>\d+)\]")
# Batch counter of torch's BatchNorms, which our models do not have.
COUNT = "num_batches_tracked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A conversion between a tensor of a file and a leaf of our model.

    Attributes:
        ours: Returns the leaf of a tensor.
        theirs: Returns the tensor of a leaf; the inverse.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


# Our kernels end with [input, output] channels; torch's begin with [output, input].
_KERNEL = Turn(
    ours=lambda a: a.transpose(*range(2, a.ndim), 1, 0),
    theirs=lambda a: a.transpose(-1, -2, *range(a.ndim - 2)),
)
_AS_IT_IS = Turn(ours=lambda a: a, theirs=lambda a: a)

Row = tuple[str, str] | tuple[str, str, Turn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a leaf of our model in a file.

    Attributes:
        tensor: Name of the tensor.
        part: Number of the leaf among the `parts` of the tensor, from 0.
        parts: Number of leaves in the tensor, equal parts along its first axis.
        turn: Conversion between the part and the leaf.
    """

    tensor: str
    part: int = 0
    parts: int = 1
    turn: Turn = _AS_IT_IS

    @property
    def name(self) -> str:
        """Name of the tensor, with the part of it."""
        return self.tensor + (f"[{self.part}/{self.parts}]" if self.parts > 1 else "")

    def value(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the leaf of our model.

        Raises:
            ValueError: The tensor does not have the axes or the parts.
        """
        length = len(tensor) if tensor.ndim else 1
        if self.parts > 1:
            if length % self.parts:
                raise ValueError(f"{tensor.shape} are not {self.parts} equal parts")
            length //= self.parts
            tensor = tensor[self.part * length : (self.part + 1) * length]
        return self.turn.ours(tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A name table between our modules and those of a published layout.

    Attributes:
        name: Name for messages and for `--layout`; workdirs store it.
        rows: Pairs (ours, theirs); the first that matches counts. Both are modules, or
            both are leaves: `("stem/class_token", "cls_token")`. `{s}` stands for a
            number, `{2s-1}` for a number computed from it, and `{n}` for the number of
            blocks before this one in all stages. Theirs may end with `[0/3]`: ours is the
            first of three equal parts. A third entry is the `Turn` of kernels with other
            axes than torch's.
        needless: Regexes of tensors that a model does not need; exports keep them.
    """

    name: str
    rows: Sequence[Row]
    needless: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Words of the name, which include the libraries."""
        return [word for word in self.name.replace("'", "").split() if word != "or"]

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[int, re.Pattern, str, Turn | None]]]:
        """Rows with their positions, by our names without numbers."""
        found: dict[str, list] = {}
        for index, (ours, theirs, *turn) in enumerate(self.rows):
            pattern = re.compile(_FIELD.sub(r"(?P<\1>\\d+)", ours))
            row = index, pattern, theirs, (*turn, None)[0]
            found.setdefault(_NUMBER.sub("", ours), []).append(row)
        return found

    def places(self, ours: Iterable[str]) -> dict[str, Place]:
        """Returns the places of our leaves, without those that the table lacks.

        Args:
            ours: Names of all leaves of a model, such as 'params/stem/conv/kernel'.
        """
        ours = list(ours)
        blocks = sorted(
            {match[1] for name in ours if (match := _BLOCK.search(name))},
            key=lambda block: [int(n) for n in re.findall(r"\d+", block)],
        )
        before = {block: index for index, block in enumerate(blocks)}
        found = {name: self._place(name, before) for name in ours}
        return {name: place for name, place in found.items() if place}

    def names(self, ours: Iterable[str]) -> dict[str, str]:
        """Returns the tensors of our leaves, without those that the table lacks."""
        return {name: place.tensor for name, place in self.places(ours).items()}

    def tensors(
        self,
        leaves: Mapping[str, np.ndarray],
        original: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the tensors of a file in this layout.

        Args:
            leaves: All leaves of a model, by our names.
            original: Tensors of the file that the model was loaded from. Those that no
                model needs are copied from it. Without it, batch counters are 0, and the
                other unneeded tensors are left out.

        Raises:
            UserError: Lists the leaves that this layout has no name for.
        """
        places = self.places(leaves)
        if lacking := sorted(set(leaves) - set(places)):
            raise UserError(
                f"The layout {self.name!r} has no names for {', '.join(lacking)}."
            )
        parts: dict[str, dict[int, np.ndarray]] = {}
        for name, place in places.items():
            value = place.turn.theirs(np.asarray(leaves[name]))
            parts.setdefault(place.tensor, {})[place.part] = value
        # safetensors writes the bytes in memory, so they must be in torch's order.
        found = {
            tensor: np.concatenate([of[part] for part in sorted(of)]).copy(order="C")
            if len(of) > 1
            else of[0].copy(order="C")
            for tensor, of in parts.items()
        }
        if original is not None:
            kept = set(original) - self.needed(original) - set(found)
            return found | {name: np.asarray(original[name]) for name in sorted(kept)}
        means = [name for name in found if name.endswith("running_mean")]
        counts = [name.removesuffix("running_mean") + COUNT for name in means]
        return found | {name: np.array(0) for name in counts}

    def needed(self, theirs: Iterable[str]) -> set[str]:
        """Returns the names in a file without those of unneeded tensors."""
        needless = re.compile("|".join((rf"(.*\.)?{COUNT}", *self.needless)))
        return {name for name in theirs if not needless.fullmatch(name)}

    def _place(self, name: str, before: Mapping[str, int]) -> Place | None:
        leaf = _leaf(name)
        rows = [row for kept in leaf.kept for row in self._patterns.get(kept, ())]
        for _, pattern, theirs, turn in sorted(rows, key=operator.itemgetter(0)):
            match = pattern.fullmatch(leaf.path)
            suffix = "" if match else f".{leaf.kind}"
            match = match or (pattern.fullmatch(leaf.module) if leaf.kind else None)
            if not match:
                continue
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            if of_block := _BLOCK.match(leaf.path):
                numbers["n"] = before[of_block[1]]
            filled = _filled(theirs, numbers)
            part = _PART.fullmatch(filled)
            return Place(
                tensor=(part["tensor"] if part else filled) + suffix,
                part=int(part["part"]) if part else 0,
                parts=int(part["parts"]) if part else 1,
                turn=_turn(leaf.name, turn),
            )
        return None


class _Leaf(NamedTuple):
    """The parsed name of a leaf of our model.

    Attributes:
        path: Name without the collection.
        module: Name of the leaf's module.
        name: Name of the leaf in the module.
        kind: Name of the leaf in torch; None if torch has none.
        kept: Names, without numbers, of the rows that can match.
    """

    path: str
    module: str
    name: str
    kind: str | None
    kept: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _leaf(full: str) -> _Leaf:
    """Returns a parsed name; cached, as every layout needs it."""
    collection, _, path = full.partition("/")
    module, _, name = path.rpartition("/")
    kind = _LEAVES.get(f"{collection}/{name}")
    names = (path, module) if kind else (path,)
    return _Leaf(path, module, name, kind, tuple(_NUMBER.sub("", n) for n in names))


def _turn(leaf: str, given: Turn | None) -> Turn:
    """Returns the conversion of a leaf; that of a module is for its kernel."""
    if leaf in ("bias", "scale", "mean", "var"):
        return _AS_IT_IS
    return given or (_KERNEL if leaf == "kernel" else _AS_IT_IS)


def _filled(template: str, numbers: Mapping[str, int]) -> str:
    """Returns a name with its numbers filled in.

    >>> _filled("features.{2n+s-1}.weight", {"n": 3, "s": 2})
    'features.7.weight'
    """

    def computed(field: re.Match) -> str:
        total = 0
        for sign, factor, letter in _TERM.findall(field[1]):
            value = int(factor or bool(letter)) * (numbers[letter] if letter else 1)
            total += -value if sign == "-" else value
        return str(total)

    return _FIELD.sub(computed, template)


class Built(NamedTuple):
    """A model of ours, as the families write it for other libraries.

    Attributes:
        name: Name of the model.
        module: Linen module.
        shape: Shape of one input.
        layout: Layout of its weights.
    """

    name: str
    module: Any
    shape: tuple[int, ...]
    layout: Layout


class OurLayout(Layout):
    """The layout of this project's own files, with the names of the model."""

    def places(self, ours: Iterable[str]) -> dict[str, Place]:
        """Returns every leaf at its own name."""
        return {name: Place(tensor=name) for name in ours}


OURS = OurLayout(name="finetune_jax", rows=())


def layouts() -> list[Layout]:
    """Returns all layouts, this project's own first."""
    from finetune_jax.weights import layouts as package

    found = [layout for m in registry.modules(package).values() for layout in m.LAYOUTS]
    return [OURS, *found]


def family_module(family: str) -> Any:
    """Returns the module in `layouts` of a family of models; None if it has none."""
    from finetune_jax.weights import layouts as package

    return registry.modules(package).get(family)


def recognise(ours: Iterable[str], theirs: Iterable[str], where: str) -> Layout:
    """Returns the layout in which the names of a file cover most of the model's.

    Args:
        ours: Names of all leaves of the model.
        theirs: Names of all tensors in the file.
        where: Address of the file, for messages.

    Raises:
        UserError: The file has no name of the model in any layout.
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
