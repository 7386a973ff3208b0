"""`squad`: questions on passages, in the JSON files in which SQuAD is published.

`config.data.dir` is a folder with train.json, dev.json, test.json, or one file; what
follows `-v` in a name, as in train-v2.0.json, is no part of the split. The columns are
id, title, question, context and answers.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import UserError, first_of
from finetune_jax.core.text_lines import decoded
from finetune_jax.data.text.tokens import Rows

KINDS = ("text",)
COLUMNS = ("id", "title", "question", "context", "answers")
_SHOWN = 20


def read(path: pathlib.Path, header: Sequence[str]) -> Rows:
    """Returns the questions of a file, numbered from 1 on.

    Raises:
        UserError: Not UTF-8, not JSON; or lists deviations from SQuAD's form.
    """
    if header:
        raise UserError("config.data.header: the files of SQuAD name their values")
    text = decoded(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    problems: list[str] = []
    cells = [
        {
            "id": question.get("id"),
            "title": article.get("title"),
            "question": question.get("question"),
            "context": paragraph.get("context"),
            "answers": question.get("answers"),
        }
        for place, article in _entries(content, "data", "", problems)
        for inner, paragraph in _entries(article, "paragraphs", place, problems)
        for _, question in _entries(paragraph, "qas", inner, problems)
    ]
    if problems:
        lines = [f"{path}: {problem}" for problem in problems]
        raise UserError("\n  ".join(first_of(lines, _SHOWN)))
    return Rows(
        where=str(path),
        columns=COLUMNS,
        cells=cells,
        lines=range(1, len(cells) + 1),
        unit="question",
    )


def _entries(
    holder: Mapping[str, Any], key: str, place: str, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the objects of a list and where they are; adds other entries to problems."""
    found = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(found, list):
        problems.append(
            f"{place or 'the file'} has no list {key!r}, as in SQuAD's files"
        )
        return
    for number, entry in enumerate(found):
        where = f"{place}.{key}[{number}]".removeprefix(".")
        if isinstance(entry, Mapping):
            yield where, entry
        else:
            problems.append(f"{where} is no object")


READ = read
SUFFIX = ".json"
