"""Rows of a table of texts as a source of tokens with labels, or as inputs to predict."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, first_of, problems_error
from finetune_jax.data.dataset import Dataset, unlabelled
from finetune_jax.data.labels import Classes, classes_of, spelling_of
from finetune_jax.data.rounding import rounding_doubt
from finetune_jax.data.source import ArrayExamples, Source
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
    vocabulary_of,
)

_SHOWN = 50
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
    classes: Classes = Classes(names=(), index={})
    groups: Mapping[str, np.ndarray] | None = None
    notes: np.ndarray | None = None
    unanswerable: bool = False
    digested: bytes = b""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelForm:
    """How texts with one form of labels are checked and encoded.

    Attributes:
        problems: Returns what cannot be used in a file with labels.
        input_problems: Returns what cannot be used in a file without labels.
        encode: Returns the texts of all splits.
        inputs: Returns the tokens of texts to predict, stand-ins for their labels, which
            None leaves at zero, and notes, if there are any.
    """

    problems: Callable[[Rows, TextOptions], list[str]]
    input_problems: Callable[[Rows, TextOptions], list[str]]
    encode: Callable[[Mapping[str, Rows], TextOptions, Any, TokenCounts], Encoded]
    inputs: Callable[[Rows, TextOptions, Any, TokenCounts], tuple[Tokens, Any, Any]]


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
    if problems:
        problems = first_of(problems, _SHOWN)
        raise problems_error(f"The data {name} cannot be used:", problems)
    assert tokenizer is not None
    encoder = make_encoder(tokenizer, options.max_tokens)
    warnings = tuple(text for rows in splits.values() for text in rows.warnings)
    counts = counts_for(encoder, options.max_tokens)
    found = form.encode(splits, options, encoder, counts)
    if found.classes.problems:
        raise problems_error(f"The data {name} cannot be used:", found.classes.problems)
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
        fingerprint=lambda: _fingerprint(examples, found.digested),
        groups=found.groups,
        notes=found.notes,
        warnings=(*warnings, *found.classes.warnings, *counts.lines()),
    )
    return source, TextSpec(
        options=options,
        vocabulary=vocabulary_of(encoder),
        unanswerable=found.unanswerable,
    )


def check_texts(rows: Rows, options: TextOptions) -> None:
    """Checks that rows have texts; they need no labels.

    Raises:
        UserError: Lists missing columns and empty texts.
    """
    if problems := FORMS[options.labels].input_problems(rows, options):
        raise UserError("\n  ".join(first_of(problems)))


def text_inputs(
    rows: Rows, spec: DataSpec, encoder: Any, counts: TokenCounts
) -> Dataset:
    """Returns texts to predict as a dataset, the windows of a passage together.

    Args:
        rows: Rows that `check_texts` has checked.
        spec: Description of the run's data.
        encoder: The run's tokenizer, from `make_encoder`.
        counts: Counts to which the tokens are added.

    Raises:
        UserError: Lists the questions that leave no room for a passage.
    """
    options: TextOptions = spec.inputs.options
    form = FORMS[options.labels]
    tokens, label, notes = form.inputs(rows, options, encoder, counts)
    length = _length([tokens], options)
    spec = dataclasses.replace(spec, shape=(2, length))
    values = packed(tokens, length)
    return unlabelled(values, spec, name=rows.where, label=label, notes=notes)


def _encode_labelled(
    splits: Mapping[str, Rows], options: TextOptions, encoder: Any, counts: TokenCounts
) -> Encoded:
    """Returns texts with one label each."""
    given = {
        split: [row[options.label] for row in rows.cells]
        for split, rows in splits.items()
    }
    label, classes = _labels(given, options)
    tokens = {
        split: encode(encoder, _sentences(rows, options), counts)
        for split, rows in splits.items()
    }
    return Encoded(tokens=tokens, label=label, classes=classes)


def _labelled_inputs(
    rows: Rows, options: TextOptions, encoder: Any, counts: TokenCounts
) -> tuple[Tokens, None, None]:
    return encode(encoder, _sentences(rows, options), counts), None, None


def _encode_tagged(
    splits: Mapping[str, Rows], options: TextOptions, encoder: Any, counts: TokenCounts
) -> Encoded:
    """Returns texts with a tag for each word, and the tags as classes."""
    tokens, begins, tags = {}, {}, {}
    for split, rows in splits.items():
        words = [words_of(row[options.text[0]]) or [] for row in rows.cells]
        tokens[split], begins[split] = encode_words(encoder, words, counts)
        tags[split] = [words_of(row[options.label]) or [] for row in rows.cells]
    classes = tag_classes(tags, f"config.data.label: {options.label!r}")
    length = _length(tokens.values(), options)
    label = tag_labels(begins, tags, length, classes.index)
    return Encoded(tokens=tokens, label=label, classes=classes)


def _tagged_inputs(
    rows: Rows, options: TextOptions, encoder: Any, counts: TokenCounts
) -> tuple[Tokens, np.ndarray, None]:
    words = [words_of(row[options.text[0]]) or [] for row in rows.cells]
    tokens, begins = encode_words(encoder, words, counts)
    # A word is where a label is, whichever label.
    tags = {"all": [["O"] * len(row) for row in words]}
    length = _length([tokens], options)
    return tokens, tag_labels({"all": begins}, tags, length, {"O": 0})["all"], None


def _encode_asked(
    splits: Mapping[str, Rows], options: TextOptions, encoder: Any, counts: TokenCounts
) -> Encoded:
    """Returns windows of the passages of questions, labelled with the answer's span."""
    asked = {k: asked_in(rows, options, answered=True) for k, rows in splits.items()}
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


def _asked_inputs(
    rows: Rows, options: TextOptions, encoder: Any, counts: TokenCounts
) -> tuple[Tokens, np.ndarray, np.ndarray]:
    asked = asked_in(rows, options, answered=False)
    windows = encode_questions(encoder, asked, options)
    counts.add_windows(ids for ids, _ in windows.tokens)
    return windows.tokens, windows.label, windows.notes


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
    given: Mapping[str, list], options: TextOptions
) -> tuple[dict[str, np.ndarray], Classes]:
    """Returns the labels of each split, and their classes, none for numbers."""
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


def _sentences(rows: Rows, options: TextOptions) -> list[tuple[str, ...]]:
    return [tuple(row[column] for column in options.text) for row in rows.cells]


def _fingerprint(splits: Mapping[str, ArrayExamples], rest: bytes = b"") -> str:
    digester = hashlib.sha256(rest)
    for name, examples in sorted(splits.items()):
        digester.update(f"{name}{examples.values.shape}".encode())
        digester.update(examples.values.data)
        digester.update(examples.label.data)
    return digester.hexdigest()


_ONE_LABEL = LabelForm(
    problems=_problems,
    input_problems=text_problems,
    encode=_encode_labelled,
    inputs=_labelled_inputs,
)
# By `config.data.labels`.
FORMS = {
    "classes": _ONE_LABEL,
    "numbers": _ONE_LABEL,
    "tags": LabelForm(
        problems=tag_problems,
        input_problems=word_problems,
        encode=_encode_tagged,
        inputs=_tagged_inputs,
    ),
    "answers": LabelForm(
        problems=answer_problems,
        input_problems=text_problems,
        encode=_encode_asked,
        inputs=_asked_inputs,
    ),
}
