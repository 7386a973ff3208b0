"""Texts: rows of a table become arrays of tokens, once, before training.

An example is an array [2, T]: the token ids, and the sentence that each is of, from 1 on;
0 is padding. A batch holds no more places than its longest text needs, rounded up to one
of `data.buckets`, so that few programs are compiled.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.errors import UserError, problems_error
from finetune_jax.lookup import closest

_SHOWN = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What `config.data` says of texts.

    Attributes:
        text: Names of the columns of one or two sentences; empty where there are none.
        label: Name of the column of what is to be predicted.
        labels: What that holds: 'classes' or 'numbers'.
        header: Names of the columns where files do not begin with them.
        max_tokens: Of a text, special ones too; what is longer is cut.
        buckets: Lengths to which texts are padded; `max_tokens` is one, too.
    """

    text: tuple[str, ...] = ()
    label: str = "label"
    labels: str = "classes"
    header: tuple[str, ...] = ()
    max_tokens: int = 128
    buckets: tuple[int, ...] = (32, 48, 64, 96, 128, 192, 256, 384, 512)

    def lengths(self) -> tuple[int, ...]:
        """Returns the lengths to which texts are padded, ascending."""
        shorter = {length for length in self.buckets if length < self.max_tokens}
        return (*sorted(shorter), self.max_tokens)

    def padded(self, tokens: int) -> int:
        """Returns the length to which so many tokens are padded."""
        return next(length for length in self.lengths() if length >= tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What the rest of the program knows of texts.

    Attributes:
        options: Of the data.
        vocabulary: Tokens that the tokenizer knows.
    """

    options: TextOptions
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one file or split, as they are read.

    Attributes:
        where: The file.
        columns: Names, in order.
        cells: A list of values by column for each row.
        lines: Where each row is, for messages.
    """

    where: str
    columns: Sequence[str]
    cells: Sequence[Mapping[str, Any]]
    lines: Sequence[int]


def options_of(config: Mapping[str, Any]) -> TextOptions:
    """Returns what `config.data` says of texts.

    Raises:
        UserError: Lists what does not fit, among it what is said of texts where there
            are none.
    """
    names = [field.name for field in dataclasses.fields(TextOptions)]
    given = {name: config[name] for name in names}
    options, plain, problems = TextOptions(**given), TextOptions(), []
    if not options.text:
        problems = [
            f"config.data.{name}: {given[name]!r}, but config.data.text names no columns"
            for name in names
            if given[name] != getattr(plain, name)
        ]
    else:
        if len(options.text) > 2:
            problems.append(
                f"config.data.text: {options.text}; one or two are possible"
            )
        for name in ("image_size", "channels", "train_size", "resize"):
            if config[name] is not None:
                problems.append(f"config.data.{name}: the data has no images")
        for name in ("augment", "mix"):
            if config[name]:
                problems.append(f"config.data.{name}: texts are not augmented")
    for name in ("text", "header"):
        if not all(isinstance(column, str) for column in given[name]):
            problems.append(f"config.data.{name}: {given[name]!r} are not names")
    if not all(type(n) is int and n > 0 for n in options.buckets):
        problems.append(f"config.data.buckets: {options.buckets!r}; lengths are needed")
    if problems:
        raise problems_error("config.data does not fit:", problems)
    return options


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
    problems = [text for rows in splits.values() for text in _problems(rows, options)]
    if tokenizer is None:
        problems.append(
            "config.data.tokenizer: texts need one, and none lies beside the weights; "
            "give its address, such as file:DIR/tokenizer.json or hf:OWNER/REPO"
        )
    if problems:
        more = len(problems) - _SHOWN
        problems = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise problems_error(f"The data {name} cannot be used:", problems)
    assert tokenizer is not None
    encoder = make_encoder(tokenizer, options.max_tokens)
    label, class_names = _labels(
        {
            split: [r[options.label] for r in rows.cells]
            for split, rows in splits.items()
        },
        options.labels,
    )
    tokens = {
        split: encode(encoder, [_sentences(row, options) for row in rows.cells])
        for split, rows in splits.items()
    }
    longest = max(len(ids) for rows in tokens.values() for ids, _ in rows)
    examples = {
        split: ArrayExamples(
            values=packed(rows, options.padded(longest)), label=label[split]
        )
        for split, rows in tokens.items()
    }
    source = Source(
        name=name,
        splits=examples,
        class_names=class_names,
        targets=(options.label,) if options.labels == "numbers" else (),
        fingerprint=lambda: _fingerprint(examples),
    )
    return source, TextSpec(options=options, vocabulary=vocabulary_of(encoder))


def text_problems(
    rows: Rows, options: TextOptions, wanted: tuple[str, ...] = ()
) -> list[str]:
    """Returns columns that a file lacks, and texts in it that are none.

    Args:
        rows: Of the file.
        options: Have the columns of texts.
        wanted: Other columns that are needed.
    """
    missing = [
        f"{rows.where}: no column {column!r}{closest(column, rows.columns)} "
        f"There are: {', '.join(rows.columns)}."
        for column in (*options.text, *wanted)
        if column not in rows.columns
    ]
    if missing or not rows.cells:
        return missing or [f"{rows.where}: no rows"]
    problems = []
    for line, row in zip(rows.lines, rows.cells):
        for column in options.text:
            value, at = row.get(column), f"{rows.where}, line {line}"
            if not isinstance(value, str):
                problems.append(f"{at}: {column!r} is {value!r}, not a text")
            elif not value.strip():
                problems.append(f"{at}: {column!r} is empty")
    return problems


def _problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns what of a file cannot be used."""
    problems = text_problems(rows, options, (options.label,))
    if options.label not in rows.columns:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        value, at = row.get(options.label), f"{rows.where}, line {line}"
        if value is None or not str(value).strip():
            problems.append(f"{at}: {options.label!r} is empty")
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
    given: Mapping[str, list], kind: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the labels of each split, and the names of the classes if they are such."""
    if kind == "numbers":
        numbers = {k: np.array(v, np.float32).reshape(-1, 1) for k, v in given.items()}
        return numbers, ()
    plain = {split: [str(v).strip() for v in values] for split, values in given.items()}
    names = {name for values in plain.values() for name in values}
    # Classes that are numbered keep the order of their numbers.
    numbered = all(name.isascii() and name.isdigit() for name in names)
    ordered = sorted(names, key=int) if numbered else sorted(names)
    places = {name: index for index, name in enumerate(ordered)}
    label = {
        split: np.array([places[name] for name in values], np.int32)
        for split, values in plain.items()
    }
    return label, tuple(ordered)


def _sentences(row: Mapping[str, Any], options: TextOptions) -> tuple[str, ...]:
    return tuple(row[column] for column in options.text)


def make_encoder(tokenizer: str, max_tokens: int) -> Any:
    """Returns a tokenizer that cuts texts, and pads none.

    Args:
        tokenizer: What a tokenizer.json holds.
        max_tokens: Of a text, special ones too. Of two sentences the longer is cut.

    Raises:
        UserError: It is no tokenizer, or leaves no room for a text.
    """
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_str(tokenizer)
    except Exception as error:  # The library raises plain exceptions.
        raise UserError(f"config.data.tokenizer: not a tokenizer: {error}") from error
    encoder.no_padding()
    special = encoder.num_special_tokens_to_add(True)
    if max_tokens <= special:
        raise UserError(
            f"config.data.max_tokens: {max_tokens}, of which {special} are special tokens"
        )
    encoder.enable_truncation(max_tokens)
    return encoder


def vocabulary_of(encoder: Any) -> int:
    """Returns the number of ids that a tokenizer may give."""
    return max(encoder.get_vocab(with_added_tokens=True).values()) + 1


def encode(
    encoder: Any, texts: Sequence[tuple[str, ...]]
) -> list[tuple[list[int], list[int]]]:
    """Returns ids and sentences, from 1 on, of each text of one or two sentences."""
    plain: list[Any] = [text if len(text) > 1 else text[0] for text in texts]
    found = encoder.encode_batch(plain)
    return [(one.ids, [kind + 1 for kind in one.type_ids]) for one in found]


def packed(rows: Sequence[tuple[list[int], list[int]]], length: int) -> np.ndarray:
    """Returns texts as an array [N, 2, length] of ids and sentences; 0 is padding.

    >>> packed([([7, 8], [1, 1]), ([9], [1])], 2).tolist()
    [[[7, 8], [1, 1]], [[9, 0], [1, 0]]]
    """
    values = np.zeros((len(rows), 2, length), np.int32)
    for index, (ids, sentences) in enumerate(rows):
        values[index, 0, : len(ids)] = ids
        values[index, 1, : len(ids)] = sentences
    return values


def shortened(values: np.ndarray, options: TextOptions) -> np.ndarray:
    """Returns texts [..., 2, T] without the places that none of them needs."""
    is_used = (values[..., 1, :] != 0).reshape(-1, values.shape[-1]).any(axis=0)
    tokens = int(np.flatnonzero(is_used)[-1]) + 1 if is_used.any() else 1
    return values[..., : min(options.padded(tokens), values.shape[-1])]


def _fingerprint(splits: Mapping[str, ArrayExamples]) -> str:
    digester = hashlib.sha256()
    for name, examples in sorted(splits.items()):
        digester.update(f"{name}{examples.values.shape}".encode())
        digester.update(examples.values.data)
        digester.update(examples.label.data)
    return digester.hexdigest()
