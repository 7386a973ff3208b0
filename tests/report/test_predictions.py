"""Examples, intervals and curves of a page, against libraries and the data itself."""

import clicks
import numpy as np
import pytest
import questions
import table_data
import text_configs
import texts
from sklearn.calibration import calibration_curve

from finetune_jax.data.kind import kind_named
from finetune_jax.report.html import classes, formats
from finetune_jax.training.predictions import (
    RIGHT,
    WRONG,
    Predicted,
    show_answers,
    show_classes,
    show_numbers,
    show_tags,
)
from finetune_jax.training.setup import make_setup


def predicted(setup, folder, outputs):
    dataset = setup.data.held_out["test"]
    return Predicted(setup, outputs(dataset), dataset, folder, "test")


def test_questions_show_their_passage_and_both_answers(tmp_path):
    config = text_configs.config(
        questions.write(tmp_path / "data"), name="jsonl", text=("question", "context"),
        label="answers", labels="answers", header=(), max_tokens=32, buckets=(),
        overrides=[("task.name", "qa")], model={"pool": "none", "vocabulary": 40},
    )  # fmt: skip

    def outputs(dataset):
        start, end = dataset.label.T.copy()
        end[0] = start[0] = 6  # The first word of the passage.
        score = np.linspace(-1, -2, len(start))
        return {"start": start, "end": end, "span": score, "none": score - 9}

    setup = make_setup(config)
    found = show_answers(predicted(setup, tmp_path, outputs))["examples"]
    rows = {row["id"]: row for row in questions.rows(20, seed=2)}
    assert len(found[RIGHT]) == 10 and len(found[WRONG]) <= 1
    for one in (*found[RIGHT], *found[WRONG]):
        row = rows[one.name]
        (_, question), (_, passage) = one.example.texts
        assert question == row["question"] and passage == row["context"]
        assert one.truth == row["answers"]["text"][0]
        assert (one.top[0][0] == one.truth) == one.is_right


def test_tagged_words_show_true_and_predicted_tags(tmp_path):
    texts.write_tagged(tmp_path / "data")
    setup = make_setup(text_configs.tag_config(tmp_path / "data"))

    def outputs(dataset):
        tag = np.maximum(dataset.label, 0)
        tag[3] = 1 - tag[3]  # All tags of one text are wrong.
        return {"tag": tag}

    found = show_tags(predicted(setup, tmp_path, outputs))["examples"]
    (worst,), right = found.values()
    sentences = [text for text, _ in texts.rows(20, seed=2)]
    assert " ".join(worst.example.words) == sentences[3]
    assert all(true != given for true, given in worst.tags)
    assert all(true == given for one in right for true, given in one.tags)
    assert all(" ".join(one.example.words) in sentences for one in right)


def test_texts_of_classes_are_shown_as_they_were_written(tmp_path):
    setup = make_setup(text_configs.config(texts.write(tmp_path / "data")))

    def outputs(dataset):
        return {"logits": 3.0 * np.eye(2)[1 - dataset.label]}

    found = show_classes(predicted(setup, tmp_path, outputs))
    assert not found["examples"][RIGHT] and len(found["examples"][WRONG]) == 10
    written = dict(texts.rows(20, seed=2))
    for one in found["examples"][WRONG]:
        ((_, text),) = one.example.texts
        assert written[text] == one.truth != one.top[0][0]
    assert [chart.title.split(",")[0] for chart in found["charts"]] == [
        "ROC", "Precision and recall", "Calibration",
    ]  # fmt: skip


def test_rows_of_a_table_are_shown_with_the_values_of_their_file(tmp_path):
    rows = clicks.rows(60)
    place = clicks.write(tmp_path / "all.txt", rows)
    columns = [*clicks.NUMBERS, *clicks.CATEGORIES]
    for log in ((), (r"I\d+",)):
        data = table_data.data_of(place, log_columns=log)
        found = kind_named("tables").examples(data, data.train, np.arange(60)) or ()
        for example, index in zip(found, data.train.indices, strict=True):
            shown, (_, *cells) = dict(example.columns), rows[index]
            wanted = {
                name: text or "missing"
                for name, text in zip(columns, cells, strict=True)
            }
            assert shown == wanted


def test_numbers_show_the_largest_errors_first(tmp_path):
    place = texts.write(tmp_path / "data")
    setup = make_setup(text_configs.config(place, labels="numbers"))

    def outputs(dataset):
        return {"prediction": dataset.label + np.arange(len(dataset))[:, None]}

    found = show_numbers(predicted(setup, tmp_path, outputs))
    written = texts.rows(20, seed=2)
    largest, _ = found["examples"].values()
    for one, (text, label) in zip(largest, written[::-1], strict=False):
        assert one.example.texts == (("sentence", text),)
        assert one.truth == label and one.is_right is None
    assert largest[0].top == (("20", None),)
    (chart,) = found["charts"]
    assert (chart.x.title, chart.y.title) == ("true", "predicted")
    assert "20 of 20" in chart.title and (tmp_path / "predicted.png").is_file()


@pytest.mark.parametrize("classes_of", [(3, 40), (50, 50), (1, 5)])
def test_intervals_hold_the_value_and_narrow_with_examples(classes_of):
    count = sum(classes_of)
    share = classes_of[1] / count
    low, high = formats.interval("top_5_accuracy", share, classes_of) or (2, 2)
    wide = formats.wilson(share, 10 * count)
    assert 0 <= low < wide[0] < share < wide[1] < high <= 1
    below, above = formats.interval("roc_auc", share, classes_of) or (2, 2)
    assert 0 <= below < share < above <= 1
    assert formats.interval("loss", share, classes_of) is None
    assert formats.interval("digits/accuracy", share, classes_of) is None
    assert formats.interval("accuracy", share, ()) is None


def test_calibration_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=500)
    label = (rng.uniform(size=500) < probability**2).astype(int)
    *_, chart = classes.two_classes(probability, label, "click")
    found, mean = calibration_curve(label, probability, n_bins=10)
    points = chart.lines[-1].dots.replace("h0", "").strip("M").split("M")
    places = np.array([[int(v) for v in point.split()] for point in points]) / 1000
    np.testing.assert_allclose(places[:, 0], mean, atol=6e-4)
    np.testing.assert_allclose(1 - places[:, 1], found, atol=6e-4)


def test_two_classes_of_which_one_is_absent_have_no_curves():
    assert not classes.two_classes(np.full(4, 0.5), np.ones(4, int), "yes")
    assert not classes.two_classes(np.full(2, np.nan), np.array([0, 1]), "yes")
