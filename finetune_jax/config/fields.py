"""Keys of the config as dataclass fields: default, type, range and meaning."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_jax.core.errors import Problem
from finetune_jax.core.registry import closest

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # Updates are computed in float32.


class Limits(typing.TypedDict, total=False):
    """The range of a key.

    Attributes:
        above: Bound that values must exceed.
        least: Smallest value.
        below: Bound that values must not reach.
        most: Largest value.
        finite: Whether a number must be finite; it must be without this.
        choices: All possible values.
        each: All possible items of a tuple; or 'number' or 'positive'.
    """

    above: float
    least: float
    below: float
    most: float
    finite: bool
    choices: tuple[Any, ...]
    each: tuple[Any, ...] | str


def key(
    default: Any,
    meaning: str,
    *,
    static: bool = True,
    **limits: typing.Unpack[Limits],
) -> Any:
    """Returns the dataclass field of a key.

    Args:
        default: Value of a config that does not name the key; None is "not given".
        meaning: One sentence about it, for docs/config.md.
        static: Whether a compiled step depends on the key: see `Phase.static`.
        **limits: Range of the values.
    """
    metadata = {"meaning": meaning, "limits": limits, "static": static}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(of: type) -> Any:
    """Returns the dataclass field of a section that is described by a dataclass."""
    return dataclasses.field(default_factory=of, metadata={"section": of})


class Section(Mapping[str, Any]):
    """Base of the sections of a config: values by attribute, or by name as a mapping."""

    is_open: typing.ClassVar[bool] = False

    def __getitem__(self, name: str) -> Any:
        if name not in keys_of(type(self)):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(keys_of(type(self)))

    def __len__(self) -> int:
        """Returns the number of keys."""
        return len(keys_of(type(self)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the values by name, sections as dicts."""
        return {name: plain(self[name]) for name in self}

    def problems(self) -> list[Problem]:
        """Returns conflicts between values of the section; keys are relative."""
        return []


def plain(value: Any) -> Any:
    """Returns a value with dicts for sections and tuples for lists."""
    if hasattr(value, "keys"):
        return {name: plain(value[name]) for name in value}
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a section.

    Attributes:
        name: Name of the key.
        kind: Type of its values: int, float, str, bool, tuple or dict.
        is_optional: Whether it may be None.
        default: Default value.
        meaning: One sentence about it.
        section: Dataclass of the section that stands there; None for a value.
        entry: Dataclass of the entries of the table that stands there; None for a value.
        limits: Range of the values.
    """

    name: str
    kind: type
    is_optional: bool = False
    default: Any = None
    meaning: str = ""
    section: type | None = None
    entry: type | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)

    def as_kind(self, value: Any) -> Any:
        """Returns a value as one of the key's type, an int as a float, a list as a tuple.

        Raises:
            TypeError: The value is of another type.
        """
        if self.kind is tuple and isinstance(value, list | tuple):
            return plain(value)
        if self.kind is float and type(value) is int:
            return float(value)
        if type(value) is self.kind or (value is None and self.is_optional):
            return value
        raise TypeError(f"{value!r} is not {A_KIND[self.kind]}")

    def problem(self, value: Any) -> str | None:
        """Returns why a value of the right type is out of range, or None."""
        if value is None:
            return None
        if (choices := self.limits.get("choices")) and value not in choices:
            hint = closest(str(value), map(str, choices))
            return f"{value!r} is not one of {choices}{hint}"
        if self.kind is tuple:
            return _item_problem(value, self.limits.get("each"))
        if self.kind not in (int, float) or _is_within(value, self.kind, self.limits):
            return None
        return f"{value!r}; {self.range()} is needed"

    def range(self) -> str:
        """Returns the range in words; '' where there is none."""
        limits = self.limits
        if self.kind not in (int, float):
            return ""
        if "least" in limits and "most" in limits:
            return f"{limits['least']} to {limits['most']}"
        words = {
            "above": "more than {}", "least": "at least {}",
            "below": "less than {}", "most": "at most {}",
        }  # fmt: skip
        found = [
            text.format(limits[name]) for name, text in words.items() if name in limits
        ]
        if self.kind is float and limits.get("finite", True):
            found.append("finite" if found else "a finite number")
        return " and ".join(found)


A_KIND = {
    int: "an integer", float: "a number", str: "a string", tuple: "a tuple",
    bool: "True or False", dict: "a dict",
}  # fmt: skip


def _is_within(value: float, kind: type, limits: Limits) -> bool:
    largest = LARGEST_INT if kind is int and "most" not in limits else math.inf
    return (
        limits.get("least", -math.inf) <= value <= limits.get("most", largest)
        and value > limits.get("above", -math.inf)
        and ("below" not in limits or value < limits["below"])
        and (not limits.get("finite", True) or abs(value) < LARGEST_FLOAT)
    )


def _item_problem(items: tuple, each: Any) -> str | None:
    if not each:
        return None
    if isinstance(each, tuple):
        wrong = [item for item in items if item not in each]
        if not wrong:
            return None
        return f"{wrong[0]!r} is not one of {each}{closest(str(wrong[0]), each)}"
    if not items or any(type(item) not in (int, float) for item in items):
        return f"{items!r}; numbers are needed"
    if each == "positive" and not all(item > 0 for item in items):
        return f"{items!r}; more than 0 is needed"
    return None


@functools.cache
def keys_of(of: type) -> dict[str, Key]:
    """Returns the keys of a section's dataclass, by name, in the order of the class."""
    hints = typing.get_type_hints(of)
    return {
        field.name: _key_of(field, hints[field.name])
        for field in dataclasses.fields(of)
    }


def _key_of(field: dataclasses.Field, hint: Any) -> Key:
    is_union = isinstance(hint, types.UnionType)
    choices = typing.get_args(hint) if is_union else (hint,)
    kind = typing.get_origin(choices[0]) or choices[0]
    entry = next(iter(typing.get_args(choices[0])), None) if kind is tuple else None
    made = field.default_factory
    return Key(
        name=field.name,
        kind=dict if kind is Mapping else kind,
        is_optional=type(None) in choices,
        default=field.default if made is dataclasses.MISSING else made(),
        meaning=field.metadata.get("meaning", ""),
        section=field.metadata.get("section"),
        entry=entry if isinstance(entry, type) and issubclass(entry, Section) else None,
        limits=field.metadata.get("limits", {}),
    )


def limit_problems(values: Mapping[str, Any], of: type) -> list[Problem]:
    """Returns the values of a section that are out of range; keys are relative."""
    found = []
    for name, known in keys_of(of).items():
        if known.section is None and known.entry is None:
            text = known.problem(values[name])
            found += [Problem(name, text)] if text else []
    return found
