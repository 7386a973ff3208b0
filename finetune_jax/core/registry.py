"""Functions and modules by name, their arguments checked; wrong names get a hint."""

import contextlib
import contextvars
import dataclasses
import difflib
import importlib
import inspect
import math
import pathlib
import pkgutil
import re
import sys
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from types import ModuleType
from typing import Any, TypeVar

from finetune_jax.core.errors import Problem, UserError, raise_if

T = TypeVar("T")
PACKAGE = "finetune_jax"
# Name of the plug-in that is being loaded; None outside of `adding`.
_adding: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "adding", default=None
)
_all_choices: list["Choices"] = []


class Choices(MutableMapping[str, T]):
    """The possible values of a config key; plug-ins add entries by assignment.

    Entries of this package and of other plug-ins cannot be replaced.
    """

    def __init__(self, what: str, entries: Mapping[str, T]):
        """Takes the entries of this package.

        Args:
            what: Name of one entry in messages, such as 'optimizer'.
            entries: Entries by the name that a config uses.
        """
        self._what = what
        self._entries = dict(entries)
        self._owners: dict[str, str | None] = dict.fromkeys(entries, PACKAGE)
        _all_choices.append(self)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __setitem__(self, name: str, value: T) -> None:
        by = _adding.get()
        owner = self._owners.setdefault(name, by)
        if owner != by:
            raise UserError(
                f"{by or 'a plug-in'}: the {self._what} {name!r} is already defined by "
                f"{owner or 'another plug-in'}; choose another name"
            )
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name], self._owners[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def added_by(self, plugin: str) -> list[str]:
        """Returns the entries of a plug-in."""
        found = [name for name, owner in self._owners.items() if owner == plugin]
        return [f"{self._what} {name!r}" for name in found]


@contextlib.contextmanager
def adding(plugin: str) -> Iterator[None]:
    """Attributes the entries that are added in the block to a plug-in."""
    token = _adding.set(plugin)
    try:
        yield
    finally:
        _adding.reset(token)


def added_by(plugin: str) -> list[str]:
    """Returns the entries that a plug-in has added, such as "optimizer 'signs'"."""
    return [name for choices in _all_choices for name in choices.added_by(plugin)]


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
        UserError: `name` is not in the table; lists the names that are.
    """
    if name not in table:
        known = ", ".join(sorted(table))
        raise UserError(
            Problem(
                where, f"no {name!r}{closest(name, table) or '.'} There are: {known}."
            )
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


def check_regex(pattern: Any, where: str) -> None:
    """Checks that a pattern is a regular expression.

    Raises:
        UserError: It is not.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        text = f"{pattern!r} is not a regular expression: {error}"
        raise UserError(Problem(where, text)) from error


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
    choose(dict.fromkeys(names(package)), name, where)
    return importlib.import_module(f"{package.__name__}.{name}")


class OutOfRange(ValueError):
    """An argument of the user that is out of its range."""


def call(
    function: Callable,
    arguments: Mapping[str, Any] | Sequence[Any],
    where: str,
    **given: Any,
) -> Any:
    """Returns `function(**arguments, **given)`, the arguments checked first.

    Names and kinds are checked by the signature, ranges by the function itself: see `need`.

    Args:
        function: Function whose other arguments show their kinds by their defaults. An
            argument whose default is a dataclass takes its fields as arguments instead.
        arguments: Arguments of the user, by name or in the order of the signature.
        where: Config key of the arguments, for the message.
        **given: Arguments of the program.

    Raises:
        UserError: Lists unknown, missing and unsuitable arguments.
    """
    defaults, grouped = _defaults(function, given)
    if hasattr(arguments, "keys"):  # A ConfigDict is no `Mapping`.
        arguments = dict(arguments)
    else:
        if len(arguments) > len(defaults):
            takes = f"({', '.join(defaults)})" if defaults else "no arguments"
            raise UserError(Problem(where, f"takes {takes}, not {tuple(arguments)!r}"))
        arguments = dict(zip(defaults, arguments))
    problems = [
        Problem(f"{where}.{name}", f"unknown{closest(name, defaults)}")
        for name in arguments
        if name not in defaults
    ]
    problems += [
        Problem(f"{where}.{name}", "missing")
        for name in sorted(defaults.keys() - set(arguments))
        if defaults[name].default is inspect.Parameter.empty
    ]
    problems += [
        Problem(f"{where}.{name}", f"{value!r}; {example!r} is such a value")
        for name, value in arguments.items()
        if name in defaults and not _is_like(value, example := _example(defaults[name]))
    ]
    raise_if(problems)
    rest = dict(arguments)
    for name, (default, fields) in grouped.items():
        own = {field: rest.pop(field) for field in fields if field in rest}
        given[name] = dataclasses.replace(default, **own)
    try:
        return function(**rest, **given)
    except OutOfRange as error:
        raise UserError(Problem(where, str(error))) from error


def _defaults(
    function: Callable, given: Mapping[str, Any]
) -> tuple[dict[str, inspect.Parameter], dict[str, tuple[Any, list[str]]]]:
    """Returns the arguments of a user, and the dataclasses that group some of them."""
    found, grouped = dict[str, inspect.Parameter](), {}
    for name, parameter in inspect.signature(function).parameters.items():
        default: Any = parameter.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            fields = [field.name for field in dataclasses.fields(default)]
            for field in fields:
                value = getattr(default, field)
                found[field] = parameter.replace(name=field, default=value)
            grouped[name] = default, fields
        elif name not in given and parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = parameter
    return found, grouped


def need(*rules: tuple[bool, str]) -> None:
    """Checks the ranges of a function's arguments.

    Args:
        *rules: Pairs of whether a rule is kept, and the range that is needed.

    Raises:
        OutOfRange: Lists the rules that are not kept.
    """
    if broken := [f"{text} is needed" for is_kept, text in rules if not is_kept]:
        raise OutOfRange("; ".join(broken))


def _example(parameter: inspect.Parameter) -> Any:
    """Returns a value of an argument's kind: its default, or one of its annotation."""
    if parameter.default is not inspect.Parameter.empty:
        return parameter.default
    return {int: 1, float: 1.0}.get(parameter.annotation)


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
