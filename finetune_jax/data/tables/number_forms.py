"""How the numbers of a column are written: signs around them, and their separators."""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from finetune_jax.data.reading.arrow import pa, pc

# Signs of money and of percents, which are taken away without being told to.
_MONEY = ("$", "€", "£", "¥", "₹", "US$", "USD", "EUR", "GBP", "CHF", "JPY")
_KNOWN = ("", "%", *_MONEY)
# Cells of numbers that have no value, besides the signs of the file.
_NOTHING = ("-", "--", "–", "—", ".", "..")
# Characters that are written for others, as vectorised functions and Python replace them.
_SAME = {"\u2212": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'"}
# (thousands, decimal) in the order in which they are tried.
_SEPARATORS = (("", "."), (",", "."), ("", ","), (".", ","))
_RARE_SEPARATORS = ((" ", "."), (" ", ","), ("'", "."), ("'", ","))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How the numbers of a column are written.

    Attributes:
        before: Text before every number, such as '$'.
        after: Text behind every number, such as '%'.
        thousands: Separator of groups of three digits; empty is none.
        decimal: Separator of the fraction.
    """

    before: str = ""
    after: str = ""
    thousands: str = ""
    decimal: str = "."

    def pattern(self, *, strict: bool = False) -> str:
        """Returns the regex of such numbers, for Python's `re` and for RE2.

        Args:
            strict: Whether large numbers must have the separators of thousands.
        """
        decimal, whole = re.escape(self.decimal), "[0-9]+"
        if self.thousands:
            groups = rf"[1-9][0-9]{{0,2}}(?:{re.escape(self.thousands)}[0-9]{{3}})+"
            whole = f"(?:{groups}|{'[1-9][0-9]{0,2}|0' if strict else '[0-9]+'})"
        number = rf"(?:{whole}(?:{decimal}[0-9]*)?|{decimal}[0-9]+)(?:[eE][+-]?[0-9]+)?"
        before, after = re.escape(self.before), re.escape(self.after)
        return rf"[+-]?{before} ?[+-]?{number} ?{after}"

    def fits(self, text: str) -> bool:
        """Returns whether a cell is such a number."""
        return _compiled(self).fullmatch(_usual(text)) is not None

    def __str__(self) -> str:
        """Returns the signs of the form, for messages."""
        said = [f"without {sign!r}" for sign in (self.before, self.after) if sign]
        if self.thousands:
            said.append(f"with {self.thousands!r} between thousands")
        if self.decimal != ".":
            said.append(f"with {self.decimal!r} before the fraction")
        return ", ".join(said)


PLAIN = Form()


@functools.cache
def _compiled(form: Form) -> re.Pattern:
    return re.compile(form.pattern())


def _usual(text: str) -> str:
    """Returns a cell without blanks around it, and with ASCII's minus and blank."""
    return text.strip().translate(str.maketrans(_SAME))


def form_of(
    texts: Collection[str], *, told: bool = False, commas: bool = False
) -> Form | None:
    """Returns how all of some cells are written; None if they have no form in common.

    >>> form_of(["1,234", "999"]).thousands, form_of(["0,5", "1,234"]).decimal
    (',', ',')
    >>> form_of(["5 kg", "6 kg"]), str(form_of(["5 kg", "6 kg"], told=True))
    (None, "without 'kg'")

    Args:
        texts: Different cells of a column.
        told: Whether the config says that they are numbers: then units, and blanks or
            apostrophes between thousands, are taken away too.
        commas: Whether commas before fractions are likelier than between thousands.
    """
    usual = [text for text in map(_usual, texts) if text not in _NOTHING]
    if not usual:
        return PLAIN
    before, after = _around(usual[0])
    if any(_around(text) != (before, after) for text in usual):
        return None
    if not told and not (before in _KNOWN and after in _KNOWN):
        return None
    separators = list(_SEPARATORS) + (list(_RARE_SEPARATORS) if told else [])
    if commas:
        # Points before three digits each are rather between thousands.
        first = [(".", ",")] if any("." in text for text in usual) else []
        separators.sort(key=lambda one: one[1] == ".")
        separators = list(dict.fromkeys([*first, ("", "."), *separators]))
    for thousands, decimal in separators:
        form = Form(before=before, after=after, thousands=thousands, decimal=decimal)
        pattern = re.compile(form.pattern(strict=True))
        if all(map(pattern.fullmatch, usual)):
            is_unclear = decimal == "," and not commas and _may_be_groups(usual)
            return None if is_unclear else form
    return None


def _may_be_groups(usual: Iterable[str]) -> bool:
    """Returns whether the commas of some numbers may separate thousands as well.

    Numbers of four digits and more without a comma are beside others that have one.
    """
    groups = re.compile(r"\D*[1-9][0-9]{0,2}(,[0-9]{3})+\D*|\D*[0-9]+\D*")
    return all(groups.fullmatch(text) for text in usual)


def _around(text: str) -> tuple[str, str]:
    """Returns what is before and behind the digits of a cell, without its sign."""
    begin = re.match(r"[^0-9]*", text)
    end = re.search(r"[^0-9]*$", text)
    assert begin is not None and end is not None
    if len(begin[0]) == len(text):
        return text, ""
    before = begin[0].strip(" +-.,")
    after = end[0].strip(" ")
    return before, "" if after in (".", ",") else after


def is_any_number(text: str) -> bool:
    """Returns whether a cell is a number in any form, with known signs around it.

    >>> [is_any_number(text) for text in ("1.234,5", "5%", "5 kg", "$3", "five", "٣")]
    [True, True, False, True, False, True]
    """
    try:
        float(text)  # Also with digits of other scripts.
        return True
    except ValueError:
        return form_of([text]) is not None


def parsed(texts: Any, form: Form, missing: Collection[str]) -> Any:
    """Returns the numbers of cells, as Arrow's float64; missing ones are null.

    Args:
        texts: Arrow's array of strings.
        form: How they are written.
        missing: Signs of cells without a value.

    Raises:
        ArrowInvalid: A cell is no such number.
    """
    if form == PLAIN:
        try:  # Cells that need nothing else are most, and this is fast.
            return pc.cast(texts, pa.float64())
        except pa.ArrowInvalid:
            pass
    text = texts
    for sign, usual in _SAME.items():
        text = pc.replace_substring(text, sign, usual)
    text = pc.utf8_trim_whitespace(text)
    nothing = pc.is_in(text, value_set=pa.array([*missing, *_NOTHING], text.type))
    text = pc.if_else(nothing, pa.scalar(None, text.type), text)
    if form != PLAIN:
        is_right = pc.match_substring_regex(text, f"^(?:{form.pattern()})$")
        if not pc.all(is_right, min_count=0).as_py():
            raise pa.ArrowInvalid(f"a cell is no number {form}")
        for sign in filter(None, (form.before, form.after, form.thousands, " ")):
            text = pc.replace_substring(text, sign, "")
        text = pc.replace_substring(text, form.decimal, ".")
    return pc.cast(text, pa.float64())


def without(numbers: Any, signs: Collection[str]) -> Any:
    """Returns numbers, null if they equal a sign of cells without a value.

    >>> import pyarrow as pa
    >>> without(pa.array([1.0, -999.0]), ("-999", "unknown")).to_pylist()
    [1.0, None]

    Args:
        numbers: Arrow's array of float64.
        signs: Signs of cells without a value, numbers and others.
    """
    values = numbers_of(signs)
    if not values:
        return numbers
    unsigned = pc.add(numbers, 0.0)  # -0.0 is 0.0.
    is_nothing = pc.is_in(unsigned, value_set=pa.array(values, pa.float64()))
    return pc.if_else(is_nothing, pa.scalar(None, pa.float64()), numbers)


def numbers_of(signs: Iterable[str]) -> list[float]:
    """Returns the signs that are finite numbers."""
    found = []
    for sign in signs:
        try:
            number = float(sign)
        except ValueError:
            continue
        if math.isfinite(number):
            found.append(number + 0.0)
    return found


def is_missing(text: str, missing: Collection[str]) -> bool:
    """Returns whether a cell of a column of numbers has no value."""
    usual = _usual(text)
    return usual in missing or usual in _NOTHING


def as_entries(forms: dict[str, Form]) -> tuple[tuple[str, ...], ...]:
    """Returns the forms of columns that are not plain, as a manifest has them."""
    return tuple(
        (name, *dataclasses.astuple(form))
        for name, form in forms.items()
        if form != PLAIN
    )


def from_entries(entries: Iterable[tuple[str, ...]]) -> dict[str, Form]:
    """Returns the forms that `as_entries` wrote."""
    return {
        name: Form(before=before, after=after, thousands=thousands, decimal=decimal)
        for name, before, after, thousands, decimal in entries
    }
