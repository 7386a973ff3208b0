"""Writes pages from the templates in this folder."""

import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from finetune_jax.core.files import write_text
from finetune_jax.report import plots
from finetune_jax.report.html import formats

_OLD_ENTRY = "finetune_jax/main.py"


def write_html(
    template: str, path: pathlib.Path, *, by_many: bool = False, **values: Any
) -> None:
    """Writes a page: self-contained, and the same bytes for the same values.

    Args:
        template: Name of the template.
        path: Path of the page.
        by_many: Whether several processes may write it at the same time.
        **values: Values that the template reads.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "capitalised": formats.capitalised,
        "count": formats.count_text,
        "flat": flat,
        "metric": lambda value, name: formats.metric_text(name, value),
        "metric_title": formats.metric_title,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "percent": formats.percent,
        "rate": formats.rate_text,
        "short": plots.shortened,
        "thumbnail": plots.thumbnail,
        "time": formats.time_text,
    }
    text = environment.get_template(template).render(**values)
    # References instead of letters: readable whatever the encoding of files here, and
    # of names in them.
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.encode("ascii", "xmlcharrefreplace").decode("ascii")
    write_text(path, text, by_many=by_many)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested dicts by dotted key.

    >>> list(flat({"a": {"b": 1}, "c": ["x", "y"], "d": None}))
    [('a.b', '1'), ('c', 'x y'), ('d', '–')]
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            yield f"{prefix}{key}", "–" if value in (None, "") else str(value)


def words_of(command: Sequence[str]) -> list[str]:
    """Returns the words of a run's command, `python -m finetune_jax.main` first.

    >>> words_of(["/bin/python3", "/x/finetune_jax/main.py", "--config=a"])
    ['python', '-m', 'finetune_jax.main', '--config=a']
    """
    if command[1:] and command[1].endswith(_OLD_ENTRY):
        return ["python", "-m", "finetune_jax.main", *command[2:]]
    return list(command)


def flags_of(command: Sequence[str]) -> dict[str, str]:
    """Returns the values of a command's flags by name.

    >>> flags_of(["python", "x.py", "--config=a.py:b", "--workdir", "w", "--config.seed=3"])
    {'config': 'a.py:b', 'workdir': 'w', 'config.seed': '3'}
    """
    found, words = {}, iter(command)
    for word in words:
        if word.startswith("--"):
            name, is_joined, value = word[2:].partition("=")
            found[name] = value if is_joined else next(words, "")
    return found


def identity(
    manifest: Mapping[str, Any], workdir: str
) -> Iterator[tuple[str, str, str]]:
    """Yields what tells one run from another: label, value and a note.

    Args:
        manifest: Content of `manifest.json`; entries that it lacks are left out.
        workdir: Workdir of the run, or of the population.
    """
    if began := manifest.get("began"):
        day, _, clock = str(began).partition("T")
        yield "Began", f"{day} {clock[:5]}", ""
    flags = flags_of(manifest.get("command") or [])
    changed = [
        f"{name.removeprefix('config.')}={value}"
        for name, value in flags.items()
        if name.startswith("config.")
    ]
    if flags.get("config"):
        yield "Config", flags["config"], ", ".join(changed)
    if manifest.get("seed") is not None:
        yield "Seed", str(manifest["seed"]), ""
    if workdir:
        yield "Workdir", workdir, ""
