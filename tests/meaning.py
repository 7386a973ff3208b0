"""The property "no silent change of meaning", which tests of every data source share.

An odd input gives the same numbers as the clean one, or a warning, or a refusal. It never
gives other numbers without a word.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from finetune_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd:
    """One odd input and its expected outcome.

    Attributes:
        name: Name of the case.
        make: Takes a temporary folder and returns the input, such as a path.
        same: Whether the numbers must equal those of the clean input.
        warns: Regex that one of the warnings matches; None expects no warning.
        refuses: Regex that the `UserError` matches; None expects no refusal.
    """

    name: str
    make: Callable[[Any], Any]
    same: bool = False
    warns: str | None = None
    refuses: str | None = None

    def __post_init__(self):
        """Checks that an outcome is expected."""
        assert self.same or self.warns or self.refuses, f"{self.name}: no outcome"


def by_name(cases: Sequence[Odd]) -> Any:
    """Returns the decorator that runs a test once for each case, as argument `odd`."""
    return pytest.mark.parametrize("odd", cases, ids=[case.name for case in cases])


def check(
    odd: Odd,
    read: Callable[[Any], tuple[Any, Sequence[str]]],
    clean: Any,
    folder: Any,
) -> None:
    """Checks the outcome of one odd input.

    Args:
        odd: The case.
        read: Returns the numbers (a pytree-free sequence of arrays) and the warnings that
            the project makes of an input.
        clean: Numbers of the clean input.
        folder: Temporary folder.
    """
    given = odd.make(folder)
    if odd.refuses is not None:
        with pytest.raises(UserError, match=odd.refuses):
            read(given)
        return
    numbers, warnings = read(given)
    if odd.same:
        assert len(numbers) == len(clean)
        for found, wanted in zip(numbers, clean, strict=True):
            np.testing.assert_array_equal(found, wanted)
    if odd.warns is None:
        assert not warnings
    else:
        text = "\n".join(warnings)
        assert warnings and re.search(odd.warns, text), text
