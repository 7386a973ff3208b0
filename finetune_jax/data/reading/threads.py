"""One pool of threads for reading and decoding, which release the interpreter's lock."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune_jax.core.errors import UserError, first_of, raise_if

_SHOWN = 50


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decoding")


def attempts(
    function: Callable[[Any], Any], items: Iterable[Any]
) -> list[tuple[Any, UserError | None]]:
    """Returns (`function` of it, None) or (None, the error) for every item, in order."""

    def attempt(item):
        try:
            return function(item), None
        except UserError as error:
            return None, error

    return list(_pool().map(attempt, items))


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list:
    """Returns `function` of every item, in their order.

    Raises:
        UserError: Lists the messages of all items for which one was raised.
    """
    results = attempts(function, items)
    check_readable([error for _, error in results])
    return [value for value, _ in results]


def check_readable(errors: Sequence[UserError | None], advice: str = "") -> None:
    """Checks that no item met with an error.

    Args:
        errors: Error of each item, None if it had none.
        advice: Advice, if it is not to mend the examples.

    Raises:
        UserError: Lists the messages.
    """
    problems = [str(error) for error in errors if error is not None]
    raise_if(
        first_of(problems, _SHOWN),
        f"{len(problems)} of {len(errors)} examples cannot be read:",
        advice or "Mend them, or take them out of the data.",
    )
