"""The configuration: filled with defaults, overridden and checked.

A config file has `get_config(arg="")` that returns a ConfigDict; it names what differs
from `default()`. Numbers, strings and tuples only.
"""

import ast
import functools
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from finetune_jax.config.schema import (
    ACCEPTED,
    CHOICES,
    ENTRIES,
    MOST_CLASSES,
    NO_RESULT_DEPENDS_ON,
    OPEN_ENTRIES,
    OPEN_SECTIONS,
    OPTIONAL,
    POSITIVE,
    SEEDS,
    Config,
    default,
)
from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import closest


def load(address: str) -> Config:
    """Returns what the config file FILE[:ARG] gives, defaults not yet filled in.

    Raises:
        UserError: No such file, or one that fails or returns something else.
    """
    path, _, argument = address.partition(":")
    file = user_path(path, "--config")
    if not file.is_file():
        near = [str(p) for p in sorted(file.parent.glob("*.py"))]
        raise UserError(
            f"--config: no file {path!r}{closest(path, near)} "
            "A config is a Python file with get_config()."
        )
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path!r} is not a Python file with get_config().")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except Exception as error:
        kind = type(error).__name__
        raise UserError(
            f"--config={address}: the file fails with {kind}: {error}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={path}: get_config() returned a {type(config)}")
    return config


def resolve(
    config: Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()
) -> tuple[Config, list[str]]:
    """Returns the config with every key, and all that is wrong with it.

    Args:
        config: What a config file gives.
        overrides: (key, text) pairs of the command line, such as ("plan[0].steps", "7").
    """
    problems: list[str] = []
    full = default()
    with full.unlocked():
        _fill(full, config, "", problems)
        for key, text in overrides:
            _override(full, key, text, problems)
    if not problems:
        problems += _range_problems(full)
    return full.lock(), problems


def _fill(full: Any, given: Mapping, path: str, problems: list[str]) -> None:
    for key in given:
        name, value = f"{path}{key}", given[key]
        if name == "seed":
            _divide_seed(full, hasattr(value, "keys"))
        if key not in full:
            if path[:-1] in OPEN_SECTIONS:
                full[key] = _as_tuple(value)
            else:
                problems.append(f"config.{name}: unknown{closest(key, full)}")
        elif name in ENTRIES:
            if not isinstance(value, tuple | list):
                problems.append(f"config.{name}: {value!r} is not a tuple")
                continue
            full[key] = tuple(
                entry_of(name, entry, f"{name}[{index}].", problems)
                for index, entry in enumerate(value)
            )
        elif isinstance(full[key], ml_collections.ConfigDict):
            if hasattr(value, "keys"):
                _fill(full[key], value, f"{name}.", problems)
            else:
                problems.append(f"config.{name}: {value!r} is not a section")
        else:
            _assign(full, key, value, name, problems)


def entry_of(
    table: str,
    entry: Mapping[str, Any],
    path: str = "",
    problems: list[str] | None = None,
) -> Config:
    """Returns one entry of a table with every field; optional ones are placeholders.

    Args:
        table: A key of `ENTRIES`.
        entry: What the config says.
        path: Stands before the names in the messages.
        problems: Takes them.
    """
    found: list[str] = [] if problems is None else problems
    full = ml_collections.ConfigDict()
    for key, value in ENTRIES[table].items():
        kind = OPTIONAL[table].get(key)
        full[key] = value if kind is None else config_dict.placeholder(kind)
    if not hasattr(entry, "keys"):
        found.append(
            f"config.{path[:-1]}: a {type(entry).__name__}, not a ConfigDict; "
            "plan.as_config makes a plan of phases"
        )
        entry = {}
    for key in entry:
        if key not in full and table in OPEN_ENTRIES:
            full[key] = _as_value(entry[key])
        elif key not in full:
            found.append(f"config.{path}{key}: unknown{closest(key, full)}")
        elif isinstance(full[key], ml_collections.ConfigDict):
            if not hasattr(entry[key], "keys"):
                found.append(f"config.{path}{key}: {entry[key]!r} is not a dict")
                continue
            full[key] = ml_collections.ConfigDict(dict(entry[key]))
        else:
            _assign(full, key, entry[key], f"{path}{key}", found)
    return full.lock()


def _assign(section: Any, key: str, value: Any, name: str, problems: list) -> None:
    """Sets a key to a value of its type; an int serves as a float, a list as a tuple."""
    kind = section.get_type(key)
    if kind is tuple and isinstance(value, list | tuple):
        value = _as_tuple(value)
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is kind or (value is None and _is_optional(name)):
        section[key] = value
    else:
        problems.append(f"config.{name}: {value!r} is not {_A_KIND.get(kind, kind)}")


_A_KIND = {
    int: "an integer", float: "a number", str: "a string", tuple: "a tuple",
    bool: "True or False",
}  # fmt: skip


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _as_value(value: Any) -> Any:
    is_section = hasattr(value, "keys")
    return ml_collections.ConfigDict(dict(value)) if is_section else _as_tuple(value)


def _is_open(path: str) -> bool:
    """Returns whether a section, or an entry of a table, takes keys of any name."""
    return path in OPEN_SECTIONS or re.sub(r"\[\d+\]$", "", path) in OPEN_ENTRIES


def _is_optional(name: str) -> bool:
    table, inside, key = name.partition("[")
    if inside:
        return key.rpartition(".")[2] in OPTIONAL[table]
    return name in _optional_keys()


@functools.cache
def _optional_keys() -> frozenset[str]:
    return frozenset(key for key, value in flat(default()).items() if value is None)


def _divide_seed(config: Any, divided: bool) -> None:
    """Makes `seed` a section with a seed for each source, or one number."""
    if divided == hasattr(config.seed, "keys"):
        return
    before = config.seed
    del config["seed"]
    config.seed = (
        ml_collections.ConfigDict(dict.fromkeys(SEEDS, before)) if divided else 0
    )


def seeds(config: Config) -> dict[str, int]:
    """Returns the seed of each source of randomness."""
    if hasattr(config.seed, "keys"):
        return config.seed.to_dict()
    return dict.fromkeys(SEEDS, config.seed)


def _override(config: Any, key: str, text: str, problems: list[str]) -> None:
    """Sets what `--config.KEY=TEXT` names; `plan[0].steps` reaches into the plan."""
    if key.partition(".")[0] == "seed":
        _divide_seed(config, "." in key)
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", key)
    section, seen = config, ""
    for part in parts[:-1]:
        inside = part.startswith("[")
        is_section = part.endswith("_args") or (part == "head" and "[" in seen)
        if _is_open(seen) and is_section and part not in section:
            with section.unlocked():
                section[part] = ml_collections.ConfigDict()
        position: Any = int(part[1:-1]) if inside else part
        try:
            section = section[position]
        except (KeyError, IndexError, TypeError, AttributeError):
            names = list(section) if hasattr(section, "keys") else []
            size = f"; {seen} has {len(section)} entries" if inside else ""
            problems.append(f"--config.{key}: no {part!r}{size}{closest(part, names)}")
            return
        seen += part if inside or not seen else f".{part}"
    name = parts[-1] if parts else ""
    # What a member says of its head stands before what `model` says.
    is_open = _is_open(seen) or seen.endswith(("_args", "].head"))
    if name and is_open and name not in section:
        with section.unlocked():
            section[name] = _as_tuple(_parse(text, object))
    elif not hasattr(section, "keys") or name not in section:
        names = list(section) if hasattr(section, "keys") else []
        problems.append(f"--config.{key}: unknown{closest(name, names)}")
    elif isinstance(section[name], ml_collections.ConfigDict) or key in ENTRIES:
        problems.append(f"--config.{key}: a section; set one of its keys")
    else:
        value = _parse(text, section.get_type(name))
        if section.get_type(name) is tuple and not isinstance(value, tuple | str):
            value = (value,)
        _assign(section, name, value, key, problems)


def _parse(text: str, kind: type) -> Any:
    if kind is str:
        return None if text == "None" else text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _range_problems(config: Config) -> list[str]:
    values = flat(config)
    problems = []
    for name in POSITIVE:
        if values[name] is not None and not 0 < values[name] < math.inf:
            problems.append(f"config.{name}: {values[name]}; more than 0 is needed")
    for name, value in values.items():
        largest = MOST_CLASSES if name == "model.classes" else 2**31 - 1
        if type(value) is int and value > largest and not name.startswith("seed"):
            problems.append(f"config.{name}: {value}; at most {largest} is possible")
    for name, allowed in CHOICES.items():
        value = values[name]
        if value not in allowed and not (value is None and _is_optional(name)):
            hint = closest(str(value), map(str, allowed))
            problems.append(f"config.{name}: {value!r} is not one of {allowed}{hint}")
    decay = values["evaluate.ema_decay"]
    if decay is not None and not 0 <= decay < 1:
        problems.append(
            f"config.evaluate.ema_decay: {decay}; 0 or more and less than 1 is needed"
        )
    for name in ("data.memory_gb", "data.cache_gb"):
        if not values[name] >= 0:
            problems.append(f"config.{name}: at least 0 is needed")
    if values["data.cache_views"] and values["data.mix"]:
        problems.append(
            "config.data.cache_views: config.data.mix makes others in every update, "
            "which cannot be kept"
        )
    for name in ("data.split_seed", *(k for k in values if k.startswith("seed"))):
        if not 0 <= values[name] < 2**32:
            found = values[name]
            problems.append(f"config.{name}: {found}; 0 to 2**32 - 1 is needed")
    for name in ("data.mean", "data.std"):
        if values[name] is None:
            continue
        if not values[name] or any(type(v) not in (int, float) for v in values[name]):
            problems.append(f"config.{name}: {values[name]!r}; numbers are needed")
        elif name == "data.std" and not all(v > 0 for v in values[name]):
            problems.append(f"config.{name}: {values[name]!r}; more than 0 is needed")
    if values["evaluate.every_steps"] and values["evaluate.every_epochs"]:
        problems.append("config.evaluate: give every_steps or every_epochs, not both")
    for pattern in config.init.fresh:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            problems.append(f"config.init.fresh: {pattern!r} is no regex: {error}")
    for name in config.init.accept:
        if name not in ACCEPTED:
            hint = closest(str(name), ACCEPTED)
            problems.append(
                f"config.init.accept: {name!r} is not one of {ACCEPTED}{hint}"
            )
    if config.init.entry is not None and config.init.pretrained is None:
        problems.append(
            f"config.init.entry: {config.init.entry!r}, but config.init.pretrained is None"
        )
    return problems


def tiny(config: Config) -> Config:
    """Returns a config made small: two updates a phase, for tests and a first look."""
    for entry in config.plan:
        entry.epochs, entry.steps = None, 2
        entry.warmup_steps = min(entry.warmup_steps, 1)
    config.evaluate.every_epochs, config.evaluate.every_steps = None, 1
    config.report.every_steps = 1
    return config


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns every value by its dotted key; `plan[0].steps` for those of a phase.

    >>> flat({"a": {"b": 1}, "plan": ({"steps": 2},)})
    {'a.b': 1, 'plan[0].steps': 2}
    """
    values: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if hasattr(value, "keys"):
            values |= flat(value, f"{path}{key}.")
        elif f"{path}{key}" in ENTRIES:
            for index, entry in enumerate(value):
                values |= flat(entry, f"{path}{key}[{index}].")
        else:
            values[f"{path}{key}"] = value
    return values


def to_json(config: Config) -> str:
    """Returns the config as JSON text; tuples become lists."""
    plain = config.to_dict()
    for table in ENTRIES:
        section, _, key = table.rpartition(".")
        holder = plain[section] if section else plain
        holder[key] = [entry.to_dict() for entry in holder[key]]
    return json.dumps(plain, indent=2) + "\n"


def from_json(text: str, where: str) -> Config:
    """Returns the resolved config that `to_json` wrote.

    Raises:
        UserError: Not such a file, or keys that this version does not know.
    """
    try:
        config, problems = resolve(json.loads(text))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: not the config of a run: {error}") from error
    if problems:
        raise UserError("\n  ".join([f"{where} does not fit this version:", *problems]))
    return config


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two configs differ, results depending on them."""
    one, other = flat(ours), flat(theirs)
    missing = "(not there)"
    return [
        f"config.{key}: {one.get(key, missing)!r} here, {other.get(key, missing)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key, missing) != other.get(key, missing)
        and not any(
            key == free or key.startswith(f"{free}.") for free in NO_RESULT_DEPENDS_ON
        )
    ]
