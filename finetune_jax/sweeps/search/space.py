"""Search spaces: ranges and choices of config keys, conditional by nesting."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import Problem

# Proposed floats are rounded, so that the last bits of a machine's logarithm do not decide
# the config, and with it the folder, of a trial.
DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Float:
    """A real number, rounded to four significant digits.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether the logarithm is uniform instead of the value.
    """

    low: float
    high: float
    log: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Int:
    """A whole number.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether the logarithm is uniform instead of the value.
    """

    low: int
    high: int
    log: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values of a config key, or one of several named sets of keys.

    Attributes:
        options: A sequence of values; or {name: {config key: value or space}}. The spaces
            of a set are searched only in trials that choose it.
    """

    options: Sequence[Any] | Mapping[str, Mapping[str, Any]]

    @property
    def branches(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The named sets of keys; None for a choice of values."""
        return self.options if isinstance(self.options, Mapping) else None

    @property
    def labels(self) -> tuple[Any, ...]:
        """A plain value for each option: its name, the value itself, or its text."""
        if isinstance(self.options, Mapping):
            return tuple(self.options)
        plain = (bool, int, float, str, type(None))
        return tuple(v if isinstance(v, plain) else repr(v) for v in self.options)


Space = Mapping[str, Any]
_SPACES = (Float, Int, Choice)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """Values of a trial.

    Attributes:
        params: Values of the search space by name. A parameter of a named set is called
            CHOICE/NAME/KEY.
        overrides: Config keys with their values, in the order of the space.
    """

    params: dict[str, Any]
    overrides: dict[str, Any]


# Gets the name of a parameter and its space, and returns its value (the label of a choice).
Suggest = Callable[[str, Any], Any]


def walked(space: Space, suggest: Suggest) -> Proposal:
    """Returns the values that a function gives to the parameters, in their order."""
    params, overrides = dict[str, Any](), dict[str, Any]()

    def walk(entries: Space, prefix: str) -> None:
        for key, entry in entries.items():
            if not isinstance(entry, _SPACES):
                overrides[key] = entry
                continue
            name = prefix + key
            params[name] = value = suggest(name, entry)
            if not isinstance(entry, Choice):
                overrides[key] = value
            elif entry.branches is not None:
                walk(entry.branches[value], f"{name}/{value}/")
            else:
                options = dict(zip(entry.labels, entry.options))
                overrides[key] = options[value]

    walk(space, "")
    return Proposal(params=params, overrides=overrides)


def rounded(value: float, space: Float) -> float:
    """Returns a value with few digits, inside the range."""
    return min(max(float(f"{value:.{DIGITS}g}"), space.low), space.high)


def drawn(space: Any, random: np.random.Generator) -> Any:
    """Returns a random value of a parameter."""
    if isinstance(space, Choice):
        return space.labels[random.integers(len(space.labels))]
    if isinstance(space, Int) and not space.log:
        return int(random.integers(space.low, space.high, endpoint=True))
    # Each whole number has the interval of half a unit to both sides.
    half = 0.5 if isinstance(space, Int) else 0.0
    low, high = space.low - half, space.high + half
    value = (
        math.exp(random.uniform(math.log(low), math.log(high)))
        if space.log
        else random.uniform(low, high)
    )
    if isinstance(space, Int):
        return min(max(round(value), space.low), space.high)
    return rounded(value, space)


def points(space: Space, prefix: str = "") -> Iterator[Proposal]:
    """Yields the points of a grid; the last parameter varies fastest."""
    parts = [[*_entry_points(key, entry, prefix)] for key, entry in space.items()]
    for chosen in itertools.product(*parts):
        params, overrides = dict[str, Any](), dict[str, Any]()
        for point in chosen:
            params |= point.params
            overrides |= point.overrides
        yield Proposal(params=params, overrides=overrides)


def _entry_points(key: str, entry: Any, prefix: str) -> Iterator[Proposal]:
    name = prefix + key
    if not isinstance(entry, _SPACES):
        yield Proposal(params={}, overrides={key: entry})
    elif isinstance(entry, Choice) and entry.branches is not None:
        for label, branch in entry.branches.items():
            for point in points(branch, f"{name}/{label}/"):
                yield Proposal(
                    params={name: label} | point.params, overrides=point.overrides
                )
    elif isinstance(entry, Choice):
        for label, value in zip(entry.labels, entry.options):
            yield Proposal(params={name: label}, overrides={key: value})
    elif isinstance(entry, Int):
        for value in range(entry.low, entry.high + 1):
            yield Proposal(params={name: value}, overrides={key: value})


def space_problems(space: Space, where: str) -> list[Problem]:
    """Returns empty ranges, choices without options and keys that are set twice."""
    found, setters = list[Problem](), dict[str, str]()
    for key, entry in space.items():
        place = f"{where}[{key!r}]"
        for name in _keys(key, entry):
            if other := setters.get(name):
                text = f"sets {name!r}, which the entry {other!r} sets too; keep one"
                found.append(Problem(place, text))
            setters[name] = key
        if isinstance(entry, Choice):
            found += _choice_problems(entry, place)
        elif isinstance(entry, Float | Int):
            found += _range_problems(entry, place)
        elif _has_space(entry):
            text = "a value that contains a space; give the space its own key, such as "
            found.append(Problem(place, text + "'plan[0].optimizer_args.momentum'"))
    return found if space else [Problem(where, "empty; give at least one key")]


def _range_problems(space: Float | Int, place: str) -> list[Problem]:
    text = f"{space!r}; "
    kinds = (int,) if isinstance(space, Int) else (int, float)
    if not all(type(v) in kinds and math.isfinite(v) for v in (space.low, space.high)):
        what = "whole numbers" if isinstance(space, Int) else "finite numbers"
        return [Problem(place, f"{text}{what} are needed")]
    if space.low >= space.high:
        return [Problem(place, f"{text}empty, low must be below high")]
    if space.log and space.low <= 0:
        return [Problem(place, f"{text}low must be above 0 for log=True")]
    return []


def _choice_problems(choice: Choice, place: str) -> list[Problem]:
    options = choice.options
    if isinstance(options, str) or not isinstance(options, Sequence | Mapping):
        text = f"{options!r}; give a tuple of values or a dict of named sets"
        return [Problem(place, text)]
    if not options:
        return [Problem(place, "a choice without options; give at least one")]
    found = list[Problem]()
    if choice.branches is None:
        labels = choice.labels
        # optuna compares values, and 1 == True == 1.0.
        again = [v for i, v in enumerate(labels) if v in labels[:i]]
        found += [Problem(place, f"{value!r} twice; keep one") for value in again]
        if any(map(_has_space, options)):
            text = "a space as an option; name the options: {'NAME': {KEY: space}}"
            found.append(Problem(place, text))
        return found
    for label, branch in choice.branches.items():
        inside = f"{place}[{label!r}]"
        if not isinstance(label, str) or not isinstance(branch, Mapping):
            text = "a named set is a string with a dict of config keys"
            found.append(Problem(inside, text))
        elif branch:
            found += space_problems(branch, inside)
    return found


def grid_problems(space: Space, where: str) -> list[Problem]:
    """Returns ranges of real numbers, which have no grid."""
    found = list[Problem]()
    for key, entry in space.items():
        place = f"{where}[{key!r}]"
        if isinstance(entry, Float):
            found.append(Problem(place, f"{entry!r}; a grid needs Choice((...))"))
        elif isinstance(entry, Choice) and entry.branches is not None:
            for label, branch in entry.branches.items():
                if isinstance(branch, Mapping):
                    found += grid_problems(branch, f"{place}[{label!r}]")
    return found


def _has_space(value: Any) -> bool:
    """Returns whether a value is or contains a space."""
    if isinstance(value, Mapping):
        return any(map(_has_space, value.values()))
    is_sequence = isinstance(value, Iterable) and not isinstance(value, str)
    if is_sequence and not hasattr(value, "keys"):
        return any(map(_has_space, value))
    return isinstance(value, _SPACES)


def _keys(key: str, entry: Any) -> set[str]:
    """Returns the config keys that an entry of a space sets, in any trial."""
    if not isinstance(entry, Choice) or not isinstance(entry.options, Mapping):
        return {key}
    branches = [b for b in entry.options.values() if isinstance(b, Mapping)]
    return {n for branch in branches for k, e in branch.items() for n in _keys(k, e)}


def examples(space: Space) -> list[dict[str, Any]]:
    """Returns overrides that contain every option and both ends of every range."""
    variants = [_variants(key, entry) for key, entry in space.items()]
    count = max(map(len, variants), default=1)
    return [
        {k: v for found in variants for k, v in found[i % len(found)].items()}
        for i in range(count)
    ]


def _variants(key: str, entry: Any) -> list[dict[str, Any]]:
    if isinstance(entry, Choice) and entry.branches is not None:
        return [found for b in entry.branches.values() for found in examples(b)]
    if isinstance(entry, Choice):
        return [{key: value} for value in entry.options]
    if isinstance(entry, Float | Int):
        return [{key: entry.low}, {key: entry.high}]
    return [{key: entry}]
