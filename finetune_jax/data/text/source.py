"""Rows of a table of texts as a source of tokens with labels, or as inputs to predict."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune_jax.core.errors import UserError, first_of, raise_if
from finetune_jax.data.dataset import Dataset, unlabelled
from finetune_jax.data.labels import Classes, classes_of, spelling_of
from finetune_jax.data.rounding import rounding_doubt
from finetune_jax.data.source import ArrayExamples, Source, digest_of_arrays
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.text.questions import answer_problems, asked_in, encode_questions
from finetune_jax.data.text.tags import (
    encode_words,
    tag_classes,
    tag_labels,
    tag_problems,
    word_problems,
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
)

_SHOWN = 50
NO_CLASSES = Classes(names=(), index={})
# Ids and sentences of texts.
Tokens = Sequence[tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Texts of all splits as tokens, with labels.

    Attributes:
        tokens: Texts by split.
        label: Labels by split.
        classes: Classes of the labels; empty where there are none.
        groups: Number of texts of each question, by split; None: texts are independent.
        notes: Notes of all texts, as `Source` has them.
        unanswerable: Whether some questions have no answer.
        digested: Bytes that the fingerprint needs besides the arrays.
    """

    tokens: Mapping[str, Tokens]
    label: Mapping[str, np.ndarray]
    classes: Classes = NO_CLASSES
    groups: Mapping[str, np.ndarray] | None = None
    notes: np.ndarray | None = None
    unanswerable: bool = False
    digested: bytes = b""


class LabelForm(NamedTuple):
    """Functions for texts with one form of labels.

    Attributes:
        problems: Returns what cannot be used in a file with labels.
        input_problems: Returns what cannot be used in a file without labels.
        encode: Returns the texts of all splits by name, with stand-ins for labels if
            not `labelled`; takes the options, the tokenizer and the counts too.
    """

    problems: Callable[[Rows, TextOptions], list[str]]
    input_problems: Callable[[Rows, TextOptions], list[str]]
    encode: Callable[..., Encoded]


def text_source(
    name: str, splits: Mapping[str, Rows], options: TextOptions, tokenizer: str | None
) -> tuple[Source, TextSpec]:
    """Returns a source of tokens, and the texts' part of the spec.

    Args:
        name: Name of the source, for messages.
        splits: Rows by split.
        options: Options of the data.
        tokenizer: Text of a tokenizer.json.

    Raises:
        UserError: Lists missing columns, empty texts and labels, and a tokenizer that is
            missing or invalid.
    """
    form = FORMS[options.labels]
    problems = [
        text for rows in splits.values() for text in form.problems(rows, options)
    ]
    if tokenizer is None:
        problems.append(
            "config.data.tokenizer: texts need one, and none lies beside the weights; "
            "give its address, such as file:DIR/tokenizer.json or hf:OWNER/REPO"
        )
    raise_if(first_of(problems, _SHOWN), f"The data {name} cannot be used:")
    assert tokenizer is not None
    encoder = make_encoder(tokenizer, options.max_tokens)
    warnings = tuple(text for rows in splits.values() for text in rows.warnings)
    counts = counts_for(encoder, options.max_tokens)
    found = form.encode(splits, options, encoder, counts, labelled=True)
    raise_if(found.classes.problems, f"The data {name} cannot be used:")
    length = _length(found.tokens.values(), options)
    examples = {
        split: ArrayExamples(values=packed(rows, length), label=found.label[split])
        for split, rows in found.tokens.items()
    }
    source = Source(
        name=name,
        splits=examples,
        class_names=found.classes.names,
        targets=(options.label,) if options.labels == "numbers" else (),
        fingerprint=lambda: digest_of_arrays(examples, found.digested, dtypes=False),
        groups=found.groups,
        notes=found.notes,
        warnings=(*warnings, *found.classes.warnings, *counts.lines()),
    )
    return source, TextSpec(
        options=options,
        vocabulary=max(encoder.get_vocab(with_added_tokens=True).values()) + 1,
        unanswerable=found.unanswerable,
    )


def check_texts(rows: Rows, options: TextOptions) -> None:
    """Checks that rows have texts; they need no labels.

    Raises:
        UserError: Lists missing columns and empty texts.
    """
    if problems := FORMS[options.labels].input_problems(rows, options):
        raise UserError("\n  ".join(first_of(problems)))


def text_inputs(rows: Rows, spec: DataSpec, encoder: Any) -> tuple[Dataset, list[str]]:
    """Returns texts to predict as a dataset, and lines about their tokens.

    The windows of a passage are together.

    Args:
        rows: Rows that `check_texts` has checked.
        spec: Description of the run's data.
        encoder: The run's tokenizer, from `make_encoder`.

    Raises:
        UserError: Lists the questions that leave no room for a passage.
    """
    options: TextOptions = spec.inputs.options
    encode = FORMS[options.labels].encode
    counts = counts_for(encoder, options.max_tokens)
    found = encode({"all": rows}, options, encoder, counts, labelled=False)
    length = _length(found.tokens.values(), options)
    dataset = unlabelled(
        packed(found.tokens["all"], length),
        dataclasses.replace(spec, shape=(2, length)),
        name=rows.where,
        label=found.label["all"],
        notes=found.notes,
    )
    return dataset, counts.lines()


def _encode_one_label(
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
    *,
    labelled: bool,
) -> Encoded:
    """Returns texts with one label each."""
    label, classes = _labels(splits, options) if labelled else ({}, NO_CLASSES)
    tokens, zeros = {}, {}
    for split, rows in splits.items():
        sentences = [tuple(row[c] for c in options.text) for row in rows.cells]
        tokens[split] = encode(encoder, sentences, counts)
        zeros[split] = np.zeros(len(sentences), np.int32)
    return Encoded(tokens=tokens, label=label or zeros, classes=classes)


def _encode_tagged(
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
    *,
    labelled: bool,
) -> Encoded:
    """Returns texts with a tag for each word, and the tags as classes.

    Without labels all words have the same tag: a word is where a label is.
    """
    tokens, begins, tags = {}, {}, {}
    for split, rows in splits.items():
        words = [words_of(row[options.text[0]]) or [] for row in rows.cells]
        tokens[split], begins[split] = encode_words(encoder, words, counts)
        tags[split] = [["O"] * len(row) for row in words]
        if labelled:
            tags[split] = [words_of(row[options.label]) or [] for row in rows.cells]
    classes = tag_classes(tags, f"config.data.label: {options.label!r}")
    length = _length(tokens.values(), options)
    label = tag_labels(begins, tags, length, classes.index)
    return Encoded(tokens=tokens, label=label, classes=classes)


def _encode_asked(
    splits: Mapping[str, Rows],
    options: TextOptions,
    encoder: Any,
    counts: TokenCounts,
    *,
    labelled: bool,
) -> Encoded:
    """Returns windows of the passages of questions, labelled with the answer's span."""
    asked = {
        k: asked_in(rows, options, answered=labelled) for k, rows in splits.items()
    }
    questions = [one for rows in asked.values() for one in rows]
    windows = encode_questions(encoder, questions, options)
    counts.add_windows(ids for ids, _ in windows.tokens)
    ends = np.cumsum([len(rows) for rows in asked.values()])[:-1]
    groups = dict(zip(asked, np.split(windows.sizes, ends)))
    stops = np.cumsum([sizes.sum() for sizes in groups.values()])
    places = {
        split: slice(stop - groups[split].sum(), stop)
        for split, stop in zip(groups, stops)
    }
    return Encoded(
        tokens={split: windows.tokens[where] for split, where in places.items()},
        label={split: windows.label[where] for split, where in places.items()},
        groups=groups,
        notes=windows.notes,
        unanswerable=any(not one.answers for one in questions),
        digested=repr([one.answers for one in questions]).encode(),
    )


def _length(splits: Iterable[Tokens], options: TextOptions) -> int:
    return options.padded(max(len(ids) for rows in splits for ids, _ in rows))


def _problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns what cannot be used in a file of texts with one label each."""
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
    splits: Mapping[str, Rows], options: TextOptions
) -> tuple[dict[str, np.ndarray], Classes]:
    """Returns the labels of each split, and their classes, none for numbers."""
    given = {k: [r[options.label] for r in rows.cells] for k, rows in splits.items()}
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


_ONE_LABEL = LabelForm(_problems, text_problems, _encode_one_label)
# By `config.data.labels`.
FORMS = {
    "classes": _ONE_LABEL,
    "numbers": _ONE_LABEL,
    "tags": LabelForm(tag_problems, word_problems, _encode_tagged),
    "answers": LabelForm(answer_problems, text_problems, _encode_asked),
}
