"""The backend that models are traced for: on CPU some layers are computed otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_CHOSEN: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend")


def backend() -> str:
    """Returns the platform that is being traced for: 'cpu', 'gpu' or 'tpu'."""
    return _CHOSEN.get(None) or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Has models be traced for a backend that need not be there."""
    before = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(before)
