"""Checks of the fields of a dataclass by their type hints."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import Problem

_WORDS: dict[Any, str] = {
    int: "an integer", float: "a number", str: "a string", bool: "True or False",
    types.NoneType: "None", Mapping: "a dict", Sequence: "a tuple of values",
}  # fmt: skip


def type_problems(given: Any, place: str) -> Iterator[Problem]:
    """Yields the values in the fields of a dataclass that are of another type.

    Args:
        given: Instance of a dataclass; instances in its fields are checked too.
        place: Name of the instance for the problems, such as 'Sweep'.
    """
    for name, hint in typing.get_type_hints(type(given)).items():
        yield from _problems(getattr(given, name), hint, f"{place}.{name}")


def _problems(value: Any, hint: Any, place: str) -> Iterator[Problem]:
    if hint is Any:
        return
    is_union = isinstance(hint, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    fitting = [option for option in options if _has_type(value, option)]
    if not fitting:
        needed = " or ".join(_words(option) for option in options)
        yield Problem(place, f"{value!r}; {needed} is needed")
        return
    inside = typing.get_args(fitting[0])
    if dataclasses.is_dataclass(value):
        yield from type_problems(value, place)
    elif isinstance(value, Mapping) and inside:
        for key, item in value.items():
            entry = f"{place}[{key!r}]"
            yield from _problems(key, inside[0], f"{entry}, the key")
            yield from _problems(item, inside[1], entry)
    elif isinstance(value, Sequence) and inside:
        for index, item in enumerate(value):
            yield from _problems(item, inside[0], f"{place}[{index}]")


def _has_type(value: Any, option: Any) -> bool:
    kind = typing.get_origin(option) or option
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool):  # A bool is an int, but no number.
        return type(value) is kind
    return isinstance(value, kind) and not (kind is Sequence and type(value) is str)


def _words(option: Any) -> str:
    kind = typing.get_origin(option) or option
    return _WORDS.get(kind) or f"sweeps.{kind.__name__}"
