"""The labels of every source are read by one rule."""

import csv
import dataclasses
import io
import json
import re
import unicodedata

import meaning
import numpy as np
import pytest
import texts
from PIL import Image

from finetune_jax.core.errors import UserError
from finetune_jax.data.labels import class_name, classes_of, in_order, near_twins
from finetune_jax.data.loading import load_source
from finetune_jax.data.source import array_source, check_classes, check_labelled
from finetune_jax.data.tables.schema import TableOptions
from finetune_jax.data.tables.source import format_of, load_table
from finetune_jax.data.text.files import load_texts
from finetune_jax.data.text.tokens import TextOptions
from finetune_jax.evaluation.other_domains import _places

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
SENTENCES = [text for text, _ in texts.rows(12)]
COUNT = len(SENTENCES)


def folder(labels, path):
    """Writes an image for each label, in a folder of that name."""
    for number, label in enumerate(labels):
        place = path / "photos" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 4, 3), number, np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
    source = load_source("folder", str(path / "photos"))
    part = source.splits["all"]
    order = [int(file.stem) for file in part.paths]
    return source, part.label[np.argsort(order)]


def arrays(labels, path):
    np.savez(path / "a.npz", x=np.ones((COUNT, 3)), y=np.array(labels))
    source = load_source("arrays", str(path / "a.npz"))
    return source, source.splits["all"].label


def cells(labels, names=("sentence", "label")):
    """Returns the text of a CSV file."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows(zip(SENTENCES, labels))
    return file.getvalue()


def text(labels, path, **options):
    (path / "a.csv").write_text(cells(labels), encoding="utf-8")
    return as_text("csv", path / "a.csv", **options)


def as_text(kind, file, **options):
    given = TextOptions(text=("sentence",), max_tokens=16, **options)
    source, _ = load_texts(kind, str(file), given, texts.tokenizer())
    return source, source.splits["all"].label


def json_lines(values, path, **options):
    rows = [{"sentence": s, "label": y} for s, y in zip(SENTENCES, values)]
    text = "\n".join(json.dumps(row) for row in rows)
    (path / "a.jsonl").write_text(text + "\n")
    return as_text("jsonl", path / "a.jsonl", **options)


def tags(labels, path):
    """Writes each label as the tag of a text's first word; 'O' is its other tag."""
    rows = [
        {"sentence": ["film", "is"], "label": [str(label), str(labels[0])]}
        for label in labels
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (path / "a.jsonl").write_text(text + "\n")
    source, label = as_text("jsonl", path / "a.jsonl", labels="tags")
    return source, label[:, 1]


def table(labels, path):
    (path / "t.csv").write_text(cells(labels, ("words", "label")), encoding="utf-8")
    found = load_table(
        "csv",
        str(path / "t.csv"),
        format_of("csv"),
        TableOptions(),
        str(path / "cache"),
    )
    return found.source, found.source.splits["all"].label


SOURCES = {f.__name__: f for f in (folder, arrays, text, json_lines, tags, table)}


def turns(*labels):
    """Returns the labels in turn, as many as there are examples."""
    return (list(labels) * COUNT)[:COUNT]


def lists(labels):
    return lambda folder: (labels, folder)


YES = turns("no", "yes")
SPELT = [
    meaning.Odd(name=name, make=lists(turns("no", "yes", "no", other)), same=True,
                warns=r"images|rows|words|examples.*read as 'yes'")
    for name, other in (
        ("a blank behind", "yes "), ("a no-break space", "\u00a0yes"),
        ("a zero-width space", "yes\u200b"), ("a byte order mark", "\ufeffyes"),
        ("a tab and a zero-width joiner", "yes\t\u200d"), ("an em space", "yes\u2003"),
    )
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@meaning.by_name(SPELT)
def test_invisible_differences_make_no_class(odd, source, tmp_path):
    if source == "table" and "zero-width" not in odd.name and "mark" not in odd.name:
        odd = dataclasses.replace(odd, warns=None)  # Blanks around cells never count.
    check(odd, source, YES, ("no", "yes"), tmp_path)


def check(odd, source, clean, names, tmp_path):
    def read(given):
        found, label = SOURCES[source](*given)
        return [np.array(found.class_names), label], found.warnings

    places = {str(label): index for index, label in enumerate(names)}
    wanted = [np.array(names), np.array([places[str(label)] for label in clean])]
    meaning.check(odd, read, wanted, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("labels", "names", "warns"),
    [
        (turns("bar", NFC, "bar", NFD), ("bar", NFC), "read as 'caf"),
        (turns("0", "1", "0", "1.0"), ("0", "1"), "of '1.0' are read as '1'"),
        (turns("0", "1.", "0", "1.000"), ("0", "1"), "of '1.' are read as '1'"),
        (turns("10", "9", "-2", "-1"), ("-2", "-1", "9", "10"), None),
        (turns("0.5", "10", "1.5", "2"), ("0.5", "1.5", "2", "10"), None),
        (
            turns("yes", "no", "Yes"),
            ("Yes", "no", "yes"),
            "'Yes' .* and 'yes' .*differ",
        ),
        (
            turns("New York", "new_york", "b"),
            ("New York", "b", "new_york"),
            "different",
        ),
        (turns("007", "7", "8"), ("007", "7", "8"), "'007' .* and '7' .* different"),
        (turns("e-mail", "email", "post"), ("e-mail", "email", "post"), "different"),
        (turns("C", "C++", "C#"), ("C", "C#", "C++"), None),
        (turns("+1", "-1"), ("-1", "+1"), None),
    ],
)
def test_names_order_and_near_twins(source, labels, names, warns, tmp_path):
    found, label = SOURCES[source](labels, tmp_path)
    assert found.class_names == names
    named = [names[index] for index in label]
    assert named == [class_name(text) for text in labels]
    told = "\n".join(found.warnings)
    if warns is None:
        assert not told
    else:
        assert re.search(warns, told), told


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("labels", [turns("1"), turns("a", "a "), turns("1", "1.0")])
def test_a_single_class_is_refused(source, labels, tmp_path):
    with pytest.raises(UserError, match="one class, '[1a]'; at least two"):
        SOURCES[source](labels, tmp_path)


@pytest.mark.parametrize("source", ["arrays", "text", "json_lines", "tags", "table"])
@pytest.mark.parametrize("label", ["", " ", "\u00a0", "\u200b", "nan", " NaN"])
def test_missing_labels_are_refused(source, label, tmp_path):
    with pytest.raises(UserError, match="empty|blank|missing"):
        SOURCES[source](["yes", *turns("no", "yes")[:-2], label], tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "warns"),
    [
        (turns(0, 1, 0, 1.0), ("0", "1"), "3 rows of '1.0' are read as '1'"),
        (turns(0, "1", 0, 1), ("0", "1"), None),
        (turns(True, False), ("False", "True"), None),
        (turns(True, False, "true"), ("False", "True", "true"), "different classes"),
        (turns(True, 1, 0), ("0", "1", "True"), None),
        (turns(2.5, 10, 1), ("1", "2.5", "10"), None),
    ],
)
def test_json_values_become_names(labels, names, warns, tmp_path):
    found, label = json_lines(labels, tmp_path)
    assert found.class_names == names
    assert [names[i] for i in label] == [class_name(str(value)) for value in labels]
    assert bool(found.warnings) == bool(warns)
    assert not warns or warns in found.warnings[0]


@pytest.mark.parametrize("label", [float("nan"), None, [1], {"a": 1}])
def test_json_values_that_are_no_label_are_refused_by_line(label, tmp_path):
    labels = turns(0, 1)
    labels[3] = label
    with pytest.raises(UserError, match="line 4: 'label' is"):
        json_lines(labels, tmp_path)


def test_numbers_to_predict_are_not_touched(tmp_path):
    found, label = json_lines(turns(1.0, 2.0), tmp_path, labels="numbers")
    assert found.class_names == () and not found.warnings
    assert label[:2].tolist() == [[1.0], [2.0]]


def source_of(labels, class_names=None, inputs=None):
    x = np.ones((len(labels), 3)) if inputs is None else inputs
    return array_source("a", {"all": (x, np.asarray(labels))}, class_names)


def test_class_names_that_are_given_are_the_order():
    found = source_of(["cat", "dog ", "cat"], ["dog", "cat"])
    assert found.class_names == ("dog", "cat")
    assert found.splits["all"].label.tolist() == [1, 0, 1]
    found = source_of([0, 1, 1], ["dog", " cat"])
    assert found.class_names == ("dog", "cat")
    assert found.splits["all"].label.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["cat", "dgo"], ["dog", "cat"], "'dgo'; did you mean 'dog'"),
        (["cat", "dog"], ["dog", "cat", "cat "], "'cat' twice"),
        (["cat", "dog"], ["dog", "cat", " "], "blank"),
        (
            [1, 2],
            ["dog", "cat"],
            "labels 2, but there are 2 classes, numbered from 0 to 1",
        ),
        ([0, 0], ["dog"], "one class, 'dog'"),
        ([-1, 1], ["dog", "cat"], "labels -1, but"),
        (np.array([b"caf\xe9", b"a"]), None, "not UTF-8"),
        (np.array([True, False]), None, "labels are bool.*astype"),
        (np.eye(3, dtype=int), None, r"y.argmax\(axis=1\)"),
        (np.eye(3, dtype=bool), None, r"y.argmax\(axis=1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, names, message):
    with pytest.raises(UserError, match=message):
        source_of(labels, names)


def test_a_column_of_labels_is_one_label_each():
    for labels in (np.array([[0], [1], [1]]), np.array([["a"], ["b"], ["b"]])):
        found = source_of(labels)
        assert found.splits["all"].label.tolist() == [0, 1, 1] and not found.warnings


def test_class_names_of_bytes_are_text(tmp_path):
    names = np.array([b"cat", "h\u00f6rse".encode()])
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((4, 2)), y=np.arange(4) % 2, class_names=names)
    assert load_source("arrays", str(path)).class_names == ("cat", "h\u00f6rse")


@pytest.mark.parametrize(
    ("labels", "warns"),
    [
        (np.eye(3)[np.arange(12) % 3], "argmax"),
        (np.arange(12.0) % 3, "3 different values, all whole.*astype"),
        (np.arange(12.0)[:, None] % 2, "2 different values"),
        (np.linspace(0, 1, 12), None),
        (np.arange(12.0), None),
        (np.eye(3)[np.arange(12) % 3] * 0.5, None),
    ],
)
def test_floats_that_look_like_classes_are_told(labels, warns):
    found = source_of(labels)
    assert found.targets and len(found.warnings) == bool(warns)
    if warns:
        assert re.search(warns, found.warnings[0])


def test_masks_have_near_twins_too(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for n in range(2):
            image = Image.fromarray(np.zeros((4, 4), np.uint8))
            image.save(tmp_path / kind / f"{n}.png")
    (tmp_path / "classes.csv").write_text("road\nRoad\u200b\nsky\n", encoding="utf-8")
    found = load_source("masks", str(tmp_path))
    assert found.pixel_classes == ("road", "Road", "sky")
    assert "'road' and 'Road' are different classes" in found.warnings[0]
    (tmp_path / "classes.csv").write_text("road\nroad\u200b\nsky\n", encoding="utf-8")
    with pytest.raises(UserError, match="'road' twice"):
        load_source("masks", str(tmp_path))


def test_two_folders_of_one_name_are_one_class(tmp_path):
    one, _ = folder(turns("cat", "cat ", "dog"), tmp_path / "1")
    assert one.class_names == ("cat", "dog")
    assert "4 images of 'cat ' are read as 'cat'" in one.warnings[0]


def test_examples_without_a_class_are_refused_where_they_are_used():
    source = dataclasses.replace(source_of([0, 1]), name="t")
    label = np.array([0, 1, -1, -1])
    chosen = {"train": np.array([0, 1]), "test": np.array([1, 2, 3])}
    with pytest.raises(UserError, match="config.data.test: 2 of 3 examples have no"):
        check_labelled(source, label, chosen, training=True)
    check_labelled(source, label, {"train": np.array([0, 2])}, training=False)


COLOURS = ("red", "green", "blue")


@pytest.mark.parametrize(
    ("theirs", "places", "told"),
    [
        (("red", "green"), [0, 1], ""),
        (("Green", "red"), [1, 0], "numbered as the run's"),
        (("blue",), [2], "numbered as the run's"),
        (("RED", "green", "blue "), [0, 1, 2], ""),
        (("0", "1"), [0, 1], "'0' is 'red', '1' is 'green'"),
        (("0.0", "1.0", "2.0"), [0, 1, 2], "'2.0' is 'blue'"),
    ],
)
def test_a_domains_classes_are_the_runs_by_name(theirs, places, told):
    found, names, lines = _places(theirs, COLOURS, "w.")
    assert found.tolist() == places and told in "".join(lines)
    assert bool(lines) == bool(told)
    assert names == (theirs if places == list(range(len(theirs))) else COLOURS)


@pytest.mark.parametrize("head", ["current", "start"])
def test_names_for_a_run_of_numbers_are_told(head):
    _, names, lines = _places(("cat", "dog"), ("0", "1", "2"), "w.", head)
    assert names == ("cat", "dog") and "'cat' is '0', 'dog' is '1'" in lines[0]


@pytest.mark.parametrize(
    ("theirs", "absent"),
    [
        (("cat", "dog"), "cat, dog"),
        (("red", "apple"), "apple"),
        (("green", "apple"), "apple"),
        (("1", "2"), "1, 2"),
        (("0", "red"), "0"),
        (("red", "green", "blue", "3"), "3"),
        (("0", "1", "2", "3"), "0, 1, 2, 3"),
    ],
)
def test_a_domains_other_classes_are_refused(theirs, absent):
    with pytest.raises(UserError) as found:
        _places(theirs, COLOURS, "w.")
    text = str(found.value)
    assert text.startswith(f"w.name: {absent}: not among") and "'pretrained'" in text


def test_the_head_before_training_may_have_other_classes():
    for theirs in (("cat", "dog"), ("red", "apple"), ("0", "1", "2", "3")):
        found, names, lines = _places(theirs, COLOURS, "w.", "start")
        assert found.tolist() == list(range(len(theirs))) and names == theirs
        assert f"{theirs[1]!r} is 'green'" in lines[0]
    assert "'3' is logit 3" in lines[0]
    with pytest.raises(UserError, match="w.name: apple: not among"):
        _places(("green", "apple"), COLOURS, "w.", "start")
    assert _places(("cat", "dog"), (), "w.")[2] == ()


def test_many_twins_are_told_in_few_lines():
    names = [f"{case}{n}" for n in range(30) for case in ("a", "A")]
    assert len(near_twins(names)) == 11
    assert in_order({"1", "01", "1.5", "0"}) == ["0", "01", "1", "1.5"]
    found = classes_of({"-": 1, "_": 2}, "here")
    assert found.names == ("-", "_") and not found.warnings
    assert class_name("-0.0") == "0" and class_name("+1.0") == "+1"
    assert len(near_twins(["-0", "0"])) == len(near_twins(["1e3", "1000"])) == 1


def test_classes_absent_from_training_are_told_with_their_twins():
    source = source_of(["Cat", "Dog", "cat", "dog"])
    label = source.splits["all"].label
    with pytest.raises(UserError, match="(?s)cat, dog.*'Cat' and 'cat' are different"):
        check_classes(source, label, np.array([0, 1]))
