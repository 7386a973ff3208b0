"""Decision thresholds: chosen by every rule, kept by the run, applied to predictions."""

import json

import mutual
import numpy as np
import pytest
import small
from predictions import predict
from sklearn import metrics as oracle

from finetune_jax import main
from finetune_jax.core.errors import UserError
from finetune_jax.tasks.components.targets import TargetOptions, regression_target
from finetune_jax.tasks.objectives import thresholds
from finetune_jax.tasks.objectives.thresholds import Rule
from finetune_jax.training.setup import make_setup

RULES = ("f1", "precision=0.8", "recall=0.9", "specificity=0.95")


def rows(count=200):
    """Returns scores with ties, and labels that they are better than chance for."""
    rng = np.random.default_rng(0)
    label = (rng.random(count) < 0.3).astype(np.int32)
    score = 1 / (1 + np.exp(-np.round(rng.normal(size=count) + 2 * label - 1, 1)))
    return score, label


def measures(score, label, threshold):
    predicted = score >= threshold
    return {
        "precision": oracle.precision_score(label, predicted, zero_division=0),
        "recall": oracle.recall_score(label, predicted),
        "specificity": oracle.recall_score(1 - label, ~predicted),
        "f1": oracle.f1_score(label, predicted),
    }


@pytest.mark.parametrize("text", RULES)
def test_a_rule_chooses_the_best_of_all_thresholds(text):
    score, label = rows()
    rule = Rule.from_text(text)
    every = [*np.unique(score), 2.0]
    found = [measures(score, label, threshold) for threshold in every]
    if rule.least is None:
        wanted = max(m["f1"] for m in found)
        goal = "f1"
    else:
        goal = "specificity" if rule.measure == "recall" else "recall"
        wanted = max(m[goal] for m in found if m[rule.measure] >= rule.least)
    threshold = rule.choose(score, label)
    chosen = measures(score, label, threshold)
    assert chosen[goal] == wanted and 0.05 < wanted < 1
    assert threshold not in score
    if rule.least is not None:
        assert chosen[rule.measure] >= rule.least


def test_a_precision_that_no_threshold_reaches_gives_the_highest():
    score, label = np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 1, 1, 0])
    threshold = Rule.from_text("precision=0.9").choose(score, label)
    assert measures(score, label, threshold)["precision"] == 2 / 3


def test_no_row_is_positive_if_the_specificity_allows_none():
    score, label = np.array([1.0, 0.8, 0.1]), np.array([0, 1, 0])
    threshold = Rule.from_text("specificity=1").choose(score, label)
    assert not (score >= threshold).any() and np.isfinite(threshold)


def test_scores_that_are_not_finite_choose_no_threshold():
    assert np.isnan(Rule.from_text("f1").choose(np.array([np.nan]), np.array([1])))


def test_metrics_at_a_threshold_are_those_of_scikit_learn():
    score, label = rows()
    for threshold in (0.0, 0.3, float(score[0]), 2.0):
        found = thresholds.metrics_at(threshold, score, label)
        assert tuple(found) == thresholds.METRICS
        assert found.pop("threshold") == threshold
        wanted = measures(score, label, threshold)
        for name, value in found.items():
            assert value == pytest.approx(wanted[name.removesuffix("_at_threshold")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f2", "'f2'"),
        ("specifity=0.9", "did you mean 'specificity'"),
        ("specificity", "above 0 and up to 1 is needed, as in 'specificity=0.95'"),
        ("recall=1.1", "above 0 and up to 1"),
        ("recall=0", "above 0 and up to 1"),
        ("precision=high", "above 0 and up to 1"),
        ("f1=0.9", "'f1' is maximised"),
    ],
)
def test_a_rule_that_is_none_is_refused(text, message):
    with pytest.raises(UserError) as refused:
        Rule.from_text(text)
    assert str(refused.value).startswith("config.task.threshold_rule")
    assert message in str(refused.value)


def write(path, classes=2, validation=(0, 1)):
    """Writes vectors that tell classes apart, the last one rarer than the others."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 60), ("validation", 40), ("test", 40)):
        y = np.where(rng.random(size) < 0.25, classes - 1, np.arange(size) % classes)
        if split == "validation":
            y = np.array(validation)[y % len(validation)]
        arrays[f"x_{split}"] = rng.normal(size=(size, 2)) + y[:, None]
        arrays[f"y_{split}"] = y
    np.savez(path, **arrays)
    return path


def flags(path, rule="specificity=0.9", **others):
    keys = {
        "data.name": "arrays", "data.dir": path, "data.image_size": None,
        "data.validation": "validation", "data.test": "test", "data.batch_size": 20,
        "model.name": "mlp", "model.hidden": (4,), "task.threshold_rule": rule,
        "parallel.devices": 1,
    }  # fmt: skip
    return {**keys, **others}


def config(path, rule="specificity=0.9", **others):
    pairs = {key: str(value) for key, value in flags(path, rule, **others).items()}
    return small.config(overrides=[*pairs.items()])


@pytest.mark.slow
def test_the_threshold_of_a_run_is_used_by_every_mode(tmp_path, capsys, no_pictures):
    path, workdir = write(tmp_path / "a.npz"), tmp_path / "run"
    asked = config(path, **{"evaluate.best": "validation/f1_at_threshold"})
    result = small.run(asked, workdir)
    best, threshold = result["best"], result["threshold"]
    assert best["validation/threshold"] == best["test/threshold"] == threshold
    assert best["validation/specificity_at_threshold"] >= 0.9

    def said(*arguments):
        capsys.readouterr()
        arguments = [f"--workdir={workdir}", "--config.parallel.devices=1", *arguments]
        assert main.run(list(arguments)) == 0
        return capsys.readouterr().out

    note = f"class '1' from a probability of {threshold:.4g}"
    assert note in said("--mode=evaluate")
    found = json.loads((workdir / "evaluation.json").read_text())
    assert {name: found[name] for name in best} == best

    arrays = np.load(path)
    np.save(tmp_path / "x.npy", arrays["x_test"])
    assert note in said("--mode=predict", f"--inputs={tmp_path / 'x.npy'}")
    records = predict(workdir, tmp_path / "x.npy")
    predicted = []
    for record in records:
        share = {entry["class"]: entry["probability"] for entry in record["top"]}
        assert record["threshold"] == threshold
        assert record["class"] == str(int(share["1"] >= threshold))
        predicted.append(int(record["class"]))
    recall = oracle.recall_score(arrays["y_test"], predicted)
    assert best["test/recall_at_threshold"] == pytest.approx(recall)
    assert any(r["class"] != r["top"][0]["class"] for r in records)

    assert note in said("--mode=export", f"--output={tmp_path / 'e'}", "--formats=jax")
    about = json.loads((tmp_path / "e" / "model.json").read_text())
    assert about["threshold"] == threshold
    card = (tmp_path / "e" / "README.md").read_text()
    assert f"1 is predicted from a probability of {threshold:.4g}" in card


@pytest.mark.slow
def test_an_unfinished_run_predicts_without_a_threshold_and_says_so(tmp_path, capsys):
    path, workdir = write(tmp_path / "a.npz"), tmp_path / "run"
    with pytest.raises(small.Preempted):
        small.run(config(path), workdir, small.stop_at_once())
    np.save(tmp_path / "x.npy", np.load(path)["x_test"])
    (record, *_) = predict(workdir, tmp_path / "x.npy")
    assert "threshold" not in record
    assert "the run has not finished, so no threshold was chosen" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "classes", "message"),
    [
        ({}, 3, "'specificity=0.9' needs 2 classes, the data has 3"),
        ({"data.validation": None}, 2, "chooses on config.data.validation, which is"),
        ({"data.validation": "test[:1]"}, 2, "needs examples of both classes"),
    ],
)
def test_data_on_which_no_threshold_can_be_chosen_are_refused(
    given, classes, message, tmp_path
):
    path = write(tmp_path / "a.npz", classes)
    with pytest.raises(UserError, match="config.task.threshold_rule") as refused:
        make_setup(config(path, **given))
    assert message in str(refused.value)


def test_several_data_sets_have_no_threshold():
    one = {"task.threshold_rule": "f1", "model.name": "mlp"}
    task = small.task_of(small.config(overrides=[*one.items()]), small.spec(classes=2))
    label = np.array([0, 1])
    assert not task.check_splits({"validation": label, "test": label})
    (problem,) = task.check_splits({"validation of a": label, "validation of b": label})
    assert "'f1' chooses on one split 'validation', but there are valid" in problem


def test_several_models_have_no_threshold():
    with pytest.raises(
        UserError, match="threshold_rule: 'f1', but the task has several"
    ):
        small.task_of(mutual.config(threshold_rule="f1"), small.spec(classes=2))


def test_numbers_have_no_threshold():
    options = TargetOptions(threshold_rule="f1")
    with pytest.raises(
        UserError, match="threshold_rule: 'f1', but the data's labels are"
    ):
        regression_target(small.spec(), options, ())
