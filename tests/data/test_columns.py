"""Columns of files: cut anywhere, in any threads, beside other runs, on a full disk."""

import dataclasses
import errno
import gzip
import io
import json
import os
import pathlib
import threading
import time

import clicks
import numpy as np
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.data.sources.criteo import TABLE
from finetune_jax.data.sources.tsv import TABLE as TSV
from finetune_jax.data.tables import columns as columns_module
from finetune_jax.data.tables import files
from finetune_jax.data.tables.columns import open_columns
from finetune_jax.data.tables.files import batches, infer_schema
from finetune_jax.data.tables.schema import Number, Schema, TableOptions, TableSpec

PAIRS = Schema(
    names=("text", "number"),
    numbers=("number",),
    categories=("text",),
    label=None,
    labels="classes",
)


def schema_of(path):
    return infer_schema([path], TABLE, TableOptions(header=TABLE.header))


def opened(path, cache):
    return open_columns(path, TABLE, schema_of(path), str(cache))


def written(cache):
    """Returns what the one table in a cache holds, by the names of files."""
    (place,) = (cache / "columns").iterdir()
    return {
        file.name: file.read_bytes()
        for file in place.iterdir()
        if file.suffix == ".bin"
    }


def small_blocks(monkeypatch, size):
    monkeypatch.setattr(
        columns_module,
        "batches",
        lambda *arguments: batches(*arguments, block=size),
    )


def read(path, size):
    found = [batch.to_pydict() for batch in batches(path, TSV, PAIRS, block=size)]
    return [pair for part in found for pair in zip(part["text"], part["number"])]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_rows_are_the_same_wherever_a_file_is_cut(end, tmp_path):
    mark = "\ufeff".encode()
    texts = [b"a", b"", mark + b"b", b"", b"c\xc3\xa9", mark, b'"d'] * 4
    lines = [b"%s\t%d" % (text, at) for at, text in enumerate(texts)]
    lines[9:9] = [b""] * 30  # Lines of nothing are no rows.
    path = tmp_path / "t.tsv"
    for begin, last in ((b"", end), (mark, b""), (mark, end + end)):
        path.write_bytes(begin + end.join(lines) + last)
        wanted = [(t.decode() or None, float(at)) for at, t in enumerate(texts)]
        for size in (*range(16, 100), 150, 200, 300):
            assert read(path, size) == wanted, size


def test_reads_that_give_less_than_is_asked_for_lose_nothing():
    text = b"".join(b"%d\n" % number for number in range(500))

    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    for size in (8, 64):
        found = [bytes(block) for block in files._blocks(Slow(text), size)]
        assert b"".join(found).split() == text.split()
        assert all(block[-1:] == b"\n" and len(block) <= size for block in found)


def test_a_compressed_file_is_read_by_its_name(tmp_path):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(300))
    packed = tmp_path / "t.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    one, other = opened(path, tmp_path / "one"), opened(packed, tmp_path / "other")
    assert (one.codes == other.codes).all() and len(one) == 300
    np.testing.assert_array_equal(one.numbers, other.numbers)


def test_a_line_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("a\t1\n" + "b" * 100 + "\t2\n")
    with pytest.raises(
        UserError, match=r"(?s)t\.tsv cannot be read.*longer than 64 bytes"
    ):
        read(path, 64)
    assert len(read(path, 128)) == 2


def test_the_first_block_is_there_before_the_file_is_read(tmp_path, monkeypatch):
    path, cut = clicks.write(tmp_path / "t.txt", clicks.rows(500)), []
    blocks = files._blocks

    def counted(*arguments):
        for block in blocks(*arguments):
            cut.append(block)
            yield block

    monkeypatch.setattr(files, "_blocks", counted)
    before = threading.active_count()
    some = batches(path, TABLE, schema_of(path), block=1024)
    next(some)
    assert len(cut) < 40 and len(cut) < path.stat().st_size / 1024 / 2
    some.close()
    assert threading.active_count() == before


def test_no_count_of_threads_and_no_block_changes_what_is_written(
    tmp_path, monkeypatch
):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(300))
    opened(path, tmp_path / "whole")
    small_blocks(monkeypatch, 4096)
    monkeypatch.setattr(columns_module, "GROUP", 3)
    for count in (1, 2, 7):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, count=count: range(count)
        )
        opened(path, tmp_path / f"{count}")
        found, wanted = written(tmp_path / f"{count}"), written(tmp_path / "whole")
        assert found == wanted and len(found["1.bin"]) == 300 * 26 * 4


def test_the_errors_of_all_blocks_are_named(tmp_path, monkeypatch):
    lines = clicks.rows(200)
    lines[150].pop()
    lines[40][3] = "three"
    path = clicks.write(tmp_path / "t.txt", lines)
    small_blocks(monkeypatch, 2048)
    with pytest.raises(UserError, match="(?s)line 41: 'I3' is 'three'.*line 151: 39"):
        opened(path, tmp_path / "cache")
    assert not list((tmp_path / "cache/columns").iterdir())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    lines = clicks.rows(20)
    path = clicks.write(tmp_path / "t.txt", lines)

    def growing(*arguments):
        yield from batches(*arguments)
        clicks.write(path, [*lines, lines[0]])

    with monkeypatch.context() as patched:
        patched.setattr(columns_module, "batches", growing)
        with pytest.raises(UserError, match=r"t\.txt: changed while it was read"):
            opened(path, tmp_path / "cache")
    assert not list((tmp_path / "cache/columns").iterdir())
    assert len(opened(path, tmp_path / "cache")) == 21


def test_a_disk_that_is_full_is_told_and_nothing_stays(tmp_path, monkeypatch):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(200))
    small_blocks(monkeypatch, 4096)
    before = threading.active_count()

    class Full:
        """A file of which no more than a block can be written."""

        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, content):
            if self._file.tell() > 4096:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content)

    open_ = pathlib.Path.open

    def opening(self, mode="r", *arguments, **options):
        file = open_(self, mode, *arguments, **options)
        return Full(file) if self.name == "0.bin" and mode == "wb" else file

    monkeypatch.setattr(pathlib.Path, "open", opening)
    with pytest.raises(UserError, match="cache_dir.*t.txt.*No space left") as raised:
        opened(path, tmp_path / "cache")
    assert raised.value.__cause__  # It is still held, and what it holds.
    assert not list((tmp_path / "cache/columns").iterdir())
    assert threading.active_count() == before


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_a_faster_run_wrote_is_checked_and_taken(is_whole, tmp_path, monkeypatch):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(20))
    cache, verified = tmp_path / "cache", []

    def late(*arguments):
        yield from batches(*arguments)
        with monkeypatch.context() as patched:
            patched.setattr(columns_module, "batches", batches)
            opened(path, cache)
        if not is_whole:
            (file,) = cache.glob("columns/[!.]*/0.bin")
            file.write_bytes(b"\1" + file.read_bytes()[1:])

    monkeypatch.setattr(columns_module, "batches", late)
    sha256_of = columns_module.sha256_of
    monkeypatch.setattr(
        columns_module,
        "sha256_of",
        lambda array: verified.append(1) or sha256_of(array),
    )
    if is_whole:
        assert len(opened(path, cache)) == 20
        assert len(written(cache)) == len(verified) == 4
    else:
        with pytest.raises(UserError, match="the columns written there cannot be read"):
            opened(path, cache)
        assert not list((cache / "columns").iterdir())


def test_a_file_is_converted_before_its_digest_is_known_only_if_it_is_new(
    tmp_path, monkeypatch
):
    order, digest = [], columns_module._digest
    known = threading.Event()

    def late(*given):
        # What waits for it now would wait for as long as it takes.
        known.wait(5)
        order.append("digest")
        return digest(*given)

    def noted(*arguments):
        order.append("rows")
        yield from batches(*arguments)
        known.set()

    monkeypatch.setattr(columns_module, "_digest", late)
    monkeypatch.setattr(columns_module, "batches", noted)
    path = clicks.write(tmp_path / "t.txt", clicks.rows(20))
    first = np.array(opened(path, tmp_path / "cache").codes)
    assert order == ["rows", "digest"]
    assert (opened(path, tmp_path / "cache").codes == first).all()
    assert order == ["rows", "digest", "digest"]
    # Another of as many bytes, and then tables that do not say of how many.
    path.write_bytes(path.read_bytes().replace(b"00000001", b"00000007"))
    for at in range(2):
        del order[:]
        assert (opened(path, tmp_path / "cache").codes == first).all()
        assert order == ["digest", "rows"][: 2 - at]
        for file in tmp_path.glob("cache/columns/*/about.json"):
            about = json.loads(file.read_text())
            about.pop("bytes", None)
            file.write_text(json.dumps(about))


def test_what_ends_a_conversion_ends_the_digest_too(tmp_path, monkeypatch):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(20))
    read, digest = [], columns_module._digest

    class Endless:
        """A file that never ends."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            read.append(size)
            return b"x"

    class Path:
        def open(self, mode):
            return Endless()

    def interrupted(*arguments):
        while not read:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        columns_module, "_digest", lambda path, stopped: digest(Path(), stopped)
    )
    monkeypatch.setattr(columns_module, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(path, tmp_path / "cache")


def test_a_file_that_cannot_be_read_is_not_said_to_be_a_cache(tmp_path, monkeypatch):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(20))
    digest = columns_module._digest
    monkeypatch.setattr(
        columns_module, "_digest", lambda path, stopped: digest(tmp_path, stopped)
    )
    with pytest.raises(UserError, match="cannot be read") as error:
        opened(path, tmp_path / "cache")
    assert "cache_dir" not in str(error.value)


def test_no_row_of_a_block_is_told_as_one_of_the_file(tmp_path):
    path = tmp_path / "t.tsv"
    # What Python takes for a number, and the reader of tables does not.
    path.write_text("a\t1\n" * 9 + "b\t1_000\n")
    with pytest.raises(UserError, match="1_000") as error:
        list(batches(path, TSV, PAIRS, block=16))
    assert "Row #" not in str(error.value)


def test_the_fingerprint_of_an_older_run_has_no_later_fields():
    fields = {"names": (), "numbers": ("a",), "categories": (), "label": "y"}
    old = Schema(**fields, labels="classes")
    number = Number(name="a", log=False, mean=0.0, std=1.0, missing=0.0)
    spec = TableSpec(schema=old, numbers=(number,), categories=(), digest="")
    assert set(spec.to_json()["schema"]) == {*fields, "labels"}
    new = dataclasses.replace(spec, schema=dataclasses.replace(old, version=2))
    assert new.to_json()["schema"]["version"] == 2
