"""Texts: rows of a table become arrays of tokens, once, before training.

An example is an array [2, T]: the token ids, and the sentence that each is of, from 1 on;
0 is padding. A batch holds no more places than its longest text needs, rounded up to one
of `data.buckets`, so that few programs are compiled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.registry import closest
from finetune_jax.data.text.token_counts import TokenCounts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of texts in `config.data`.

    Attributes:
        text: Names of the columns of one or two sentences.
        label: Name of the label column.
        labels: Kind of labels: 'classes', 'numbers', 'tags', one for each word, or
            'answers' in the second text, a passage, to the first, a question.
        header: Names of the columns where files do not begin with them.
        max_tokens: Most tokens of a text, with special ones; longer texts are cut, passages
            into windows.
        overlap: Tokens that two windows of a passage share; None is a third of
            `max_tokens`. They never share more than half of their tokens.
        buckets: Lengths to which texts are padded; `max_tokens` is one, too.
    """

    text: tuple[str, ...] = ()
    label: str = "label"
    labels: str = "classes"
    header: tuple[str, ...] = ()
    max_tokens: int = 128
    overlap: int | None = None
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
    """The part of a spec that texts have.

    Attributes:
        options: Options of the data.
        vocabulary: Number of tokens that the tokenizer knows.
        unanswerable: Whether some questions are not answered by their passage.
    """

    options: TextOptions
    vocabulary: int
    unanswerable: bool = False

    predicted = "answers in the passage"

    @property
    def labels(self) -> str | None:
        """Kind of the labels that texts alone have: 'tags' or 'answers'."""
        labels = self.options.labels
        return labels if labels in ("tags", "answers") else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one file or split, as they are read.

    Attributes:
        where: The file.
        columns: Names, in order.
        cells: A list of values by column for each row.
        lines: Where each row is, for messages.
        unit: Unit of `lines`.
        warnings: Lines about how the file is written.
    """

    where: str
    columns: Sequence[str]
    cells: Sequence[Mapping[str, Any]]
    lines: Sequence[int]
    unit: str = "line"
    warnings: tuple[str, ...] = ()


def options_of(config: Mapping[str, Any]) -> TextOptions:
    """Returns the text options of `config.data`, which names columns of texts.

    Raises:
        UserError: Lists the options that do not fit.
    """
    names = [field.name for field in dataclasses.fields(TextOptions)]
    options = TextOptions(**{name: config[name] for name in names})
    problems = _window_problems(options)
    if options.labels == "tags" and len(options.text) > 1:
        problems.append(f"config.data.text: {options.text}; tags need one column")
    if len(options.text) > 2:
        problems.append(f"config.data.text: {options.text}; one or two are possible")
    for name in ("text", "header"):
        if not all(isinstance(column, str) for column in config[name]):
            problems.append(f"config.data.{name}: {config[name]!r} are not names")
    if not all(type(n) is int and n > 0 for n in options.buckets):
        problems.append(f"config.data.buckets: {options.buckets!r}; lengths are needed")
    raise_if(problems, "config.data does not fit:")
    return options


def _window_problems(options: TextOptions) -> list[str]:
    """Returns problems of the options of windows of passages."""
    problems, overlap = [], options.overlap
    if options.labels == "answers" and len(options.text) != 2:
        problems.append(
            f"config.data.text: {options.text}; answers need two columns, of the question "
            "and of the passage, such as ('question', 'context')"
        )
    if options.labels != "answers" and overlap is not None:
        problems.append(
            f"config.data.overlap: {overlap}, but only passages have windows: "
            "config.data.labels='answers'"
        )
    if overlap is not None and not 0 <= overlap <= options.max_tokens // 2:
        problems.append(
            f"config.data.overlap: {overlap}; from 0 to half of max_tokens is possible"
        )
    return problems


def missing_columns(rows: Rows, wanted: Sequence[str]) -> list[str]:
    """Returns which of some columns a file lacks, or that it has no rows."""
    missing = [
        f"{rows.where}: no column {column!r}{closest(column, rows.columns) or '.'} "
        f"There are: {', '.join(rows.columns)}."
        for column in wanted
        if column not in rows.columns
    ]
    return missing if missing or rows.cells else [f"{rows.where}: no rows"]


def text_problems(
    rows: Rows, options: TextOptions, wanted: tuple[str, ...] = ()
) -> list[str]:
    """Returns missing columns of a file, and its invalid texts.

    Args:
        rows: Rows of the file.
        options: Options with the columns of texts.
        wanted: Other columns that are required.
    """
    problems = missing_columns(rows, (*options.text, *wanted))
    if problems:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        for column in options.text:
            value, at = row.get(column), f"{rows.where}, {rows.unit} {line}"
            if not isinstance(value, str):
                problems.append(f"{at}: {column!r} is {value!r}, not a text")
            elif not value.strip():
                problems.append(f"{at}: {column!r} is empty")
            elif not is_unicode(value):
                problems.append(f"{at}: {column!r} has half a character (a surrogate)")
    return problems


def is_unicode(text: str) -> bool:
    r"""Returns whether a text has whole characters only; JSON's "\ud83d" is half a one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def make_encoder(tokenizer: str, max_tokens: int) -> Any:
    """Returns a tokenizer that cuts texts, and pads none.

    Args:
        tokenizer: Text of a tokenizer.json.
        max_tokens: Most tokens of a text, with special ones. Of two sentences the longer
            is cut.

    Raises:
        UserError: The tokenizer is invalid, or leaves no room for a text.
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


def encode(
    encoder: Any, texts: Sequence[Sequence[str]], counts: TokenCounts | None = None
) -> list[tuple[list[int], list[int]]]:
    """Returns ids and sentences, from 1 on, of each text of one or two sentences.

    Args:
        encoder: From `make_encoder`.
        texts: Sentences of each text.
        counts: The tokens are added, if given.
    """
    plain: list[Any] = [tuple(text) if len(text) > 1 else text[0] for text in texts]
    found = encoder.encode_batch(plain)
    if counts is not None:
        counts.add(found)
    return [(one.ids, [kind + 1 for kind in one.type_ids]) for one in found]


def packed(rows: Sequence[tuple[Any, Any]], length: int) -> np.ndarray:
    """Returns texts as an array [N, 2, length] of ids and sentences; 0 is padding.

    >>> packed([([7, 8], [1, 1]), ([9], [1])], 2).tolist()
    [[[7, 8], [1, 1]], [[9, 0], [1, 0]]]
    """
    values = np.zeros((len(rows), 2, length), np.int32)
    for index, (ids, sentences) in enumerate(rows):
        values[index, 0, : len(ids)] = ids
        values[index, 1, : len(ids)] = sentences
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Batching of texts: a batch is padded to the smallest bucket that holds it.

    Attributes:
        options: Options with the buckets.
    """

    options: TextOptions

    def of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the number of tokens of each text, int [n]."""
        return (batch["inputs"][:, 1] != 0).sum(axis=-1)

    def shortened(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch without the positions that no text needs."""
        inputs = batch["inputs"]
        is_used = (inputs[..., 1, :] != 0).reshape(-1, inputs.shape[-1]).any(axis=0)
        tokens = int(np.flatnonzero(is_used)[-1]) + 1 if is_used.any() else 1
        length = min(self.options.padded(tokens), inputs.shape[-1])
        found = {**batch, "inputs": inputs[..., :length]}
        if self.options.labels == "tags":
            found["label"] = batch["label"][:, :length]
        return found
