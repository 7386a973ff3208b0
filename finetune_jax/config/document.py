"""`python -m finetune_jax.config.document > docs/config.md`: every key of the config."""

import re
from collections.abc import Iterator

from finetune_jax.config.fields import A_KIND, Key, Section, keys_of
from finetune_jax.config.schema import Config, Seeds

HEADER = """\
# Every key of the config

A config file begins with `configs.default()` and sets the keys that differ; the command
line overrides them, as in `--config.data.batch_size=32` or
`--config.plan[0].peak_lr=0.01`. This page is written by
`python -m finetune_jax.config.document > docs/config.md`.
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
    kind = re.sub("^an? ", "", A_KIND[key.kind])
    kind += " or None" if key.is_optional else ""
    found = key.range()
    if choices := key.limits.get("choices"):
        found = ", ".join(f"`{choice!r}`" for choice in choices)
    if each := key.limits.get("each"):
        found = f"items: {each if isinstance(each, str) else ', '.join(each)}"
    cells = (f"`{key.name}`", kind, f"`{key.default!r}`", found, key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(document())
