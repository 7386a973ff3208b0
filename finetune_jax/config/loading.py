"""Config files, overrides and JSON, resolved to a typed `Config`.

A config file has `get_config(arg="")` that returns a ConfigDict; it names the keys that
differ from `default()`. Numbers, strings and tuples only.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from finetune_jax.config import plugins
from finetune_jax.config.fields import (
    LARGEST_INT,
    Key,
    Section,
    keys_of,
    limit_problems,
    plain,
)
from finetune_jax.config.schema import NO_RESULT_DEPENDS_ON, Config, Seeds
from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import closest

TABLES = ("plan", "evaluate.also", "model.members", "data.domains")


def load(address: str) -> Any:
    """Returns the ConfigDict of a file FILE[:ARG], without the keys that it does not name.

    Raises:
        UserError: No such file, or one that fails or returns no ConfigDict.
    """
    path, _, argument = address.partition(":")
    file = user_path(path, "--config")
    if not file.is_file():
        near = [str(p) for p in sorted(file.parent.glob("*.py"))]
        raise UserError(
            f"--config: no file {path!r}{closest(path, near)} "
            "A config is a Python file with get_config()."
        )
    module, in_function = f"config_{file.stem}", f"get_config() of {file.name}"
    try:
        with registry.adding(module):
            found = plugins.execute(module, file)
        with registry.adding(in_function):
            config = found.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:
        if argument and isinstance(error, ValueError):  # The file refuses the argument.
            raise UserError(f"--config={address}: {error}") from error
        kind = type(error).__name__
        raise UserError(
            f"--config={address}: the file fails with {kind}: {error}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={path}: get_config() returned a {type(config)}")
    if late := registry.added_by(in_function):
        raise UserError(
            f"--config={path}: get_config() adds the {', the '.join(late)}; add them at "
            "the top level of the file, which is executed again to open the workdir"
        )
    given: Any = config.get("plugins") or ()
    names = plugins.with_absolute_paths(given, file.parent)
    if registry.added_by(module):
        plugins.note(found)
        names = (*names, module)
    if names:
        with config.unlocked():
            config.plugins = names
    return config


def default() -> Any:
    """Returns a config with every key at its default; a config file starts from it."""
    config: Any = _as_config_dict(Config)
    config.lock()
    for name, known in keys_of(Config).items():
        if known.section is not None and known.section.is_open:
            config[name].unlock()
    return config


def entry_dict(
    of: type[Section], entry: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Returns an entry of a table as a ConfigDict with every key of its dataclass."""
    full = _as_config_dict(of)
    for name in entry:
        value = plain(entry[name])
        full[name] = ml_collections.ConfigDict(value) if type(value) is dict else value
    return full.lock()


def _as_config_dict(of: type[Section]) -> ml_collections.ConfigDict:
    full = ml_collections.ConfigDict()
    for name, known in keys_of(of).items():
        if known.section is not None:
            full[name] = _as_config_dict(known.section)
        elif known.default is None:
            full[name] = config_dict.placeholder(known.kind)
        elif known.kind is dict:
            full[name] = ml_collections.ConfigDict()
        else:
            full[name] = known.default
    return full


def resolve(
    given: Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()
) -> tuple[Config, list[Problem]]:
    """Returns the config with every key, and everything that is wrong with it.

    Args:
        given: ConfigDict of a config file, content of a config.json, or a config.
        overrides: (key, text) pairs of the command line, such as ("plan[0].steps", "7").
    """
    problems: list[Problem] = []
    tree = _defaults(Config)
    _fill(Config, tree, given, "config.", problems)
    for name, text in overrides:
        _override(tree, name, text, problems)
    config = _built(Config, tree)
    if not problems:
        problems += _section_problems(Config, config, "config.")
        problems += [
            Problem(f"config.{name}", f"{value}; at most {LARGEST_INT} is possible")
            for name, value in flat(config).items()
            if type(value) is int
            and value > LARGEST_INT
            and not name.startswith("seed")
        ]
    return config, list(dict.fromkeys(problems))


def _defaults(of: type[Section]) -> dict[str, Any]:
    return {
        name: _defaults(known.section) if known.section is not None else known.default
        for name, known in keys_of(of).items()
    }


def _fill(
    of: type[Section],
    tree: dict[str, Any],
    given: Mapping[str, Any],
    path: str,
    problems: list[Problem],
) -> None:
    """Sets the values of a section that are given, and appends what is wrong with them."""
    for name in given:
        value, place = given[name], f"{path}{name}"
        known = keys_of(of).get(name)
        is_section = hasattr(value, "keys")
        if known is None and of.is_open:
            tree[name] = plain(value)
        elif known is None:
            problems.append(Problem(place, f"unknown{closest(name, tree)}"))
        elif known.entry is not None:
            if isinstance(value, tuple | list):
                tree[name] = [
                    _entry(known.entry, entry, f"{place}[{index}]", problems)
                    for index, entry in enumerate(value)
                ]
            else:
                problems.append(Problem(place, f"{value!r} is not a tuple"))
        elif place == "config.seed" and is_section:
            tree[name] = _defaults(Seeds)
            _fill(Seeds, tree[name], value, f"{place}.", problems)
        elif known.section is None and known.kind is not dict:
            _assign(tree, known, value, place, problems)
        elif not is_section:
            kind = "a section" if known.section is not None else "a dict"
            problems.append(Problem(place, f"{value!r} is not {kind}"))
        elif known.section is not None:
            _fill(known.section, tree[name], value, f"{place}.", problems)
        else:
            tree[name] = dict(sorted(plain(value).items()))


def _entry(
    of: type[Section], entry: Any, place: str, problems: list[Problem]
) -> dict[str, Any]:
    tree = _defaults(of)
    if hasattr(entry, "keys"):
        _fill(of, tree, entry, f"{place}.", problems)
    else:
        text = (
            f"a {type(entry).__name__}, not a ConfigDict; plans.as_config makes a plan of "
            "phases"
        )
        problems.append(Problem(place, text))
    return tree


def _assign(
    tree: dict[str, Any], known: Key, value: Any, place: str, problems: list[Problem]
) -> None:
    try:
        tree[known.name] = known.as_kind(value)
    except TypeError as error:
        problems.append(Problem(place, str(error)))


def _built(of: type[Section], tree: Mapping[str, Any]) -> Any:
    """Returns the dataclass of a section; a ConfigDict if the section is open."""
    values = dict(tree)
    for name, known in keys_of(of).items():
        if known.entry is not None:
            values[name] = tuple(_built(known.entry, entry) for entry in tree[name])
        elif known.section is not None and not of.is_open:
            values[name] = _built(known.section, tree[name])
        elif name == "seed" and isinstance(tree[name], dict):
            values[name] = Seeds(**tree[name])
    return ml_collections.ConfigDict(values).lock() if of.is_open else of(**values)


def _section_problems(
    of: type[Section], values: Mapping[str, Any], path: str
) -> list[Problem]:
    """Returns the values of a section that are out of range or in conflict.

    Phases are checked by `plans.plan_problems`.
    """
    if of is Config and isinstance(values["seed"], Seeds):
        problems = limit_problems({**values, "seed": 0}, of)
        problems += [p.under("seed") for p in limit_problems(values["seed"], Seeds)]
    else:
        problems = limit_problems(values, of)
    problems += values.problems() if isinstance(values, Section) else []
    problems = [problem.under(path[:-1]) for problem in problems]
    for name, known in keys_of(of).items():
        if known.section is not None:
            problems += _section_problems(known.section, values[name], f"{path}{name}.")
        elif known.entry is not None and name != "plan":
            for index, entry in enumerate(values[name]):
                place = f"{path}{name}[{index}]."
                problems += _section_problems(known.entry, entry, place)
    return problems


def seeds(config: Config) -> dict[str, int]:
    """Returns the seed of each source of randomness."""
    if isinstance(config.seed, int):
        return dict.fromkeys(keys_of(Seeds), config.seed)
    return dict(config.seed)


def _override(
    tree: dict[str, Any], name: str, text: str, problems: list[Problem]
) -> None:
    """Sets the value that `--config.NAME=TEXT` names; `plan[0].steps` is in the plan."""
    parts, place = re.findall(r"[^.\[\]]+|\[\d+\]", name), f"--config.{name}"
    if parts[:1] == ["seed"]:
        _divide_seed(tree, "." in name)
    node: Any = tree
    of: Any = Config
    seen = ""
    for part in parts[:-1]:
        is_index = part.startswith("[")
        is_mapping = part.endswith("_args") or (part == "head" and "[" in seen)
        if of is not None and of.is_open and is_mapping and isinstance(node, dict):
            node.setdefault(part, {})
        try:
            node = node[int(part[1:-1]) if is_index else part]
        except (KeyError, IndexError, TypeError):
            names = list(node) if isinstance(node, dict) else []
            size = f"; {seen} has {len(node)} entries" if is_index and node else ""
            problems.append(Problem(place, f"no {part!r}{size}{closest(part, names)}"))
            return
        seen += part if is_index or not seen else f".{part}"
        if not is_index:
            known = keys_of(of).get(part) if of is not None else None
            of = known and (known.section or known.entry)
            of = Seeds if seen == "seed" else of
    last = parts[-1] if parts else ""
    known = keys_of(of).get(last) if of is not None else None
    is_free = of is None or of.is_open
    if not isinstance(node, dict) or not last or (known is None and not is_free):
        names = list(node) if isinstance(node, dict) else []
        problems.append(Problem(place, f"unknown{closest(last, names)}"))
    elif known is None:
        _override_free(node, last, text, place, problems)
    elif known.section is not None or known.entry is not None or known.kind is dict:
        problems.append(Problem(place, "a section; set one of its keys"))
    else:
        value = _parse(text, known.kind)
        if known.kind is tuple and not isinstance(value, tuple | str | None):
            value = (value,)
        _assign(node, known, value, f"config.{name}", problems)


def _override_free(
    node: dict[str, Any], name: str, text: str, place: str, problems: list[Problem]
) -> None:
    """Sets a key that no dataclass describes; one that is there keeps its type."""
    before = node.get(name)
    if before is None:
        node[name] = plain(_parse(text, object))
        return
    if isinstance(before, dict):
        problems.append(Problem(place, "a section; set one of its keys"))
        return
    value = _parse(text, type(before))
    if isinstance(before, tuple) and not isinstance(value, tuple | str):
        value = (value,)
    like = Key(name=name, kind=type(before))
    _assign(node, like, value, place.removeprefix("--"), problems)


def _divide_seed(tree: dict[str, Any], divided: bool) -> None:
    """Makes `seed` a section with a seed for each source, or one number."""
    if divided and not isinstance(tree["seed"], dict):
        tree["seed"] = dict.fromkeys(keys_of(Seeds), tree["seed"])
    elif not divided:
        tree["seed"] = 0


def _parse(text: str, kind: type) -> Any:
    if kind is str:
        return None if text == "None" else text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def tiny(config: Any) -> Any:
    """Returns a config file's config made small: two updates a phase, for a first look."""
    for entry in config.plan:
        entry.epochs, entry.steps = None, min(entry.steps or 2, 2)
        entry.warmup_steps = min(entry.warmup_steps, 1)
    config.evaluate.every_epochs, config.evaluate.every_steps = None, 1
    config.report.every_steps = 1
    return config


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns every value by its dotted key, such as `plan[0].steps`.

    >>> flat({"a": {"b": 1}, "plan": ({"steps": 2},)})
    {'a.b': 1, 'plan[0].steps': 2}
    """
    values: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if hasattr(value, "keys"):
            values |= flat(value, f"{path}{key}.")
        elif f"{path}{key}" in TABLES:
            for index, entry in enumerate(value):
                values |= flat(entry, f"{path}{key}[{index}].")
        else:
            values[f"{path}{key}"] = value
    return values


def to_json(config: Config) -> str:
    """Returns the config as JSON text; tuples become lists."""
    return json.dumps(plain(config.to_dict()), indent=2) + "\n"


def from_json(text: str, where: str) -> Config:
    """Returns the resolved config of a text that `to_json` wrote.

    Raises:
        UserError: No config, or keys that this version does not know.
    """
    try:
        config, problems = resolve(json.loads(text))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: not the config of a run: {error}") from error
    raise_if(problems, f"{where} is the config of another version:")
    return config


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two configs differ and that results depend on."""
    one, other = flat(ours), flat(theirs)
    missing = "(missing)"
    return [
        f"config.{key}: {one.get(key, missing)!r} here, {other.get(key, missing)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key, missing) != other.get(key, missing)
        and not any(
            key == free or key.startswith(f"{free}.") for free in NO_RESULT_DEPENDS_ON
        )
    ]
