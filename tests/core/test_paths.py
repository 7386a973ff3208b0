"""Paths that users give: home folders, environment variables, and odd names."""

import os
import pathlib

import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import existing, printable, user_path
from finetune_jax.data.sources import arrays, folder, idx, masks
from finetune_jax.weights.formats.word_vectors import read_vectors


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Returns a home folder that holds a file; the working folder is another one."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (home / "a.txt").write_text("here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATA", str(home))
    monkeypatch.setenv("PART", "a")
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.chdir(work)
    return home


@pytest.mark.parametrize(
    "text",
    ["~/a.txt", "$DATA/a.txt", "${DATA}/a.txt", "~/$PART.txt", "$HOME/${PART}.txt",
     "../home/a.txt", "~/../home/a.txt"],
)  # fmt: skip
def test_home_folders_and_variables_are_expanded(text):
    assert user_path(text).read_text() == "here"
    assert user_path(pathlib.PurePosixPath(text)).read_text() == "here"


@pytest.mark.parametrize(
    "text", ["", ".", "a/b", "/a/b c", "x.npz", "5$", "US$5", "caf\udce9/é", "a~b", "$"]
)
def test_all_else_stays_as_given(text):
    assert user_path(text) == pathlib.Path(text)


@pytest.mark.parametrize("name", ["$DATA", "$NOPE.npz", "US$rates", "~notes", "${x"])
def test_a_name_that_exists_is_taken_as_given(name):
    pathlib.Path(name).mkdir()
    assert user_path(name) == pathlib.Path(name)
    if "$" in name:  # Such as a file that is to be written there.
        assert user_path(f"{name}/new.jsonl") == pathlib.Path(f"{name}/new.jsonl")


def test_a_folder_called_tilde_does_not_hide_the_home_folder(home):
    pathlib.Path("~").mkdir()
    assert user_path("~/a.txt") == home / "a.txt"
    assert user_path("./~") == pathlib.Path("./~")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("$NOPE/a", "'NOPE' is not set"),
        ("${NOPE}/a", "'NOPE' is not set"),
        ("~/$NOPE", "'NOPE' is not set"),
        ("$NOPE/${ALSO_NOPE}", "'NOPE' is not set.*'ALSO_NOPE' is not set"),
        ("${HOME:-/tmp}/a", "'HOME:-/tmp' is not set"),
        ("~nobody_of_this_name/a", "the user 'nobody_of_this_name' is unknown"),
    ],
)
def test_what_cannot_be_expanded_is_named(text, problem):
    with pytest.raises(UserError, match=f"^config.data.dir: .*{problem}"):
        user_path(text, "config.data.dir")
    with pytest.raises(UserError, match=problem):
        user_path(text)


@pytest.mark.parametrize("source", [arrays, folder, idx, masks])
def test_every_source_expands_its_folder(source, home):
    with pytest.raises(UserError, match="'NOPE' is not set"):
        source.load("$NOPE/data")
    with pytest.raises(UserError) as error:  # It is found, and holds no such data.
        source.load("${DATA}/a.txt")
    assert "not set" not in str(error.value)


def test_word_vectors_are_found_in_the_home_folder(home):
    (home / "v.txt").write_text("red 1 2\n")
    for place in ("~/v.txt", "$DATA/v.txt"):
        found, width, _ = read_vectors(f"file:{place}", {"red"})
        assert width == 2 and list(found) == ["red"]


def test_a_path_that_must_exist_stays_as_given(home):
    assert existing("$DATA/a.txt", "config.data.dir") == "$DATA/a.txt"
    with pytest.raises(UserError) as failure:
        existing("$DATA/b.txt", "config.data.dir")
    assert str(failure.value) == (
        f"config.data.dir: '$DATA/b.txt', which is {home}/b.txt, does not exist"
    )
    with pytest.raises(UserError, match="'NOPE' is not set"):
        existing("$NOPE/a.txt", "config.data.dir")


def test_what_is_not_utf_8_is_printable():
    name = os.fsdecode(b"caf\xe9/\xc3\xa9 \xe2\x82\xac")
    assert printable(name) == "caf\\udce9/é €"
    assert printable(pathlib.Path("é.png")) == "é.png"
    printable(name).encode("utf-8")
