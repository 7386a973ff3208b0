"""Every key of the config, as text: docs/config.md, `--help=config`, `--mode=config`.

`.venv/bin/python -m finetune_jax.config.document > docs/config.md` writes the page.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_jax.config.fields import A_KIND, Key, Section, keys_of, plain
from finetune_jax.config.schema import Config, Seeds
from finetune_jax.core.errors import UserError
from finetune_jax.core.registry import closest

HEADER = """\
# Every key of the config

A config file begins with `configs.default()` and sets the keys that differ; the command
line overrides them, as in `--config.data.batch_size=32` or
`--config.plan[0].peak_lr=0.01`. This page is written by
`.venv/bin/python -m finetune_jax.config.document > docs/config.md`;
`.venv/bin/python -m finetune_jax.main --help=config.data` prints a part of it.
"""


def document() -> str:
    """Returns docs/config.md: a table of keys for each section."""
    return "\n".join([HEADER, *_section(Config, "config")])


def _section(of: type[Section], path: str) -> Iterator[str]:
    """Yields the lines about a section, and about those inside it."""
    yield f"## {path}\n\n{of.__doc__}\n"
    yield "| key | type | default | range | meaning |"
    yield "|---|---|---|---|---|"
    inside = []
    for key in keys_of(of).values():
        within = f"{key.name}" if path == "config" else f"{path}.{key.name}"
        if key.section is not None:
            inside.append((key.section, within))
            continue
        yield _row(key)
        if key.entry is not None:
            inside.append((key.entry, f"{within}[i]"))
    yield ""
    for section, place in inside:
        yield from _section(section, place)
    if of is Config:
        yield from _section(Seeds, "seed")


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", _kind(key), f"`{key.default!r}`", _range(key, "`"))
    cells += (key.meaning,)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(key: Key) -> str:
    kind = re.sub("^an? ", "", A_KIND[key.kind])
    return kind + (" or None" if key.is_optional else "")


def _range(key: Key, quote: str = "") -> str:
    found = key.range()
    if choices := key.limits.get("choices"):
        found = ", ".join(f"{quote}{choice!r}{quote}" for choice in choices)
    if each := key.limits.get("each"):
        found = f"items: {each if isinstance(each, str) else ', '.join(each)}"
    return found


def described(prefix: str) -> str:
    """Returns the keys below a prefix with type, default, range and meaning.

    Args:
        prefix: 'config', a section such as 'config.data', or one key.

    Raises:
        UserError: No key begins with it.
    """
    known = dict(_keys(Config, "config"))
    wanted = re.sub(r"\[\d+\]", "[i]", prefix)
    found = [
        name
        for name in known
        if name == wanted or name.startswith((f"{wanted}.", f"{wanted}["))
    ]
    if not found:
        sections = {name.rpartition(".")[0] for name in known}
        hint = closest(wanted, [*known, *sections])
        raise UserError(f"--help={prefix}: no such key{hint}")
    lines = []
    for name in found:
        key = known[name]
        limits = _range(key)
        lines.append(
            f"{name} = {key.default!r}  ({_kind(key)}{'; ' if limits else ''}{limits})"
        )
        lines += textwrap.wrap(
            key.meaning, 84, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def _keys(of: type[Section], path: str) -> Iterator[tuple[str, Key]]:
    """Yields each key below a section, with its dotted name."""
    for key in keys_of(of).values():
        name = f"{path}.{key.name}"
        if key.section is None:
            yield name, key
        if key.section is not None:
            yield from _keys(key.section, name)
        if key.entry is not None:
            yield from _keys(key.entry, f"{name}[i]")
    if of is Config:
        yield from _keys(Seeds, f"{path}.seed")


def assignments(config: Config) -> Iterator[str]:
    """Yields a line of Python for each value; a comment has the default if it differs.

    Args:
        config: Resolved config.
    """
    yield from _assigned(Config, config, "config")


def _assigned(
    of: type[Section] | None, values: Mapping[str, Any], path: str
) -> Iterator[str]:
    """Yields the values of a section, and then those of the sections in it."""
    known = keys_of(of) if of is not None else {}
    inside: list[tuple[type[Section] | None, Mapping[str, Any], str]] = []
    for name in values:
        key, value, place = known.get(name), values[name], f"{path}.{name}"
        if key is not None and key.entry is not None and value:
            yield f"# {place}: {len(value)} of them, below."
            inside += [
                (key.entry, entry, f"{place}[{index}]")
                for index, entry in enumerate(value)
            ]
        elif key is not None and key.section is not None:
            inside.append((key.section, value, place))
        elif place == "config.seed" and hasattr(value, "keys"):
            inside.append((Seeds, value, place))
        else:
            yield _assignment(place, plain(value), key, of)
    for section, entry, place in inside:
        title = (section.__doc__ or "").splitlines()[0] if section else ""
        yield f"\n# {title}"
        yield from _assigned(section, entry, place)


def _assignment(place: str, value: Any, key: Key | None, of: type | None) -> str:
    line = f"{place} = {value!r}"
    if key is None:
        name = of.__name__.lower() if of is not None else ""
        return f"{line}  # an argument of this {name}"
    default = plain(key.default)
    return line if value == default else f"{line}  # default: {default!r}"


if __name__ == "__main__":
    print(document())
