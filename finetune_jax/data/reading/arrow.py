"""pyarrow, imported at the first use of one of its names: only tables need it."""

import importlib
from typing import Any


class _Lazy:
    """A module that is imported at the first use of one of its names."""

    def __init__(self, module: str):
        """Stores the name of the module."""
        self._module = module

    def __getattr__(self, name: str) -> Any:
        """Returns what the module has by a name."""
        return getattr(importlib.import_module(self._module), name)


pa: Any = _Lazy("pyarrow")
pc: Any = _Lazy("pyarrow.compute")
