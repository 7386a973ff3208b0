"""Questions on passages; a long passage is read in windows that overlap.

An example is a window: the question, and a part of the passage. Its label has the places
of the answer's first and last token; where the answer is not in it, that of the first
token of all, which stands for none. Windows of a question are a group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, first_of, raise_if
from finetune_jax.data.text.tokens import Rows, TextOptions, text_problems

# Questions whose tokens are kept at once before they become arrays.
_CHUNK = 1024
_SHOWN = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as it is read.

    Attributes:
        where: Place in its file, for messages.
        name: Identifier in its row; None if there is none.
        question: Text of the question.
        passage: Text of the passage.
        answers: Texts that are right, and the character at which each begins.
    """

    where: str
    name: str | None
    question: str
    passage: str
    answers: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """A text, and its tokens.

    Attributes:
        text: The text.
        characters: First character of each token, and the one after its last, int32
            [P, 2].
    """

    text: str
    characters: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A question, for metrics and predictions.

    Attributes:
        name: Identifier in its row; None if there is none.
        passage: Passage that may answer it.
        answers: Right answers; empty if the passage does not answer it.
    """

    name: str | None
    passage: Passage
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """A window of a passage: the note of an example.

    Attributes:
        question: Question of the window.
        first: Place of the first of the passage's tokens that it has.
        skipped: How many tokens of the passage come before.
    """

    question: Question
    first: int
    skipped: int

    def characters(self, start: int, end: int) -> tuple[int, int]:
        """Returns the first character of a span, and the one after its last.

        Args:
            start: Place of the first token.
            end: Place of the last token.
        """
        found = self.question.passage.characters
        shift = self.skipped - self.first
        return int(found[start + shift, 0]), int(found[end + shift, 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Questions as examples.

    Attributes:
        tokens: Ids and sentences, from 1 on, of each window.
        label: Places of the first and the last token of each answer, int32 [N, 2].
        notes: Note of each window, [N].
        sizes: How many windows each question has.
    """

    tokens: Sequence[tuple[np.ndarray, np.ndarray]]
    label: np.ndarray
    notes: np.ndarray
    sizes: np.ndarray


def answers_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Returns texts and where they begin, unchecked; None where there are no such.

    >>> answers_of({"text": ["Bern"], "answer_start": [4]})
    [('Bern', 4)]
    >>> answers_of([{"text": "Bern", "answer_start": 4}]), answers_of([]), answers_of("no")
    ([('Bern', 4)], [], None)
    """
    if isinstance(value, Mapping):
        texts, begins = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(begins, list):
            return None
        return list(zip(texts, begins)) if len(texts) == len(begins) else None
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return [(one.get("text"), one.get("answer_start")) for one in value]
    return None


def answer_problems(rows: Rows, options: TextOptions) -> list[str]:
    """Returns what cannot be used in a file of questions."""
    problems = text_problems(rows, options, (options.label,))
    if options.label not in rows.columns:
        return problems
    for line, row in zip(rows.lines, rows.cells):
        value, at = row.get(options.label), f"{rows.where}, {rows.unit} {line}"
        answers, passage = answers_of(value), row.get(options.text[1])
        if answers is None:
            problems.append(
                f"{at}: {options.label!r} is {_shown(value)}, not such as "
                '{"text": ["Bern"], "answer_start": [4]}, in which empty lists say that '
                "there is no answer"
            )
        elif isinstance(passage, str):
            problems += [
                f"{at}: {problem}"
                for text, begin in answers
                if (problem := _misplaced(text, begin, passage))
            ]
    return problems


def _misplaced(text: Any, begin: Any, passage: str) -> str | None:
    """Returns the problem of an answer; None if it is right."""
    if not isinstance(text, str) or not text.strip():
        return f"the answer {_shown(text)} is no text"
    if type(begin) is not int or begin < 0:
        return f"'answer_start' is {_shown(begin)}, not the number of a character"
    found = passage[begin : begin + len(text)]
    if found == text:
        return None
    elsewhere = passage.find(text)
    hint = f"it is at {elsewhere}" if elsewhere >= 0 else "the passage does not have it"
    return f"the answer {_shown(text)} is not at character {begin}; {hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def asked_in(rows: Rows, options: TextOptions, *, answered: bool) -> list[Asked]:
    """Returns the questions of a file that has no problems.

    Args:
        rows: Rows of the file.
        options: Options with the columns.
        answered: Whether answers are read, too.
    """
    column_of_question, column_of_passage = options.text
    return [
        Asked(
            where=f"{rows.where}, {rows.unit} {line}",
            name=None if row.get("id") is None else str(row["id"]),
            question=row[column_of_question].strip(),
            passage=row[column_of_passage],
            answers=tuple(answers_of(row[options.label]) or ()) if answered else (),
        )
        for line, row in zip(rows.lines, rows.cells)
    ]


def encode_questions(
    encoder: Any, asked: Sequence[Asked], options: TextOptions
) -> Windows:
    """Returns questions and passages as windows.

    Args:
        encoder: From `make_encoder`.
        asked: The questions, one at least.
        options: Options of the data.

    Raises:
        UserError: Lists the questions that leave no room for a passage, or tells that the
            tokenizer makes no difference between question and passage.
    """
    encoder.no_truncation()
    tokens, labels, notes, sizes, problems = [], [], [], [], []
    for start in range(0, len(asked), _CHUNK):
        for one, whole, passage in _encoded(encoder, asked[start : start + _CHUNK]):
            used = len(whole.ids) - len(passage.characters)
            if used >= options.max_tokens:
                problems.append(
                    f"{one.where}: the question takes {used} of max_tokens="
                    f"{options.max_tokens} tokens; none is left for the passage"
                )
                continue
            texts = tuple(text for text, _ in one.answers)
            question = Question(name=one.name, passage=passage, answers=texts)
            span = _span(passage, one.answers)
            windows = _windows(whole, passage, options)
            sizes.append(len(windows))
            for ids, sentences, first, skipped, count in windows:
                tokens.append((ids, sentences))
                notes.append(Window(question=question, first=first, skipped=skipped))
                labels.append(_places(span, first, skipped, count))
    raise_if(first_of(problems, _SHOWN), "Questions are too long:")
    kept = np.empty(len(notes), object)
    kept[:] = notes
    return Windows(
        tokens=tokens,
        label=np.array(labels, np.int32).reshape(-1, 2),
        notes=kept,
        sizes=np.array(sizes),
    )


def _encoded(encoder: Any, asked: Sequence[Asked]) -> list[tuple[Asked, Any, Passage]]:
    """Returns each question, its tokens with those of all the passage, and the passage."""
    texts = list(dict.fromkeys(one.passage for one in asked))
    passages = {}
    for text, found in zip(
        texts, encoder.encode_batch(texts, add_special_tokens=False)
    ):
        characters = np.array(found.offsets, np.int32).reshape(-1, 2)
        passages[text] = found, Passage(text=text, characters=characters)
    asking = [one.question for one in asked]
    questions = encoder.encode_batch(asking, add_special_tokens=False)
    return [
        (one, encoder.post_process(question, found), passage)
        for one, question in zip(asked, questions)
        for found, passage in [passages[one.passage]]
    ]


def _windows(
    whole: Any, passage: Passage, options: TextOptions
) -> list[tuple[np.ndarray, np.ndarray, int, int, int]]:
    """Returns ids, sentences, `first`, `skipped`, and tokens of the passage, of windows."""
    ids = np.array(whole.ids, np.int32)
    sentences = np.array(whole.type_ids, np.int32) + 1
    is_passage = np.array([sequence == 1 for sequence in whole.sequence_ids])
    _check_tokenizer(sentences, is_passage)
    count, first = len(passage.characters), int(np.argmax(is_passage))
    room = options.max_tokens - (len(ids) - count)
    shared = options.max_tokens // 3 if options.overlap is None else options.overlap
    step = room - min(shared, room // 2)
    found = []
    for skipped in range(0, max(count - (room - step), 1), step):
        stop = min(skipped + room, count)
        taken = ~is_passage
        taken[first + skipped : first + stop] = True
        found.append((ids[taken], sentences[taken], first, skipped, stop - skipped))
    return found


def _check_tokenizer(sentences: np.ndarray, is_passage: np.ndarray) -> None:
    """Checks that models can know the passage: sentence 2, but for a last special token.

    Raises:
        UserError: They cannot.
    """
    known = (sentences == 2) & np.append(sentences[1:] == 2, False)
    if is_passage[0] or not np.array_equal(known, is_passage):
        raise UserError(
            "it does not set question and passage off as those of BERT do",
            header="config.data.tokenizer does not fit questions:",
            advice="Needed is a tokenizer.json that writes [CLS] question [SEP] passage "
            "[SEP], the last two of type 1.",
        )


def _span(
    passage: Passage, answers: Sequence[tuple[str, int]]
) -> tuple[int, int] | None:
    """Returns the first and the last token of the first answer, if it has any."""
    if not answers:
        return None
    text, begin = answers[0]
    begins, ends = passage.characters.T
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(begins, begin + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _places(
    span: tuple[int, int] | None, first: int, skipped: int, count: int
) -> tuple[int, int]:
    """Returns the places of a span in a window, or that of the first token of all."""
    if span is None or span[0] < skipped or span[1] >= skipped + count:
        return 0, 0
    shift = first - skipped
    return span[0] + shift, span[1] + shift
