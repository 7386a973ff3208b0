"""From rows of a table to a source of tokens with labels."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.core.errors import first_of, problems_error
from finetune_jax.data.labels import Classes, classes_of, spelling_of
from finetune_jax.data.rounding import rounding_doubt
from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.data.text.questions import answer_problems, asked_in, encode_questions
from finetune_jax.data.text.tags import (
    encode_words,
    tag_classes,
    tag_labels,
    tag_problems,
    words_of,
)
from finetune_jax.data.text.token_counts import TokenCounts, counts_for
from finetune_jax.data.text.tokens import (
    Rows,
    TextOptions,
    TextSpec,
    encode,
    make_encoder,
    packed,
    text_problems,
    vocabulary_of,
)

_SHOWN = 50


def text_source(
    name: str, splits: Mapping[str, Rows], options: TextOptions, tokenizer: str | None
) -> tuple[Source, TextSpec]:
    """Returns a source of tokens, and what is known of them.

    Args:
        name: For messages.
        splits: Rows by split.
        options: Of the data.
        tokenizer: What a tokenizer.json holds.

    Raises:
        UserError: Lists columns that are missing, texts and labels that are empty, and
            what no tokenizer is.
    """
    find = {"tags": tag_problems, "answers": answer_problems}.get(
        options.labels, _problems
    )
    problems = [text for rows in splits.values() for text in find(rows, options)]
    if tokenizer is None:
        problems.append(
            "config.data.tokenizer: texts need one, and none lies beside the weights; "
            "give its address, such as file:DIR/tokenizer.json or hf:OWNER/REPO"
        )
    if problems:
        problems = first_of(problems, _SHOWN)
        raise problems_error(f"The data {name} cannot be used:", problems)
    assert tokenizer is not None
    encoder = make_encoder(tokenizer, options.max_tokens)
    warnings = tuple(text for rows in splits.values() for text in rows.warnings)
    counts = counts_for(encoder, options.max_tokens)
    if options.labels == "answers":
        source, spec = _asked(name, splits, options, encoder, counts)
        warnings = (*warnings, *counts.lines())
        return dataclasses.replace(source, warnings=warnings), spec
    if options.labels == "tags":
        examples, classes = _tagged(splits, options, encoder, counts)
    else:
        examples, classes = _labelled(splits, options, encoder, counts)
    if classes.problems and options.labels != "numbers":
        raise problems_error(f"The data {name} cannot be used:", classes.problems)
    source = Source(
        name=name,
        splits=examples,
        class_names=classes.names,
        targets=(options.label,) if options.labels == "numbers" else (),
        fingerprint=lambda: _fingerprint(examples),
        warnings=(*warnings, *classes.warnings, *counts.lines()),
    )
    return source, TextSpec(options=options, vocabulary=vocabulary_of(encoder))


def _labelled(
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
) -> tuple[dict[str, ArrayExamples], Classes]:
    """Returns the examples by split, one label each, and the classes."""
    label, classes = _labels(
        {
            split: [r[options.label] for r in rows.cells]
            for split, rows in splits.items()
        },
        options,
    )
    tokens = {
        split: encode(encoder, [_sentences(row, options) for row in rows.cells], counts)
        for split, rows in splits.items()
    }
    return _examples(tokens, label, options), classes


def _tagged(
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
) -> tuple[dict[str, ArrayExamples], Classes]:
    """Returns the examples by split, a tag for each word, and the tags as classes."""
    tokens, begins, tags = {}, {}, {}
    for split, rows in splits.items():
        words = [words_of(row[options.text[0]]) or [] for row in rows.cells]
        tokens[split], begins[split] = encode_words(encoder, words, counts)
        tags[split] = [words_of(row[options.label]) or [] for row in rows.cells]
    classes = tag_classes(tags, f"config.data.label: {options.label!r}")
    label = tag_labels(begins, tags, _length(tokens, options), classes.index)
    return _examples(tokens, label, options), classes


def _asked(
    name: str,
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
) -> tuple[Source, TextSpec]:
    """Returns windows of the passages of questions, and what is known of them."""
    asked = {k: asked_in(rows, options, answered=True) for k, rows in splits.items()}
    together = [one for rows in asked.values() for one in rows]
    windows = encode_questions(encoder, together, options)
    counts.add_windows(ids for ids, _ in windows.tokens)
    ends = np.cumsum([len(rows) for rows in asked.values()])[:-1]
    groups = dict(zip(asked, np.split(windows.sizes, ends)))
    stops = np.cumsum([sizes.sum() for sizes in groups.values()])
    rows = {
        split: slice(stop - groups[split].sum(), stop)
        for split, stop in zip(groups, stops)
    }
    tokens = {split: windows.tokens[where] for split, where in rows.items()}
    label = {split: windows.label[where] for split, where in rows.items()}
    examples = _examples(tokens, label, options)
    answers = repr([one.answers for one in together]).encode()
    source = Source(
        name=name,
        splits=examples,
        class_names=(),
        fingerprint=lambda: _fingerprint(examples, answers),
        groups=groups,
        notes=windows.notes,
    )
    return source, TextSpec(
        options=options,
        vocabulary=vocabulary_of(encoder),
        unanswerable=any(not one.answers for one in together),
    )


def _length(tokens: Mapping[str, Any], options: TextOptions) -> int:
    return options.padded(max(len(ids) for rows in tokens.values() for ids, _ in rows))


def _examples(
    tokens: Mapping[str, Any], label: Mapping[str, np.ndarray], options: TextOptions
) -> dict[str, ArrayExamples]:
    length = _length(tokens, options)
    return {
        split: ArrayExamples(values=packed(rows, length), label=label[split])
        for split, rows in tokens.items()
    }


def _problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns what of a file cannot be used."""
    problems = text_problems(rows, options, (options.label,))
    if options.label not in rows.columns:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        value, at = row.get(options.label), f"{rows.where}, line {line}"
        if spelling_of(value) is None:
            problems.append(f"{at}: {options.label!r} is empty or NaN")
        elif isinstance(value, list | dict):
            problems.append(f"{at}: {options.label!r} is {value!r}, not one label")
        elif options.labels == "numbers" and not _is_number(value):
            problems.append(f"{at}: {options.label!r} is {value!r}, not a number")
    return problems


def _is_number(value: Any) -> bool:
    try:
        return bool(np.isfinite(np.float32(value)))
    except (ValueError, TypeError, OverflowError):
        return False


def _labels(
    given: Mapping[str, list], options: TextOptions
) -> tuple[dict[str, np.ndarray], Classes]:
    """Returns the labels of each split, and the classes if they are such."""
    if options.labels == "numbers":
        numbers = {k: np.array(v, np.float32).reshape(-1, 1) for k, v in given.items()}
        wide = np.concatenate([np.array(v, np.float64) for v in given.values()])
        doubt = rounding_doubt(wide, f"config.data.label: {options.label!r}")
        warnings = (doubt,) if doubt else ()
        return numbers, Classes(names=(), index={}, warnings=warnings)
    spelled = {
        split: [str(spelling_of(value)) for value in values]
        for split, values in given.items()
    }
    counts = collections.Counter(text for texts in spelled.values() for text in texts)
    classes = classes_of(counts, f"config.data.label: {options.label!r}")
    return {split: classes.of(texts) for split, texts in spelled.items()}, classes


def _sentences(row: Mapping[str, Any], options: TextOptions) -> tuple[str, ...]:
    return tuple(row[column] for column in options.text)


def _fingerprint(splits: Mapping[str, ArrayExamples], rest: bytes = b"") -> str:
    digester = hashlib.sha256(rest)
    for name, examples in sorted(splits.items()):
        digester.update(f"{name}{examples.values.shape}".encode())
        digester.update(examples.values.data)
        digester.update(examples.label.data)
    return digester.hexdigest()
