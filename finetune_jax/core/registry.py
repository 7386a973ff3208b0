"""Finds things by name, and answers a wrong name with the closest right one."""

import difflib
import importlib
import inspect
import math
import pathlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from finetune_jax.core.errors import UserError, problems_error


def closest(name: str, names: Iterable[str]) -> str:
    """Returns a hint that names the closest of `names`, or nothing.

    >>> closest("resnet21", ["mlp", "resnet20"])
    "; did you mean 'resnet20'?"
    """
    near = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(table: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns `table[name]`.

    Raises:
        UserError: `name` is not in the table; lists what is.
    """
    if name not in table:
        known = ", ".join(sorted(table))
        raise UserError(
            f"{where}: no {name!r}{closest(name, table)} There are: {known}."
        )
    return table[name]


def open_path(name: str, path: Iterable[str]) -> list[str]:
    """Returns the folders in which the modules of an open package are found.

    A folder of the same name elsewhere on `sys.path` contributes modules if it has no
    `__init__.py`. `pkgutil.extend_path` would also take the modules of another
    installation of this project.

    Args:
        name: Name of the package, such as 'finetune_jax.models'.
        path: The package's own folders.
    """
    folders = [pathlib.Path(entry, *name.split(".")) for entry in sys.path]
    return [*path, *(str(f) for f in folders if _is_namespace(f))]


def _is_namespace(folder: pathlib.Path) -> bool:
    return folder.is_dir() and not (folder / "__init__.py").exists()


def modules(package: ModuleType) -> dict[str, ModuleType]:
    """Returns the modules of a package by their names, all imported."""
    return {
        name: importlib.import_module(f"{package.__name__}.{name}")
        for name in sorted(names(package))
    }


def names(package: ModuleType) -> set[str]:
    """Returns the names of the modules of a package, without packages inside of it."""
    found = pkgutil.iter_modules(package.__path__)
    return {info.name for info in found if not info.ispkg}


def packages_with(package: ModuleType, name: str) -> list[str]:
    """Returns the sub-packages that have a module of a name, sorted; none is imported."""
    return sorted(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if info.ispkg
        and any(
            pathlib.Path(folder, info.name, f"{name}.py").is_file()
            for folder in package.__path__
        )
    )


def module(package: ModuleType, name: str, where: str) -> ModuleType:
    """Returns one module of a package; only this one is imported.

    Raises:
        UserError: The package has no such module.
    """
    known = {name: name for name in names(package)}
    found = choose(known, name, where)
    return importlib.import_module(f"{package.__name__}.{found}")


def call(function: Callable, arguments: Mapping[str, Any], where: str, **given) -> Any:
    """Returns `function(**arguments, **given)`, its names checked first.

    Args:
        function: Takes keyword arguments.
        arguments: What the user wrote, by name.
        where: The config section that they come from, for the message.
        **given: What the program adds.

    Raises:
        UserError: `arguments` has names that the function does not take, or lacks some.
    """
    parameters = inspect.signature(function).parameters
    taken = {name for name in parameters if name not in given}
    problems = [
        f"{where}.{name}: unknown{closest(name, taken)}"
        for name in arguments
        if name not in taken
    ]
    problems += [
        f"{where}.{name}: missing"
        for name in sorted(taken - set(arguments))
        if parameters[name].default is inspect.Parameter.empty
    ]
    problems += [
        f"{where}.{name}: {value!r}; {parameters[name].default!r} is such a value"
        for name, value in arguments.items()
        if name in taken and not _is_like(value, parameters[name].default)
    ]
    if problems:
        raise problems_error(f"{where} does not fit:", problems)
    return function(**arguments, **given)


def _is_like(value: Any, default: Any) -> bool:
    """Returns whether a value is of the kind that an argument's default shows.

    >>> _is_like(1, 0.5), _is_like(True, 0.5), _is_like((1, "a"), (1,))
    (True, False, False)
    """
    if isinstance(default, tuple) and isinstance(value, tuple):
        return not default or all(_is_like(part, default[0]) for part in value)
    if type(default) is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(default) not in (int, bool, str, tuple) or type(value) is type(default)
