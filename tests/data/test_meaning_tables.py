"""Odd tables have the numbers of the clean one, or a warning, or are refused."""

import ast
import bz2
import dataclasses
import functools
import gzip
import json
import lzma
import re

import numpy as np
import pytest
from meaning import Odd, by_name, check
from table_data import data_of, in_order, section, taken

from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.kind import Resources
from finetune_jax.data.tables.encoding import read_fitted, write_fitted
from finetune_jax.data.tables.number_forms import Form, form_of
from finetune_jax.data.tables.schema import MISSING
from finetune_jax.data.tables.source import format_of, rows_to_predict
from finetune_jax.data.tables.unknown import Unknown

HEADER = ("power", "weight", "city", "label")
_RNG = np.random.default_rng(0)
ROWS = [
    (
        f"{_RNG.normal(50, 9):.1f}",
        str(int(_RNG.integers(800, 4000))),
        ("Rome", "Oslo", "Bern")[at % 3],
        ("no", "yes")[at % 2],
    )
    for at in range(40)
]
# The same with cells of no value.
GAPS = [
    tuple(
        "" if at % 7 == place and place < 3 else cell for place, cell in enumerate(row)
    )
    for at, row in enumerate(ROWS)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def text_of(rows=ROWS, header=HEADER, sep=",", end="\n"):
    return (
        end.join(sep.join(cells) for cells in ([header] if header else []) + rows) + end
    )


def file_of(folder, content, suffix="csv"):
    path = folder / f"t.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv(name, content, **outcome):
    """Returns a case of a CSV file that has a text or bytes."""
    return Odd(name=name, make=lambda folder: file_of(folder, content), **outcome)


def changed(place, change, rows=ROWS):
    """Returns rows with other cells in one column."""
    return [
        tuple(change(at, c) if p == place else c for p, c in enumerate(row))
        for at, row in enumerate(rows)
    ]


def read(path, **given):
    """Returns the rows of a file as a model takes them, the labels, and the warnings."""
    data = data_of(path, path.suffix[1:], **given)
    order = in_order(data)
    return (taken(data.train)[order], data.train.label[order]), data.warnings


def clean(folder, rows=ROWS):
    (folder / "clean").mkdir()
    return read(file_of(folder / "clean", text_of(rows)))[0]


def parquet(change, name):
    """Returns the writer of a Parquet file whose columns are texts, one of them changed."""

    def make(folder):
        import pyarrow as pa
        from pyarrow import parquet as files

        columns = dict(zip(HEADER, map(list, zip(*ROWS))))
        columns[name] = change(columns[name])
        files.write_table(pa.table(columns), folder / "t.parquet")
        return folder / "t.parquet"

    return make


EUROPEAN = changed(1, lambda _, c: f"{int(c):,}".replace(",", ".") + ",0")
READ_THE_SAME = (
    csv("blanks", text_of(sep=" , ").replace("label ", "label"), same=True),
    csv("blanks that do not break", text_of(sep="\u00a0,"), same=True),
    csv("byte order mark", b"\xef\xbb\xbf" + text_of().encode(), same=True),
    csv(
        "byte order mark and quoted names",
        b'\xef\xbb\xbf"power","weight","city","label"\r\n'
        + text_of(header=None, end="\r\n").encode(),
        same=True,
    ),
    csv("old Mac", text_of(end="\r"), same=True),
    csv("empty lines first", "\n\n" + text_of(), same=True),
    csv("plus signs", text_of(changed(1, lambda _, c: f"+{c}")), same=True),
    csv(
        "long fractions", text_of(changed(1, lambda _, c: f"{c}.000000000")), same=True
    ),
    csv(
        "powers of ten",
        text_of(changed(1, lambda _, c: f"{int(c) / 1000}e3")),
        same=True,
    ),
    Odd(name="texts in Parquet", make=parquet(list, "power"), same=True),
    Odd(
        name="blanks in Parquet",
        make=parquet(lambda cells: [f" {c} " for c in cells], "city"),
        same=True,
    ),
)
READ_WITH_A_WORD = (
    csv(
        "percents",
        text_of(changed(0, lambda _, c: f"{c}%")),
        same=True,
        warns="without '%'",
    ),
    csv(
        "percents, blank",
        text_of(changed(0, lambda _, c: f"{c} %")),
        same=True,
        warns="'%'",
    ),
    csv(
        "thousands",
        text_of(changed(1, lambda _, c: f'"{int(c):,}"')),
        same=True,
        warns="'weight' is read as numbers with ',' between thousands",
    ),
    csv("dollars", text_of(changed(1, lambda _, c: f"${c}")), same=True, warns=r"'\$'"),
    csv(
        "euros and thousands",
        text_of(changed(1, lambda _, c: f'"{int(c):,}.00 €"')),
        same=True,
        warns="without '€', with ',' between",
    ),
    csv(
        "decimal commas",
        text_of(changed(0, lambda _, c: '"' + c.replace(".", ",") + '"')),
        same=True,
        warns="',' before the fraction",
    ),
    csv(
        "points between thousands",
        text_of(EUROPEAN, sep=";"),
        same=True,
        warns=r"(?s)'\.' between thousands, with ',' before.*",
    ),
    csv("semicolons", text_of(sep=";"), same=True, warns="separated by ';', not ','"),
    csv("tabs", text_of(sep="\t"), same=True, warns=r"separated by '\\t'"),
    csv(
        "semicolons and commas",
        text_of(changed(0, lambda _, c: c.replace(".", ",")), sep=";"),
        same=True,
        warns="(?s)',' before the fraction|separated by ';'",
    ),
    Odd(
        name="percents in Parquet",
        make=parquet(lambda cells: [f"{c}%" for c in cells], "power"),
        same=True,
        warns="without '%'",
    ),
)
DOUBTFUL = (
    csv(
        "units",
        text_of(changed(1, lambda _, c: f"{c} kg")),
        warns="'weight'.*without 'kg'",
    ),
    csv(
        "apostrophes",
        text_of(changed(1, lambda _, c: f"{int(c):,}".replace(",", "'"))),
        warns="'weight'.*between thousands",
    ),
    csv(
        "a few words",
        text_of(changed(1, lambda at, c: "unknown" if at % 9 == 4 else c)),
        warns=r"'weight'.*others are 'unknown'.*config\.data\.missing=\('unknown',\)",
    ),
    csv(
        "some percents",
        text_of(changed(0, lambda at, c: c + "%" * (at % 2))),
        warns="'power'.*not written alike",
    ),
    csv(
        "commas of both kinds",
        text_of(changed(1, lambda at, c: f'"{int(c):,}"' if at % 2 else c)),
        warns="'weight' is a category",
    ),
    csv(
        "days",
        text_of(changed(1, lambda at, _: f"2024-01-{at % 28 + 1:02d}")),
        warns="dates or times",
    ),
    csv(
        "days of Germany",
        text_of(changed(1, lambda at, _: f"{at % 28 + 1}.3.2024")),
        warns="dates",
    ),
    csv(
        "times",
        text_of(changed(1, lambda at, _: f"{at % 24:02d}:30")),
        warns="dates or times",
    ),
    csv(
        "instants",
        text_of(changed(1, lambda at, _: f"2024-01-05T10:{at:02d}:00Z")),
        warns="dates",
    ),
    csv(
        "names of months",
        text_of(changed(1, lambda at, _: f"{at % 28 + 1} Mar 2024")),
        warns="dates",
    ),
    csv(
        "index from 0",
        text_of(changed(1, lambda at, _: str(at))),
        warns="'weight' counts the rows",
    ),
    csv(
        "index from 1, last row first",
        text_of(changed(1, lambda at, _: str(40 - at))),
        warns="counts the rows",
    ),
    csv("no name", text_of(header=("", *HEADER[1:])), warns="'' has no name"),
    csv(
        "pandas' name", text_of(header=("Unnamed: 0", *HEADER[1:])), warns="has no name"
    ),
    csv(
        "identifier",
        text_of(
            changed(1, lambda at, _: str(at * 37 % 1009)),
            header=("power", "user_id", "city", "label"),
        ),
        warns="may be an identifier",
    ),
    csv(
        "numbers of accounts",
        text_of(changed(1, lambda at, _: str(2**60 + at * 999))),
        warns=r"beyond 2\*\*53",
    ),
    csv(
        "names of persons",
        text_of(changed(2, lambda at, _: f"person{at}")),
        warns="'city'.*too rare to be learned",
    ),
    csv(
        "codes with letters",
        text_of(changed(1, lambda at, c: f"A{c}")),
        warns="'weight'.*too rare",
    ),
    csv(
        "open quote",
        text_of(changed(2, lambda at, c: '"' * (at in (5, 9)) + c)).replace(
            '"Bern', '"Bern', 1
        ),
        warns="values of several lines",
    ),
    Odd(
        name="instants in Parquet",
        make=parquet(lambda cells: np.arange(40).astype("datetime64[s]"), "weight"),
        warns="dates or times",
    ),
)
DOUBTFUL += (
    csv(
        "points between thousands and semicolons",
        text_of(changed(1, lambda at, c: f"{at * 97:,}".replace(",", ".")), sep=";"),
        warns=r"'weight' is read as numbers with '\.' between thousands",
    ),
    csv(
        "months",
        text_of(changed(1, lambda at, _: f"2024-{at % 12 + 1:02d}")),
        warns="dates or times",
    ),
    csv(
        "days as numbers",
        text_of(changed(1, lambda at, _: f"202403{at % 31 + 1:02d}")),
        warns="'weight' seems to have dates such as 20240301",
    ),
    csv(
        "digits of another script",
        text_of(changed(1, lambda _, c: "".join(chr(0x660 + int(d)) for d in c))),
        warns="not written alike",
    ),
    csv(
        "several lines",
        text_of(changed(2, lambda at, c: '"a\nb"' if at % 5 == 1 else c)),
        warns="values of several lines",
    ),
)
REFUSED = (
    csv(
        "names twice",
        text_of(header=("power", "power", "city", "label")),
        refuses="columns twice: 'power'",
    ),
    csv(
        "names twice but for blanks",
        text_of(header=("power", " power", "city", "label")),
        refuses="twice",
    ),
    csv("UTF-16", text_of().encode("utf-16"), refuses="probably UTF-16"),
    csv(
        "UTF-16 without a mark",
        text_of().encode("utf-16-le"),
        refuses="probably UTF-16",
    ),
    csv("too many cells", text_of() + "1,2,Rome,yes,3\n", refuses="line 42: 5 values"),
    csv(
        "semicolons and too many cells",
        text_of(sep=";") + "1;2;Rome;yes;3\n",
        refuses="line 42: 5 values",
    ),
    csv(
        "infinite",
        text_of(changed(1, lambda at, c: "inf" if at == 3 else c)),
        refuses="row 4: 'weight'",
    ),
    csv(
        "Latin-1",
        text_of().replace("Bern", "Zürich").encode("latin-1"),
        refuses="'city' is not UTF-8",
    ),
    csv("empty", "", refuses="empty"),
    csv(
        "gzip", gzip.compress(text_of().encode()), refuses="compressed by gzip; unpack"
    ),
    csv("bzip2", bz2.compress(text_of().encode()), refuses="compressed by bzip2"),
    csv("xz", lzma.compress(text_of().encode()), refuses="compressed by xz"),
    csv("Excel", b"PK\x03\x04" + bytes(99), refuses="ZIP, as Excel's .xlsx is"),
)
DELIMITER_FIRST = (
    csv("Excel", "sep=;\n" + text_of(sep=";"), same=True, warns="separated by ';'"),
    csv("Windows", "sep=;\r\n" + text_of(sep=";", end="\r\n"), same=True, warns="';'"),
    csv("marked", "\ufeffSEP=\t\n" + text_of(sep="\t"), same=True, warns=r"'\\t'"),
    csv("quoted", '"sep=|"\n' + text_of(sep="|"), same=True, warns="separated by"),
    csv("comma", "sep=,\n" + text_of(), same=True),
    csv(
        "line",
        "sep=;\n" + text_of(sep=";") + "1;2;Rome;yes;3\n",
        refuses="line 43: 5 values",
    ),
)
BEYOND = (
    Odd(
        name="whole numbers of 64 bits",
        make=parquet(lambda c: np.arange(40, dtype=np.uint64) + 2**63, "weight"),
        warns=r"'weight' has numbers beyond 2\*\*53",
    ),
    csv(
        "large numbers",
        text_of(changed(1, lambda at, _: str(2**63 + at))),
        warns=r"beyond 2\*\*53",
    ),
)


@by_name(
    READ_THE_SAME + READ_WITH_A_WORD + DOUBTFUL + REFUSED + DELIMITER_FIRST + BEYOND
)
def test_an_odd_table_is_read_alike_or_not_without_a_word(odd, tmp_path):
    check(odd, read, clean(tmp_path), tmp_path)


@pytest.mark.parametrize("sign", [*filter(None, MISSING), " NA", "? ", "-", "–"])
def test_signs_of_nothing_are_empty_cells(sign, tmp_path):
    is_dash = sign in "-–"  # A category may be a dash.
    rows = [
        tuple(c or ("" if is_dash and at == 2 else sign) for at, c in enumerate(row))
        for row in GAPS
    ]
    odd = csv("", text_of(rows), same=True)
    check(odd, read, clean(tmp_path, GAPS), tmp_path)


def test_signs_of_nothing_may_be_given(tmp_path):
    rows = [tuple(c or "-999" for c in row) for row in GAPS]
    read_so = functools.partial(read, missing=("-999",))
    check(csv("", text_of(rows), same=True), read_so, clean(tmp_path, GAPS), tmp_path)


@pytest.mark.parametrize(
    ("sign", "cell"),
    [
        ("-999", "-999.0"),
        ("-999", "-999.00"),
        ("-999.0", "-999"),
        ("-999", "-9.99e2"),
        ("9999", "9999."),
        ("-999", " -999.0 "),
        ("-999", "\u2212999"),
        ("0", "-0.0"),
    ],
)
def test_signs_of_nothing_are_compared_as_numbers(sign, cell, tmp_path):
    rows = [
        tuple(c or ("" if at == 2 else cell) for at, c in enumerate(r)) for r in GAPS
    ]
    read_so = functools.partial(read, missing=(sign,))
    check(csv("", text_of(rows), same=True), read_so, clean(tmp_path, GAPS), tmp_path)


def test_signs_of_nothing_in_numbers_of_parquet_are_missing(tmp_path):
    def weights(cells):
        return [float(row[1] or -999) for row in GAPS]

    path = parquet(weights, "weight")(tmp_path)
    for sign in ("-999", "-999.0"):
        assert data_of(path, "parquet", missing=(sign,)).spec.inputs.marks == (1,)


@pytest.mark.parametrize(
    ("signs", "told"),
    [
        (("-9999",), "'-9999'"),
        (("-999", "unknown"), "'unknown'"),
        (("Unknown", "99"), "'Unknown', '99'"),
        (("-999.5",), "'-999.5'"),
        (("Bern ",), "'Bern '"),
        (("-999", "Bern"), None),
        (("-999", "NA"), None),
    ],
)
def test_signs_that_match_no_cell_are_told(signs, told, tmp_path):
    rows = changed(1, lambda at, c: "-999" if at % 7 == 1 else c)
    path = file_of(tmp_path, text_of(rows))
    found = [text for text in read(path, missing=signs)[1] if ".missing: no" in text]
    assert len(found) == (told is not None), found
    assert told is None or f"no cell of the columns is {told};" in found[0]


def test_what_is_doubted_can_be_said(tmp_path):
    rows = changed(1, lambda _, c: f"{c} kg")
    read_so = functools.partial(read, columns=(("weight", "number"),))
    check(csv("", text_of(rows), same=True), read_so, clean(tmp_path), tmp_path)
    path = file_of(tmp_path, text_of(changed(1, lambda at, c: str(at))))
    assert not read(path, columns=(("weight", "number"),))[1]
    path = file_of(tmp_path, text_of(changed(1, lambda at, c: f"2024-01-{at + 1}")))
    assert not read(path, columns=(("weight", "category"),))[1]
    path = file_of(tmp_path, text_of(changed(1, lambda at, c: "x" if at == 4 else c)))
    with pytest.raises(UserError, match="line 6: 'weight' is 'x', not a number"):
        read(path, columns=(("weight", "number"),))


def test_labels_have_forms_too(tmp_path):
    rows = [(*row[:3], f"${int(row[1]):,}".join('""')) for row in ROWS]
    data = data_of(file_of(tmp_path, text_of(rows)), "csv", labels="numbers")
    wanted = [[float(row[1])] for row in ROWS]
    np.testing.assert_array_equal(data.train.label[in_order(data)], wanted)
    (warning,) = data.warnings
    assert "'label' is read as numbers without '$'" in warning


LARGE_NUMBERS = (
    (lambda at: str(1_700_000_000_000 + at * 1000), r"leaves \d of 40 different"),
    (lambda at: str(2**24 + at), "leaves 21 of 40"),
    (lambda at: f"-{10**9 + at * 7}", "rounding to float32"),
    (lambda at: f"{1e9 + at * 0.5}", "rounding to float32"),
    (lambda at: f"{10**9 + at * 200}", "leaves 40 of 40"),
    (lambda at: f"{20240101 + at}", r"leaves \d\d of 40"),
    (lambda at: str(2**60 + at), r"beyond 2\*\*53"),
    (lambda at: str(2**24 - at), None),
    (lambda at: f"{at * 1e30}", None),
    (lambda at: f"{at / 7}", None),
    (lambda at: f"{1_700_000_000 + at * 86_400}", None),
    (lambda at: "5", None),
)


@pytest.mark.parametrize(("number", "warns"), LARGE_NUMBERS)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_that_float32_does_not_tell_apart_are_told(
    number, warns, kind, tmp_path
):
    import pyarrow as pa
    from pyarrow import parquet as files

    rows = [(*row[:3], number(at)) for at, row in enumerate(ROWS)]
    path = file_of(tmp_path, text_of(rows))
    if kind == "parquet":
        columns = dict(zip(HEADER, map(list, zip(*rows))))
        columns["label"] = list(map(ast.literal_eval, columns["label"]))
        path = tmp_path / "t.parquet"
        files.write_table(pa.table(columns), path)
    for _ in range(2):  # The columns are kept.
        found = data_of(path, kind, labels="numbers").warnings
        assert (len(found) == 1) == (warns is not None), found
        assert warns is None or re.search(f"'label': .*{warns}", found[0]), found


def test_rules_in_messages_match_their_columns(tmp_path):
    header = ("price ($)", *HEADER[1:])
    path = file_of(tmp_path, text_of(changed(0, lambda at, c: f"{at}"), header=header))
    (warning,) = read(path)[1]
    rule = warning.partition("config.data.columns=")[2].partition(" leaves")[0]
    found = data_of(path, "csv", columns=eval(rule))
    assert not found.warnings and found.spec.inputs.schema.numbers == ("weight",)


@pytest.mark.parametrize("factor", [1, 1000, 10**6])
def test_times_keep_their_digits(factor, tmp_path):
    at = np.random.default_rng(1).permutation(4000)[:40]
    seconds = np.array([str((1_700_000_000 + int(t)) * factor) for t in at])
    path = file_of(tmp_path, text_of(changed(1, lambda row, _: seconds[row])))
    data = data_of(path, "csv")
    found = taken(data.train)[in_order(data)][:, 1].view(np.float32)
    np.testing.assert_allclose(found, (at - at.mean()) / at.std(), atol=1e-5)
    assert not data.warnings and len(np.unique(found)) == 40


def kept(data, folder):
    """Returns what a run would keep of a table."""
    write_fitted(folder, data.fitted)
    plain = {"data": data.spec.to_json()}
    (folder / "manifest.json").write_text(json.dumps(plain))
    return read_fitted(folder, "--workdir")


def predicted(path, fitted):
    return np.concatenate(list(rows_to_predict(path, format_of("csv"), fitted)))


def test_predictions_read_columns_as_training_did(tmp_path):
    rows = changed(0, lambda _, c: f" {c}%", changed(1, lambda _, c: f'"{int(c):,}"'))
    data = data_of(file_of(tmp_path, text_of(rows)), "csv")
    fitted, wanted = kept(data, tmp_path), taken(data.train)[in_order(data)]
    np.testing.assert_array_equal(predicted(tmp_path / "t.csv", fitted), wanted)
    mixed = rows[:-1] + [tuple(c.strip('"').replace(",", "") for c in rows[-1])]
    path = file_of(tmp_path, text_of(mixed, sep=";"))
    np.testing.assert_array_equal(predicted(path, fitted), wanted)
    path = file_of(tmp_path, text_of(changed(0, lambda _, c: c.strip("% "), rows)))
    with pytest.raises(
        UserError, match="line 2: 'power' is '.*', not a number without '%'"
    ):
        predicted(path, fitted)


SPLITS = {"train": "train", "validation": "validation"}


def split_in_two(folder, change, place=2, rows=ROWS, **given):
    """Returns the data of two files, the second with other cells in one column."""
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(text_of(rows))
    (folder / "validation.csv").write_text(text_of(changed(place, change, rows)))
    return data_of(folder, "csv", **{**SPLITS, **given})


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda _, c: c.upper(), "100%"),
        (lambda _, c: f"city {c}", "100%"),
        (lambda _, c: c.replace("o", "0"), "68%"),
        (lambda at, c: "Rom" if c == "Rome" else c if at % 5 else "", "40%"),
        (lambda _, c: c[::-1], "100%"),
        (lambda at, c: f"{c}{at}" if at % 4 == 0 else c, "25%"),
    ],
)
def test_unknown_values_of_held_out_rows_are_told(change, share, tmp_path):
    warnings = split_in_two(tmp_path / "a", change).warnings
    found = [text for text in warnings if "too rarely" in text]
    assert len(found) == 1, warnings
    assert "validation.csv: " in found[0]
    assert f"{share} of the values of column 'city'" in found[0]
    assert "known are 'Rome', 'Oslo', 'Bern'" in found[0]
    few = split_in_two(tmp_path / "b", lambda at, c: "Ulm" if at < 4 else c)
    assert not few.warnings


@pytest.mark.parametrize(
    ("change", "cell"),
    [
        (lambda _, c: f"{c} kg", " kg'"),
        (lambda _, c: f"{c}%", "%'"),
        (lambda at, c: "unknown" if at == 5 else c, "'unknown'"),
        (lambda at, c: f"0{c}", "'0"),
        (lambda at, c: f'"{int(c):,}"', ",'"),
    ],
)
def test_files_that_write_numbers_in_another_way_are_named(change, cell, tmp_path):
    warnings = split_in_two(tmp_path / "a", change, place=1).warnings
    (found,) = [text for text in warnings if "others are not" in text]
    assert f"{tmp_path}/a/validation.csv has '" in found and "train.csv" not in found
    assert cell.strip("'") in found


def test_delimiters_before_rows_without_names(tmp_path):
    path = file_of(tmp_path, "sep=;\n" + text_of(header=(), sep=";"))
    data = data_of(path, "csv", header=HEADER)
    np.testing.assert_array_equal(taken(data.train)[in_order(data)], clean(tmp_path)[0])
    fitted = kept(data, tmp_path)
    rows = [row[:3] for row in ROWS]
    path = file_of(tmp_path, "sep=;\n" + text_of(rows, header=(), sep=";"))
    wanted = taken(data.train)[in_order(data)]
    np.testing.assert_array_equal(predicted(path, fitted), wanted)


def test_whole_numbers_with_a_fraction_are_the_same_category(tmp_path):
    codes = changed(2, lambda at, _: str(at % 3))
    is_category = {"columns": (("city", "category"),), "min_count": 1}
    wanted = split_in_two(tmp_path / "a", lambda _, c: c, rows=codes, **is_category)
    assert not wanted.warnings
    floats = changed(2, lambda _, c: f"{c}.0", codes)
    for name, rows, change in (
        ("b", codes, lambda _, c: f"{c}.0"),
        ("c", floats, lambda _, c: c[:-2]),
        ("d", codes, lambda at, c: f"{c}.000" if at % 2 else f"{c}."),
    ):
        data = split_in_two(tmp_path / name, change, rows=rows, **is_category)
        assert not data.warnings
        found, right = data.held_out["validation"], wanted.held_out["validation"]
        np.testing.assert_array_equal(taken(found), taken(right))
    mixed = changed(2, lambda at, c: f"{c}.0" if at % 2 else c, codes)
    path = file_of(tmp_path, text_of(mixed))
    (warning,) = read(path, columns=(("city", "category"),))[1]
    assert "'city' has 3 whole numbers with a fraction and without" in warning


def test_unknown_values_of_files_to_predict_are_counted(tmp_path):
    fitted = kept(data_of(file_of(tmp_path, text_of()), "csv"), tmp_path)
    for change, share in (
        (lambda _, c: c.lower(), "100%"),
        (lambda at, c: "Ulm" if at % 2 else c, "50%"),
    ):
        found = Unknown(spec=fitted.spec)
        found.add(predicted(file_of(tmp_path, text_of(changed(2, change))), fitted))
        (line,) = found.lines(tmp_path)
        assert f"{share} of the values of column 'city'" in line
    for change in (lambda at, c: "Ulm" if at < 8 else c, lambda at, _: ""):
        found = Unknown(spec=fitted.spec)
        found.add(predicted(file_of(tmp_path, text_of(changed(2, change))), fitted))
        assert not found.lines(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cell", ["inf", "-inf", "Infinity", "1e308", "-1e39", "9e999"])
def test_predictions_refuse_infinite_numbers(cell, tmp_path):
    fitted = kept(data_of(file_of(tmp_path, text_of()), "csv"), tmp_path)
    path = file_of(tmp_path, text_of(changed(1, lambda at, c: cell if at == 3 else c)))
    with pytest.raises(UserError, match="row 4: 'weight' is infinite, or too large"):
        predicted(path, fitted)


@pytest.mark.filterwarnings("error")
def test_predictions_refuse_numbers_that_overflow_once_standardised(tmp_path):
    rows = changed(0, lambda at, _: f"{at % 2 * 1e-9}")
    fitted = kept(data_of(file_of(tmp_path, text_of(rows)), "csv"), tmp_path)
    path = file_of(
        tmp_path, text_of(changed(0, lambda at, c: "3e38" if at == 5 else c, rows))
    )
    with pytest.raises(UserError, match="row 6: 'power' is too large beside"):
        predicted(path, fitted)


def test_runs_of_before_read_cells_as_they_did(tmp_path):
    rows = changed(2, lambda at, c: f" {c}" if at % 2 else "NA" if at == 4 else "?")
    path = file_of(
        tmp_path, text_of(rows, header=("power", " weight", "city", "label"))
    )
    data = data_of(path, "csv", columns=(("weight", "number"), ("city", "category")))
    schema = dataclasses.replace(
        data.spec.inputs.schema, version=1, numbers=("power", " weight")
    )
    numbers = [
        dataclasses.replace(n, name=s)
        for n, s in zip(data.spec.inputs.numbers, schema.numbers)
    ]
    spec = dataclasses.replace(data.spec.inputs, schema=schema, numbers=tuple(numbers))
    plain = dataclasses.asdict(spec)
    for key in ("forms", "missing", "version"):
        plain["schema"].pop(key)
    write_fitted(tmp_path, data.fitted)
    (tmp_path / "manifest.json").write_text(json.dumps({"data": {"table": plain}}))
    fitted = read_fitted(tmp_path, "--workdir")
    assert fitted.spec.schema == schema
    found = predicted(path, fitted)
    raw = np.array([row[0] for row in rows], np.float32).astype(np.float64)
    one = spec.numbers[0]
    np.testing.assert_array_equal(
        found[:, 0].view(np.float32), ((raw - one.mean) / one.std).astype(np.float32)
    )
    # Blanks are of the values, which this vocabulary has without, and '?' is one.
    assert (found[1::2, -1] == 1).all() and found[4, -1] == 0 and found[2, -1] == 1
    again = make_data(section(path, "csv"), seed=0, resources=Resources(fitted=fitted))
    np.testing.assert_array_equal(taken(again.train)[in_order(again)], found)


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (("1,234", "1,234,567"), Form(thousands=",")),
        (("1,234", "12,5"), Form(decimal=",")),
        (("0,123", "0,456"), Form(decimal=",")),
        (("1.234,5", "12"), Form(thousands=".", decimal=",")),
        (("1,234", "1234"), None),
        (("-$5", "$1,000.5"), Form(before="$", thousands=",")),
        (("−5", "3"), Form()),
        (("Q1", "Q2"), None),
        (("5", "5%"), None),
        (("10.0.0.1", "10.0.0.2"), None),
        (("-", ".", "5"), Form()),
        (("kg",), None),
        (("5", "1.234"), Form()),
    ],
)
def test_forms_of_numbers(texts, form):
    assert form_of(texts) == form
