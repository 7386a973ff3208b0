"""A tag for every word of a text: its first token has it, all others have none."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.data.labels import Classes, classes_of, spelling_of
from finetune_jax.data.text.token_counts import TokenCounts
from finetune_jax.data.text.tokens import Rows, TextOptions, is_unicode, missing_columns

# The label of places that have none.
NONE = -1


def words_of(value: Any) -> list[str] | None:
    """Returns the words of a cell: a list of them, or a text cut at spaces.

    >>> words_of("EU rejects"), words_of(["New York", "."]), words_of(3)
    (['EU', 'rejects'], ['New York', '.'], None)
    """
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    return None


def word_problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns the rows of a file whose texts have no words."""
    (column,), problems = options.text, missing_columns(rows, options.text)
    if problems:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        words, at = words_of(row.get(column)), f"{rows.where}, {rows.unit} {line}"
        if words is None:
            problems.append(f"{at}: {column!r} is {row.get(column)!r}, not words")
        elif not words or not all(word.strip() for word in words):
            problems.append(f"{at}: {column!r} is empty, or one of its words")
        elif not all(map(is_unicode, words)):
            problems.append(f"{at}: {column!r} has half a character (a surrogate)")
    return problems


def tag_problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns the rows of a file that have not a tag for every word."""
    problems = missing_columns(rows, (*options.text, options.label))
    problems = problems or word_problems(rows, options)
    if problems:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        at = f"{rows.where}, {rows.unit} {line}"
        words = words_of(row[options.text[0]]) or []
        tags = words_of(row.get(options.label))
        if tags is None:
            problems.append(f"{at}: {options.label!r} is not tags")
        elif len(words) != len(tags):
            problems.append(f"{at}: {len(words)} words, but {len(tags)} tags")
        elif any(spelling_of(tag) is None for tag in tags):
            problems.append(f"{at}: {options.label!r} has a tag that is blank or NaN")
    return problems


def encode_words(
    encoder: Any, texts: Sequence[Sequence[str]], counts: TokenCounts
) -> tuple[list[tuple[list[int], list[int]]], list[list[int | None]]]:
    """Returns ids and sentences of each text, and of each token the word that it begins.

    Args:
        encoder: From `make_encoder`.
        texts: Words of each.
        counts: The tokens are added.
    """
    found = encoder.encode_batch([list(words) for words in texts], is_pretokenized=True)
    counts.add(found)
    tokens = [(one.ids, [kind + 1 for kind in one.type_ids]) for one in found]
    begins = [
        [word if word != last else None for last, word in pairs]
        for pairs in (itertools.pairwise((None, *one.word_ids)) for one in found)
    ]
    return tokens, begins


def tag_classes(tags: Mapping[str, Sequence[Sequence[str]]], where: str) -> Classes:
    """Returns the tags as classes; 'O', which is no entity, comes first.

    Args:
        tags: Tag of each word, by split.
        where: Start of the messages.
    """
    counts = collections.Counter(
        tag for rows in tags.values() for row in rows for tag in row
    )
    found = classes_of(counts, where, unit="words")
    names = sorted(found.names, key=lambda name: name != "O")
    places = [names.index(name) for name in found.names]
    index = {text: places[at] for text, at in found.index.items()}
    return dataclasses.replace(found, names=tuple(names), index=index)


def tag_labels(
    begins: Mapping[str, Sequence[Sequence[int | None]]],
    tags: Mapping[str, Sequence[Sequence[str]]],
    length: int,
    index: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Returns the tag of every place, [N, length] by split.

    Args:
        begins: From `encode_words`, by split.
        tags: Tag of each word, by split.
        length: Length of the texts.
        index: Class index by tag.
    """
    found = {}
    for split, rows in begins.items():
        label = np.full((len(rows), length), NONE, np.int32)
        for row, (places, own) in enumerate(zip(rows, tags[split])):
            for place, word in enumerate(places):
                if word is not None:
                    label[row, place] = index[own[word]]
        found[split] = label
    return found
