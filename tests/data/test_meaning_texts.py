"""Odd files of texts have the tokens of the clean one, or a warning, or are refused."""

import dataclasses
import json

import numpy as np
import pytest
import texts
from meaning import Odd, by_name, check
from tokenizers import Tokenizer

from finetune_jax.core.errors import UserError
from finetune_jax.core.text_lines import lines_of
from finetune_jax.data.sources.masks import load as load_masks
from finetune_jax.data.text.files import load_texts, read_texts
from finetune_jax.data.text.tokens import TextOptions
from finetune_jax.weights.metadata.tokenizer import find_tokenizer

OPTIONS = TextOptions(text=("sentence",), max_tokens=12, buckets=(12,))
ROWS = texts.rows(12)
# Characters that Python's `splitlines` takes for line ends.
CHARACTERS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")


def text_of(rows=ROWS, header="sentence,label", sep=",", end="\n"):
    return end.join([header, *(sep.join(row) for row in rows)]) + end


def odd(name, content, suffix="csv", **outcome):
    def make(folder):
        path = folder / f"t.{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return Odd(name=name, make=make, **outcome)


def json_of(rows):
    return "".join(json.dumps(dict(zip(("sentence", "label"), r))) + "\n" for r in rows)


def read(path):
    source, _ = load_texts(path.suffix[1:], str(path), OPTIONS, texts.tokenizer())
    examples = source.splits["all"]
    return (examples.values, examples.label), source.warnings


LONG = [(f"{text} " + "film " * 40_000, label) for text, label in ROWS]
CASES = (
    odd("blanks around names", text_of(header="sentence , label"), same=True),
    odd("blanks that do not break", text_of(header="sentence,\u00a0label"), same=True),
    odd("byte order mark", b"\xef\xbb\xbf" + text_of().encode(), same=True),
    odd(
        "mark and quotes",
        b'\xef\xbb\xbf"sentence","label"\r\n' + text_of(header="", end="\r\n").encode(),
        same=True,
    ),
    odd("old Mac", text_of(end="\r"), same=True),
    odd("empty lines", text_of(end="\n\n"), same=True),
    odd(
        "name of several lines",
        text_of(header='sentence,label,"a\nb"', rows=[(*r, "") for r in ROWS]),
        same=True,
    ),
    odd(
        "other order",
        text_of([r[::-1] for r in ROWS], header="label,sentence"),
        same=True,
    ),
    odd("tabs", text_of(sep="\t", header="sentence\tlabel"), suffix="tsv", same=True),
    odd(
        "lines of JSON, old Windows",
        json_of(ROWS).replace("\n", "\r\n"),
        suffix="jsonl",
        same=True,
    ),
    odd(
        "semicolons",
        text_of(sep=";", header="sentence;label"),
        same=True,
        warns="separated by ';'",
    ),
    odd(
        "tabs in csv",
        text_of(sep="\t", header="sentence\tlabel"),
        same=True,
        warns=r"'\\t'",
    ),
    odd("bars", text_of(sep="|", header="sentence|label"), same=True, warns=r"'\|'"),
    odd(
        "names twice",
        text_of([(*r, "x") for r in ROWS], header="sentence,label,label"),
        refuses="columns twice: 'label'",
    ),
    odd(
        "names twice in tsv",
        text_of([(*r, "x") for r in ROWS], header="label\tsentence\tlabel", sep="\t"),
        suffix="tsv",
        refuses="twice",
    ),
    odd(
        "names twice in JSON",
        '{"sentence": "a", "label": 1, "label": 2}\n',
        suffix="jsonl",
        refuses="line 1: .*names twice: 'label'",
    ),
    odd("UTF-16", text_of().encode("utf-16"), refuses="line 1: .*UTF-16"),
    odd(
        "UTF-16 in JSON",
        json_of(ROWS).encode("utf-16-be"),
        suffix="jsonl",
        refuses="UTF-16",
    ),
    odd("too many cells", text_of() + "a,b,c\n", refuses="line 14: 3 values"),
    odd(
        "open quote", text_of() + '"a film,1\nthe plot,0\n', refuses="line 14: .*quoted"
    ),
    odd(
        "quote that ends early",
        text_of() + '"a film" is good,1\n',
        refuses="line 14: .*quoted",
    ),
    odd(
        "half a character",
        text_of().replace("a", "a") and '{"sentence": "a \\ud83d", "label": 1}\n',
        suffix="jsonl",
        refuses="half a character",
    ),
    odd("empty text", text_of() + ",1\n", refuses="line 14: 'sentence' is empty"),
)


@by_name(CASES)
def test_an_odd_file_of_texts_is_read_alike_or_not_without_a_word(odd, tmp_path):
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/t.csv").write_text(text_of())
    check(odd, read, read(tmp_path / "clean/t.csv")[0], tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.fast_runs("csv")
def test_a_text_may_be_of_any_length(suffix, tmp_path):
    sep = {"csv": ",", "tsv": "\t"}[suffix]
    made = text_of(LONG, header=f"sentence{sep}label", sep=sep)
    (long, label), _ = read(odd("", made, suffix, same=True).make(tmp_path))
    assert long.shape == (12, 2, 12) and len(made) > 12 * 200_000
    (same, _), _ = read(odd("", json_of(LONG), "jsonl", same=True).make(tmp_path))
    np.testing.assert_array_equal(long, same)


@pytest.mark.parametrize("sign", CHARACTERS)
def test_characters_end_no_line(sign, tmp_path):
    rows = [(f"good{sign}film", "1"), ("bad", "0")]
    for suffix in ("csv", "tsv", "jsonl"):
        sep = {"tsv": "\t"}.get(suffix, ",")
        made = text_of(rows, header=f"sentence{sep}label", sep=sep)
        path = odd(
            "", json_of(rows) if suffix == "jsonl" else made, suffix, same=True
        ).make(tmp_path)
        assert read_texts(path, OPTIONS).cells[0]["sentence"] == rows[0][0]
    lines = odd("", f"good{sign}film\r\nbad\r\n", "txt", same=True).make(tmp_path)
    found = read_texts(lines, OPTIONS)
    assert [row["sentence"] for row in found.cells] == [rows[0][0], "bad"]
    assert list(found.lines) == [1, 2]
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", sign, "film")
    (tmp_path / "vocab.txt").write_bytes("\n".join(words).encode())
    made = Tokenizer.from_str(find_tokenizer(f"file:{tmp_path}", None))
    assert made.token_to_id("film") == 6
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "classes.csv").write_text(f"a{sign}b\nsky\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_masks(str(tmp_path), None)
    assert "classes" not in str(error.value)  # It has two, and the images are missing.


def test_texts_alone_are_told_from_whole_rows_without_names(tmp_path):
    options = dataclasses.replace(OPTIONS, header=("label", "sentence"))
    path = tmp_path / "t.csv"
    for content, wanted in (
        ("good; film\nbad\n", ["good; film", "bad"]),
        ("1;good film\n0;bad\n", ["good film", "bad"]),
        ("1,good film\n0,bad\n", ["good film", "bad"]),
    ):
        path.write_text(content)
        found = read_texts(path, options)
        assert [row["sentence"] for row in found.cells] == wanted


def test_lines_without_text_are_refused_by_their_number(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("good\n\nfilm\n")
    with pytest.raises(UserError, match="line 2: 'sentence' is empty"):
        read_texts(path, OPTIONS)
    path.write_text("\n" * 30)
    with pytest.raises(UserError, match="and 10 more"):
        read_texts(path, OPTIONS)


def test_a_carriage_return_ends_all_lines_or_none():
    assert lines_of("a\rb\r", "t.txt") == ["a", "b"]
    with pytest.raises(UserError, match="t.txt, line 2: a carriage return within"):
        lines_of("a\nb\rc\n", "t.txt")
    assert lines_of("", "t.txt") == []


@pytest.mark.parametrize(
    ("number", "warns"),
    [
        (lambda at: 1_700_000_000_000 + at * 1000, "leaves 1 of 12 different"),
        (lambda at: 2**24 + at, "leaves 7 of 12"),
        (lambda at: f"{1e9 + at * 0.5}", "leaves 1 of 12"),
        (lambda at: at / 7, None),
        (lambda at: 2**24 - at, None),
    ],
)
def test_labels_that_float32_does_not_tell_apart_are_told(number, warns, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json_of([(r[0], number(at)) for at, r in enumerate(ROWS)]))
    options = dataclasses.replace(OPTIONS, labels="numbers")
    source, _ = load_texts("jsonl", str(path), options, texts.tokenizer())
    assert len(source.warnings) == (warns is not None)
    assert warns is None or warns in source.warnings[0]


def warnings_of(folder, sentences):
    path = folder / "t.jsonl"
    labels = [r[1] for r in ROWS]
    path.write_text(json_of(list(zip(sentences, labels))))
    return read(path)[1]


@pytest.mark.parametrize(
    ("change", "warns"),
    [
        (lambda at, _: "film " * 50, "12 of 12 texts are cut to 12 tokens"),
        (lambda at, t: "the film " * 6 if at == 3 else t, "1 of 12 texts are cut"),
        (lambda at, _: "film " * 11, "12 of 12 texts are cut"),
        (lambda at, _: "film " * 10, None),
        (lambda at, t: t.upper(), "100% of the tokens are unknown"),
        (lambda at, t: "ein guter Film", "100% of the tokens are unknown"),
        (lambda at, t: "the film of plot" if at % 2 else "a zoo is", "29% of"),
        (lambda at, t: "the film is a good one" if at % 2 else t, None),
    ],
)
def test_cut_texts_and_unknown_tokens_are_told(change, warns, tmp_path):
    sentences = [change(at, row[0]) for at, row in enumerate(ROWS)]
    found = warnings_of(tmp_path, sentences)
    assert len(found) == (warns is not None), found
    assert warns is None or warns in found[0]


def test_cut_words_and_unknown_words_are_told(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"words": ["film"] * n + ["Rome"] * 3, "tags": ["O"] * n + ["B"] * 3}
            )
            + "\n"
            for n in (2, 2, 9, 30)
        )
    )
    options = dataclasses.replace(OPTIONS, text=("words",), label="tags", labels="tags")
    source, _ = load_texts("jsonl", str(path), options, texts.tokenizer())
    cut, unknown = source.warnings
    assert "2 of 4 texts are cut to 12 tokens" in cut and "23% of the tokens" in unknown


def test_windows_are_not_cut_but_may_be_unknown(tmp_path):
    path = tmp_path / "t.jsonl"
    for word, unknown in (("film", 0), ("Rome", 1)):
        line = {
            "question": f"the {word}",
            "context": f"{word} " * 60,
            "answers": {"text": [word], "answer_start": [0]},
        }
        path.write_text(f"{json.dumps(line)}\n" * 3)
        options = dataclasses.replace(
            OPTIONS, text=("question", "context"), label="answers", labels="answers"
        )
        source, _ = load_texts("jsonl", str(path), options, texts.tokenizer())
        assert len(source.warnings) == unknown


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_unknown_tokens_of_every_kind_of_tokenizer_are_counted(kind, tmp_path):
    from tokenizers import models, pre_tokenizers

    model = {
        "BPE": lambda: models.BPE({"a": 0, "b": 1}, []),
        "Unigram": lambda: models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
    }[kind]()
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "t.jsonl"
    sentences = ["a a a" if at % 2 else "x y z" for at in range(12)]
    path.write_text(json_of([(s, r[1]) for s, r in zip(sentences, ROWS)]))
    (warning,) = load_texts("jsonl", str(path), OPTIONS, made.to_str())[0].warnings
    wanted = {"BPE": "6 of 12 texts have no tokens", "Unigram": "50% of the tokens"}
    assert wanted[kind] in warning
