"""Class names from labels as data sources spell them: one rule for every source.

A label is stripped of blanks (no-break and zero-width ones too), in Unicode's NFC, and a
whole number is written without a fraction: 'yes ' is 'yes', 1.0 and '1.0' are '1'. A NaN
or a blank label is missing. Names that are all numbers are in numeric order, all others
in the order of code points.
"""

import collections
import dataclasses
import decimal
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import listed
from finetune_jax.core.registry import closest

# Blanks that `str.strip` leaves alone: zero-width ones, joiners, and the byte order mark.
_INVISIBLE = "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))\.0*", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d{1,3}", re.ASCII | re.IGNORECASE)
# Unicode categories of blanks, dashes, underscores and invisible characters.
_SEPARATORS = ("Zs", "Zl", "Zp", "Cc", "Cf", "Pd", "Pc")
_SHOWN = 10
# With more different labels than this, and few rows for each, labels are numbers.
MANY_CLASSES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: Class names, in the order of their indices.
        index: Class index by spelling.
        warnings: Lines about spellings that were merged, and about similar class names.
        problems: Lines that say why the labels cannot be used.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def of(self, spellings: Iterable[str]) -> np.ndarray:
        """Returns the class index of each spelling, int32 [N]."""
        return np.array([self.index[text] for text in spellings], np.int32)


def class_name(spelling: str) -> str:
    r"""Returns the class name that a spelling stands for; '' if it is blank.

    >>> class_name(" yes\u00a0\u200b"), class_name("1.0"), class_name("007")
    ('yes', '1', '007')
    """
    text, before = unicodedata.normalize("NFC", spelling), None
    while text != before:  # Visible and invisible blanks may alternate.
        before, text = text, text.strip().strip(_INVISIBLE)
    if whole := _WHOLE.fullmatch(text):
        return "0" if whole[1] in ("-0", "+0") else whole[1]
    return text


def spelling_of(value: Any) -> str | None:
    """Returns a label of a file or an array as text; None if it is missing.

    >>> spelling_of(1.0), spelling_of(True), spelling_of(float("nan")), spelling_of(" ")
    ('1.0', 'True', None, None)
    """
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    text = value.decode() if isinstance(value, bytes) else str(value)
    return None if class_name(text).casefold() in ("", "nan") else text


def in_order(names: Iterable[str]) -> list[str]:
    """Returns class names in order, each once.

    >>> in_order(["10", "9", "-1"]), in_order(["b", "B", "10", "9"])
    (['-1', '9', '10'], ['10', '9', 'B', 'b'])
    """
    different = set(names)
    if all(_NUMBER.fullmatch(name) for name in different):
        return sorted(different, key=lambda name: (decimal.Decimal(name), name))
    return sorted(different)


def classes_of(
    counts: Mapping[str, int],
    where: str,
    *,
    given: Sequence[str] | None = None,
    unit: str = "rows",
) -> Classes:
    """Returns the classes of labels.

    Args:
        counts: Number of examples by spelling; none is missing.
        where: Start of the messages, such as a config key and a column.
        given: Class names in the order of their indices; None orders the names found.
        unit: Plural noun for examples, for messages.
    """
    name_of = {text: class_name(text) for text in counts}
    names = in_order(name_of.values())
    problems = []
    if given is not None:
        found, names = names, [class_name(name) for name in given]
        problems = _given_problems(names, found)
    if "" in names:
        problems.append("one of the class names is blank")
    if len(names) < 2:
        only = f"one class, {names[0]!r}" if names else "no examples"
        problems.append(f"{only}; at least two are needed")
    places = {name: place for place, name in enumerate(names)}
    sizes: collections.Counter[str] = collections.Counter()
    for text, name in name_of.items():
        sizes[name] += counts[text]
    merged = _merged(name_of, counts, unit)
    return Classes(
        names=tuple(names),
        index={text: places.get(name, -1) for text, name in name_of.items()},
        warnings=(
            *([f"{where}: {merged}"] if merged else []),
            *(f"{where}: {text}" for text in near_twins(names, sizes, unit)),
        ),
        problems=tuple(f"{where}: {text}" for text in problems),
    )


def _given_problems(names: Sequence[str], found: Sequence[str]) -> list[str]:
    """Returns the problems of class names that are given, and of labels outside them."""
    times = collections.Counter(names)
    problems = [f"class name {name!r} twice" for name in times if times[name] > 1]
    if outside := [name for name in found if name not in names]:
        told = ", ".join(f"{n!r}{closest(n, names)}" for n in outside[:_SHOWN])
        problems.append(
            f"{len(outside)} labels are not among the class names: {told}; the class "
            f"names are {', '.join(map(repr, names[:_SHOWN]))}"
        )
    return problems


def _merged(name_of: Mapping[str, str], counts: Mapping[str, int], unit: str) -> str:
    """Returns a line about spellings that became one class; '' if there are none."""
    times = collections.Counter(name_of.values())
    told = [
        f"{counts[text]} {unit} of {text!a} are read as {name!r}"
        for text, name in sorted(name_of.items())
        if times[name] > 1 and text != name
    ]
    return listed(told, _SHOWN)


def near_twins(
    names: Sequence[str], sizes: Mapping[str, int] | None = None, unit: str = "rows"
) -> list[str]:
    """Returns a line for each group of class names that a person may take for one.

    Args:
        names: Class names.
        sizes: Number of examples by name, where it is known.
        unit: Plural noun for examples.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_key(name), []).append(name)
    lines = []
    for twins in groups.values():
        if len(twins) > 1:
            told = [
                f"{n!a}" + (f" ({sizes[n]} {unit})" if sizes else "") for n in twins
            ]
            lines.append(
                f"{' and '.join(told)} are different classes; write them alike if they "
                "mean the same"
            )
    more = [f"and {len(lines) - _SHOWN} more such groups of classes"]
    return lines[:_SHOWN] + (more if len(lines) > _SHOWN else [])


def _key(name: str) -> str:
    """Returns a text that is the same for similar names.

    Case, blanks, dashes, underscores, dots, commas and slashes make no difference.
    """
    if _NUMBER.fullmatch(name) or _EXPONENT.fullmatch(name):
        return str(decimal.Decimal(name).normalize() + 0)  # Without the sign of -0.
    plain = unicodedata.normalize("NFKC", name).casefold()
    kept = [
        c for c in plain
        if c not in ".,/" and unicodedata.category(c) not in _SEPARATORS
    ]  # fmt: skip
    return "".join(kept) or name
