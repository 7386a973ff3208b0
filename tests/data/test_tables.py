import csv
import os

import clicks
import numpy as np
import pytest
from table_data import data_of, in_order, section, taken

from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.spec import spec_from_json
from finetune_jax.data.tables import columns as columns_module
from finetune_jax.data.tables.encoding import read_fitted, write_fitted
from finetune_jax.data.tables.source import format_of, rows_to_predict

HEADER = ["age", "city", "zip", "label"]
ROWS = [
    ["31", "Rome", "00123", "no"],
    ["", "Oslo", "00124", "yes"],
    ["47.5", "", "00123", "no"],
    ["2", "Rome", "01000", "yes"],
] * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def parts(data, dataset=None):
    found, count = taken(dataset or data.train), len(data.spec.inputs.features)
    return found[:, :count].view(np.float32), found[:, count:]


def test_numbers_and_categories_are_what_another_reader_reads(tmp_path):
    lines = clicks.rows(60)
    path = clicks.write(tmp_path / "train.txt", lines)
    data = data_of(path, log_columns=(r"I\d+",))
    with path.open() as file:
        theirs = list(csv.reader(file, delimiter="\t"))
    order = in_order(data)
    numbers, places = parts(data)
    for at, name in enumerate(clicks.NUMBERS):
        raw = np.array([float(row[1 + at] or "nan") for row in theirs])
        logs = np.sign(raw) * np.log1p(np.abs(raw))
        wanted = (logs - np.nanmean(logs)) / np.nanstd(logs)
        np.testing.assert_allclose(
            numbers[order, at], np.nan_to_num(wanted), rtol=1e-5, atol=1e-6
        )
        mark = data.spec.inputs.features.index(f"{name} is missing")
        assert (numbers[order, mark] == np.isnan(raw)).all()
    for at, name in enumerate(clicks.CATEGORIES):
        known = ["", None, *data.fitted.known[name].to_pylist()]
        assert [known[row] for row in places[order, at]] == [r[14 + at] for r in theirs]
    assert (data.train.label[order] == [int(row[0]) for row in theirs]).all()


def test_a_schema_is_inferred_and_rules_go_before(tmp_path):
    path = clicks.write(tmp_path / "t.csv", ROWS, HEADER, ",")
    table = data_of(path, "csv").spec.inputs
    assert table.schema.numbers == ("age",)
    assert table.schema.categories == ("city", "zip")  # Zeros lead no number.
    assert [line.split(":")[0].strip() for line in table.lines()[1:]] == HEADER[:3]
    table = data_of(path, "csv", columns=(("zip", "ignore"), (".*", "category")))
    assert table.spec.inputs.schema.inputs == ("age", "city")
    with pytest.raises(UserError, match="'tip' matches no column.*'zip'"):
        data_of(path, "csv", columns=(("tip", "number"),))


def test_quotes_and_line_breaks_are_cells_of_a_csv(tmp_path):
    lines = [["1", '"a, ""b""\nc"', "x", "no"], ["2", "d", "y", "yes"]]
    data = data_of(clicks.write(tmp_path / "t.csv", lines, HEADER, ","), "csv")
    assert data.fitted.known["city"].to_pylist() == ['a, "b"\nc', "d"]


def test_parquet_gives_what_csv_gives(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = clicks.write(tmp_path / "t.csv", ROWS, HEADER, ",")
    cells = list(zip(*ROWS))
    table = pa.table(
        {
            "age": pa.array([float(v) if v else None for v in cells[0]]),
            "city": [v or None for v in cells[1]],
            "zip": list(cells[2]),
            "label": list(cells[3]),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    one, other = data_of(path, "csv"), data_of(tmp_path / "t.parquet", "parquet")
    assert (taken(one.train) == taken(other.train)).all()
    assert one.spec.inputs.lines() == other.spec.inputs.lines()
    (tmp_path / "t.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a Parquet file"):
        data_of(tmp_path / "t.parquet", "parquet")


def test_what_is_fitted_is_of_training_rows_alone(tmp_path):
    lines = clicks.rows(40)
    for row in lines[30:]:
        row[1], row[14] = "1000000", "onlyheld"
    folder = tmp_path / "days"
    folder.mkdir()
    clicks.write(folder / "train.txt", lines[:30])
    clicks.write(folder / "test.txt", lines[30:])
    data = data_of(folder, train="train", test="test")
    own = np.array([float(row[1]) for row in lines[:30] if row[1]])
    number = data.spec.inputs.numbers[0]
    assert number.mean == pytest.approx(own.mean(), rel=1e-12)
    assert number.std == pytest.approx(own.std(), rel=1e-12)
    assert "onlyheld" not in data.fitted.known["C1"].to_pylist()
    _, places = parts(data, data.held_out["test"])
    assert (places[:, 0] == 1).all()  # The row of what was not seen.


def test_rare_values_share_a_row_and_missing_ones_have_their_own(tmp_path):
    cities = ["a", "a", "b", "", "c", "a"]
    lines = [["1", city, "0", "yn"[i % 2]] for i, city in enumerate(cities)]
    path = clicks.write(tmp_path / "t.csv", lines, HEADER, ",")
    data = data_of(path, "csv", min_count=2, columns=(("zip", "ignore"),))
    _, places = parts(data)
    assert places[in_order(data), 0].tolist() == [2, 2, 1, 0, 1, 2]
    category = data.spec.inputs.categories[0]
    assert (category.rows, category.missing, category.unseen) == (3, 1 / 6, 2 / 6)


def test_hashed_values_need_no_vocabulary(tmp_path):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(50))
    data = data_of(path, hash_rows=3)
    _, places = parts(data)
    assert not data.fitted.known
    assert {0} < set(np.unique(places).tolist()) <= {0, 2, 3, 4}
    assert all(rows == 5 for _, rows in data.spec.inputs.fields)


def test_files_are_converted_once_and_damage_is_seen(tmp_path, monkeypatch):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(50))
    first, calls, read = taken(data_of(path).train), [], columns_module.batches

    def counted(*arguments, **options):
        calls.append(arguments)
        return read(*arguments, **options)

    monkeypatch.setattr(columns_module, "batches", counted)
    assert (taken(data_of(path).train) == first).all() and not calls
    (place,) = (tmp_path / os.environ["FINETUNE_JAX_CACHE"] / "columns").iterdir()
    file = place / "0.bin"
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(content)
    assert (taken(data_of(path).train) == first).all() and len(calls) == 1
    (place / "about.json").unlink()  # As if it had never been finished.
    assert (taken(data_of(path).train) == first).all() and len(calls) == 2
    clicks.write(path, clicks.rows(50, seed=1))
    assert (taken(data_of(path).train) != first).any() and len(calls) == 3


def test_blocks_and_files_change_no_code(tmp_path, monkeypatch):
    lines = clicks.rows(400)
    whole = data_of(clicks.write(tmp_path / "a.txt", lines), split_seed=3)
    read = columns_module.batches
    monkeypatch.setattr(columns_module, "GROUP", 4)  # Several of them.
    monkeypatch.setattr(
        columns_module,
        "batches",
        lambda *arguments: read(*arguments, block=4096),
    )
    blocks = data_of(clicks.write(tmp_path / "b.txt", [*lines, lines[0]]), train="all")
    _, ours = parts(whole)
    _, theirs = parts(blocks)
    known = [
        [
            ["", "unseen", *data.fitted.known[name].to_pylist()]
            for name in clicks.CATEGORIES
        ]
        for data in (whole, blocks)
    ]
    for at in range(26):
        one = [known[0][at][row] for row in ours[in_order(whole), at]]
        other = [known[1][at][row] for row in theirs[in_order(blocks), at]]
        assert one == other[:-1]


def test_days_are_splits_of_their_own(tmp_path):
    for day in range(3):
        clicks.write(tmp_path / f"day_{day}.tsv", clicks.rows(20, seed=day))
    data = data_of(tmp_path, train="day_0+day_1[:50%]", test="day_2")
    assert len(data.train) == 30 and len(data.held_out["test"]) == 20
    assert data.train.indices.tolist() == list(range(30))


def test_predictions_encode_rows_as_training_did_to_the_bit(tmp_path):
    lines = clicks.rows(80)
    data = data_of(clicks.write(tmp_path / "t.txt", lines), log_columns=("I.*",))
    write_fitted(tmp_path, data.fitted)
    import json

    (tmp_path / "manifest.json").write_text(json.dumps({"data": data.spec.to_json()}))
    fitted = read_fitted(tmp_path, "--workdir")
    plain = json.loads(json.dumps(data.spec.to_json()))
    assert spec_from_json(plain, section(tmp_path)).inputs == data.spec.inputs
    kind = format_of("criteo")
    for name, cut in (("with.txt", 0), ("without.txt", 1)):  # A label, or none.
        path = clicks.write(tmp_path / name, [row[cut:] for row in lines])
        found = np.concatenate(list(rows_to_predict(path, kind, fitted)))
        assert (found == taken(data.train)[in_order(data)]).all()
    clicks.write(path, [["never", *row[1:]] for row in lines])
    with pytest.raises(UserError, match="line 1: 'I1' is 'never', not a number"):
        list(
            rows_to_predict(
                clicks.write(path, [["never", *lines[0][2:]]]), kind, fitted
            )
        )
    content = (
        (tmp_path / "vocabulary.arrow").read_bytes().replace(b"00000001", b"00000009")
    )
    (tmp_path / "vocabulary.arrow").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_fitted(tmp_path, "--workdir")


def test_what_was_fitted_before_is_continued(tmp_path):
    import json

    first, second = clicks.rows(40), clicks.rows(40, seed=1)
    for row in second:
        row[14] = "newvalue"
    before = data_of(clicks.write(tmp_path / "a.txt", first))
    write_fitted(tmp_path, before.fitted)
    (tmp_path / "manifest.json").write_text(json.dumps({"data": before.spec.to_json()}))
    after = data_of(clicks.write(tmp_path / "b.txt", second), fitted=None)
    assert after.spec.inputs.numbers != before.spec.inputs.numbers
    config = section(tmp_path / "b.txt", fitted=str(tmp_path))
    after = make_data(config, seed=0)
    assert after.spec.inputs.numbers == before.spec.inputs.numbers
    known = before.fitted.known["C1"].to_pylist()
    assert after.fitted.known["C1"].to_pylist() == [*known, "newvalue"]
    with pytest.raises(UserError, match="'C1' is not hashed there"):
        make_data(
            section(tmp_path / "b.txt", fitted=str(tmp_path), hash_rows=4), seed=0
        )


def bad(change):
    lines = clicks.rows(20)
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[6].pop(), "line 7: 39 values, but there are 40 columns"),
        (
            lambda rows: rows[4].__setitem__(0, "2"),
            "row 5: 'label' is '2'; one of 0, 1",
        ),
        (lambda rows: rows[3].__setitem__(0, ""), "row 4: 'label' is missing"),
        (
            lambda rows: rows[2].__setitem__(5, "x1"),
            "line 3: 'I5' is 'x1', not a number",
        ),
        (lambda rows: rows[9].__setitem__(1, "1e50"), "row 10: 'I1' is infinite"),
        (lambda rows: rows.clear(), "no rows|Empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named(change, message, tmp_path):
    path = clicks.write(tmp_path / "t.txt", bad(change))
    with pytest.raises(UserError, match=message):
        data_of(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(20))
    lines = path.read_bytes().split(b"\n")
    lines[7] = lines[7][:-3] + b"\xff\xfe\xfd"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 8: 'C26' is not UTF-8"):
        data_of(path)


def test_columns_that_differ_between_files_are_named(tmp_path):
    clicks.write(tmp_path / "train.csv", ROWS, HEADER, ",")
    other = ["age", "town", "zip", "label"]
    clicks.write(tmp_path / "test.csv", ROWS, other, ",")
    with pytest.raises(
        UserError, match="test.csv: no column 'city'.*\n.*train.csv: no"
    ):
        data_of(tmp_path, "csv", train="train")
    clicks.write(tmp_path / "test.csv", [["x", *row[1:]] for row in ROWS], HEADER, ",")
    assert (
        "age" in data_of(tmp_path, "csv", train="train").spec.inputs.schema.categories
    )


def test_columns_that_say_nothing_or_are_odd_are_named(tmp_path):
    lines = [["7", "Rome", f"{i}.5", "yn"[i % 2]] for i in range(40)]
    path = clicks.write(tmp_path / "t.csv", lines, HEADER, ",")
    data = data_of(path, "csv", columns=(("zip", "category"),))
    assert [text.split("'")[1] for text in data.warnings] == ["age", "city", "zip"]
    assert "all of them numbers" in data.warnings[2]
    numbers, _ = parts(data)
    assert (numbers == 0).all()


def test_labels_may_be_numbers_or_more_than_two_classes(tmp_path):
    lines = [[str(i), "x", "y", str(i / 2)] for i in range(40)]
    path = clicks.write(tmp_path / "t.csv", lines, HEADER, ",")
    data = data_of(path, "csv", labels="numbers")
    assert data.train.label[in_order(data), 0].tolist() == [i / 2 for i in range(40)]
    assert data.spec.targets == ("label",)
    with pytest.raises(UserError, match="40 different values in 40 rows"):
        data_of(path, "csv")
    lines = [[str(i), "x", "y", str(i % 11)] for i in range(40)]
    data = data_of(clicks.write(path, lines, HEADER, ","), "csv")
    assert data.spec.class_names == tuple(map(str, range(11)))


def test_what_is_said_of_tables_is_refused_elsewhere(tmp_path):
    with pytest.raises(UserError, match="config.data.hash_rows: 4, but 'digits' is no"):
        make_data(section(None, "digits", train="train", hash_rows=4), seed=0)
    path = clicks.write(tmp_path / "t.csv", ROWS, HEADER, ",")
    with pytest.raises(UserError, match="config.data.mean.*standardised by themselves"):
        data_of(path, "csv", mean=(1.0,))
    with pytest.raises(UserError, match="no column 'labels'.*'label'"):
        data_of(path, "csv", label="labels")
