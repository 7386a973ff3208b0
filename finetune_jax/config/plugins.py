"""Plug-ins: a user's modules that add optimizers, losses, models and the like.

A plug-in is a module or a file that `config.plugins` names, or a config file that adds
entries to `registry.Choices`. A run copies the sources of its plug-ins into `plugins/` of
its workdir, with the user's modules that they import and the modules that extend packages
of `finetune_jax`. All modes that open the workdir import the copies.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import pathlib
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError, collected, raise_if
from finetune_jax.core.files import write_json
from finetune_jax.core.paths import user_path

FOLDER = "plugins"
INDEX = "index.json"
ROOT = pathlib.Path(__file__).resolve().parents[1]
INSTALLED = tuple(
    pathlib.Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_KEY = "config.plugins"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The source file of a module.

    Attributes:
        path: Path of the user's file.
        content: Content of the file when it was loaded.
    """

    path: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        return hashlib.sha256(self.content).hexdigest()


# Sources of each plug-in that this process has loaded, by the name of its module; these
# sources are by their place, which is the path of the copy below `plugins/`.
_loaded: dict[str, dict[str, Source]] = {}
# Path of the user's file, by the path of the copy that was imported instead.
_originals: dict[str, str] = {}


def is_file(name: str) -> bool:
    """Returns whether a plug-in is given by the path of its file.

    >>> is_file("mine.py"), is_file("my_package.module")
    (True, False)
    """
    return name.endswith(".py") or "/" in name


def module_of(name: str) -> str:
    """Returns the name of a plug-in's module.

    >>> module_of("/home/me/mine.py"), module_of("my_package.module")
    ('mine', 'my_package.module')
    """
    return pathlib.Path(name).stem if is_file(name) else name


def place_of(module: str, *, is_package: bool = False) -> str:
    """Returns the path of a module's copy below `plugins/`.

    >>> place_of("my_package.module")
    'my_package/module.py'
    """
    return module.replace(".", "/") + ("/__init__.py" if is_package else ".py")


def with_absolute_paths(names: Iterable[Any], folder: pathlib.Path) -> tuple[Any, ...]:
    """Returns the names of plug-ins, with paths taken from a folder made absolute."""
    return tuple(
        str(folder.absolute() / user_path(name, _KEY))
        if isinstance(name, str) and is_file(name)
        else name
        for name in names
    )


def ready(names: Sequence[Any], workdir: pathlib.Path | None = None) -> list[str]:
    """Loads the plug-ins of a run, from their copies if its workdir has them.

    Plug-ins that this process has loaded are not executed again.

    Args:
        names: `config.plugins`.
        workdir: Workdir of the run, which need not be there yet.

    Returns:
        Lines about plug-ins that have changed since the run began.

    Raises:
        UserError: Lists the plug-ins that cannot be loaded.
    """
    problems = _name_problems(names)
    raise_if(problems)
    if workdir is not None and (workdir / FOLDER / INDEX).is_file():
        return _open(names, workdir)
    for name in names:
        with collected(problems):
            _load(name)
    raise_if(problems)
    return []


def _name_problems(names: Sequence[Any]) -> list[Problem]:
    """Returns the names that are neither modules nor files, and equal names."""
    problems, modules = [], {}
    for name in names:
        is_module = isinstance(name, str) and re.fullmatch(r"[^\W\d]\w*(\.\w+)*", name)
        if not is_module and not (isinstance(name, str) and is_file(name)):
            text = (
                f"{name!r} is neither a module, such as 'my_package.module', nor a file, "
                "such as 'my_module.py'"
            )
            problems.append(Problem(_KEY, text))
            continue
        other = modules.setdefault(module_of(name), name)
        if other != name:
            text = f"{other!r} and {name!r} have the same module name; rename one"
            problems.append(Problem(_KEY, text))
    return problems


def _load(name: str) -> None:
    """Loads a plug-in unless this process has loaded the same source.

    Raises:
        UserError: There is no such file or module, it fails, or it adds an entry that is
            there already.
    """
    module, known = module_of(name), _loaded.get(module_of(name))
    path = user_path(name, _KEY) if is_file(name) else None
    if path is not None and not path.is_file():
        raise UserError(Problem(_KEY, f"{name!r} is not there"))
    if path is None and known is not None:
        path = pathlib.Path(known[place_of(module)].path)
    if path is not None and known is not None:
        if known[place_of(module)].content == _content(path):
            return
        sys.modules.pop(module, None)
    there = sys.modules.get(module)
    if there is not None and path is not None and _file(there) != path.resolve():
        text = f"{name!r}: Python has another module {module!r}; rename the file"
        raise UserError(Problem(_KEY, text))
    try:
        with registry.adding(module):
            if there is None and path is not None:
                there = execute(module, path)
            there = there or importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError) and error.name in (module, None):
            advice = "; give the path of its file, as from the config file"
        text = f"{name!r} fails with {type(error).__name__}: {error}{advice}"
        raise UserError(Problem(_KEY, text)) from error
    note(there)


def execute(name: str, path: pathlib.Path) -> ModuleType:
    """Returns the executed module of a Python file.

    Raises:
        UserError: It is no Python file.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def note(module: ModuleType) -> None:
    """Notes the sources of a plug-in that was executed in `registry.adding`."""
    _loaded[module.__name__] = _sources(module)


def _content(path: pathlib.Path) -> bytes | None:
    """Returns the content of a file, or None if there is none."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _file(module: ModuleType | None) -> pathlib.Path | None:
    """Returns the file of a module that was imported from Python source."""
    file = getattr(module, "__file__", None)
    return _resolved(file) if file and file.endswith(".py") else None


@functools.cache
def _resolved(file: str) -> pathlib.Path:
    return pathlib.Path(file).resolve()


def _sources(plugin: ModuleType) -> dict[str, Source]:
    """Returns the sources of a module and of the user's modules that it imports."""
    found, left = dict[str, Source](), [plugin]
    package = plugin.__name__.partition(".")[0]
    while left:
        module = left.pop()
        file = _file(module)
        place = place_of(module.__name__, is_package=hasattr(module, "__path__"))
        if file is None or place in found or (content := _content(file)) is None:
            continue
        path = _originals.get(str(file), str(file))
        found[place] = Source(path=path, content=content)
        left += [
            sys.modules[name]
            for name in _imported(module.__name__, module.__package__, content)
            if name in sys.modules
            and (name.partition(".")[0] == package != ROOT.name or _is_users(name))
        ]
    return found


def _imported(name: str, package: str | None, content: bytes) -> Iterator[str]:
    """Yields the names that may be modules which a source imports, and its packages."""
    names = [name]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package)
            names += [f"{base}.{alias.name}" for alias in node.names]
    for dotted in names:
        parts = dotted.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _is_users(name: str) -> bool:
    """Returns whether a module is neither of this package nor installed."""
    file = _file(sys.modules.get(name))
    return file is not None and not any(
        file.is_relative_to(folder) for folder in (ROOT, *INSTALLED)
    )


def sources(names: Sequence[str]) -> dict[str, Source]:
    """Returns the sources of loaded plug-ins, and of modules that extend the package.

    Args:
        names: `config.plugins`.
    """
    found: dict[str, Source] = {}
    for name in names:
        found |= _loaded[module_of(name)]
    for name in sorted(sys.modules):
        is_inside = name.startswith("finetune_jax.")
        if is_inside and _is_users(name):
            found |= _sources(sys.modules[name])
    return found


def record(names: Sequence[str], workdir: pathlib.Path) -> None:
    """Copies the sources of a run's plug-ins to its workdir.

    Args:
        names: `config.plugins`, loaded.
        workdir: Workdir of the run.
    """
    files, folder = sources(names), workdir / FOLDER
    if not files:
        return
    for place, source in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(source.content)
    index = {
        "plugins": [module_of(name) for name in names],
        "files": {
            place: {"path": source.path, "sha256": source.sha256}
            for place, source in sorted(files.items())
        },
    }
    write_json(folder / INDEX, index)


def hand_over(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Copies the plug-ins of a run to the workdir of another one that repeats it."""
    if (workdir / FOLDER).is_dir():
        shutil.copytree(workdir / FOLDER, other / FOLDER, dirs_exist_ok=True)


def digests() -> dict[str, str]:
    """Returns the digest of each source of all loaded plug-ins, by its place."""
    files = {place: source for own in _loaded.values() for place, source in own.items()}
    return {place: source.sha256 for place, source in sorted(files.items())}


def _open(names: Sequence[str], workdir: pathlib.Path) -> list[str]:
    """Imports the copies in a workdir, and returns lines about changed originals.

    Raises:
        UserError: A copy is damaged, fails, or another version of it is imported.
    """
    folder = (workdir / FOLDER).resolve()
    modules, files = _index(folder)
    problems = []
    if missing := set(modules) - {module_of(name) for name in names}:
        text = (
            f"{tuple(names)}, but the run in {workdir} also has "
            f"{', '.join(sorted(missing))}; add them, or give another --workdir"
        )
        problems.append(Problem(_KEY, text))
    copies, lines = {}, []
    for place, about in files.items():
        content = _content(folder / place)
        if content is None or hashlib.sha256(content).hexdigest() != about["sha256"]:
            problems.append(
                f"{folder / place}: damaged; its digest is not that in {INDEX}"
            )
            continue
        copies[place] = Source(path=about["path"], content=content)
        _originals[str(folder / place)] = about["path"]
        if _content(pathlib.Path(about["path"])) not in (None, content):
            lines.append(
                f"{about['path']} has changed since the run began; the copy in "
                f"{folder / place} is used"
            )
    raise_if(problems)
    _extend_paths(folder)
    problems += _stale(copies, modules)
    raise_if(problems)
    for module in modules:
        with collected(problems):
            _import_copy(module, copies)
    for name in names:
        if module_of(name) not in modules:
            with collected(problems):
                _load(name)
    raise_if(problems)
    return lines


def _index(folder: pathlib.Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Returns the modules and the files that the index of `plugins/` lists.

    Raises:
        UserError: The index is damaged.
    """
    try:
        found = json.loads((folder / INDEX).read_text())
        return list(found["plugins"]), dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: cannot be read: {error}") from error


def _extend_paths(folder: pathlib.Path) -> None:
    """Has Python find the copies in a folder first."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    for inside in sorted((folder / "finetune_jax").glob("**/")):
        package = sys.modules.get(".".join(inside.relative_to(folder).parts))
        paths: Any = getattr(package, "__path__", None)
        # A package that is not imported yet looks at `sys.path`.
        if isinstance(paths, list) and str(inside) not in paths:
            paths.insert(1, str(inside))


def _stale(copies: dict[str, Source], modules: Sequence[str]) -> list[str]:
    """Returns problems of modules that this process has imported in another version."""
    places = {place_of(module) for module in modules}
    problems = []
    for place, copy in copies.items():
        name = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        file = _file(sys.modules.get(name))
        if place in places or file is None or _content(file) == copy.content:
            continue
        problems.append(
            f"{file}: imported, but the run has another version of it; start a new "
            "process that does not import it"
        )
    return problems


def _import_copy(module: str, copies: dict[str, Source]) -> None:
    """Imports the copy of a plug-in unless the same source is loaded.

    Raises:
        UserError: It fails.
    """
    known, place = _loaded.get(module), place_of(module)
    if known is None or known[place].content != copies[place].content:
        sys.modules.pop(module, None)
        try:
            with registry.adding(module):
                note(importlib.import_module(module))
        except UserError:
            raise
        except Exception as error:
            text = f"{place} in the workdir fails with {type(error).__name__}: {error}"
            raise UserError(Problem(_KEY, text)) from error
