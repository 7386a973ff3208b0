"""Scores of single examples: their means are the metrics, their ids stay."""

import dataclasses

import numpy as np
import pytest
import questions
import scores
import small
import text_configs

from finetune_jax import config as configs
from finetune_jax.data.dataset import unlabelled
from finetune_jax.evaluation import per_example
from finetune_jax.tasks.components.regression import RegressionTarget
from finetune_jax.tasks.components.targets import ClassTarget
from finetune_jax.tasks.mutual import MutualTarget
from finetune_jax.tasks.objectives import metrics
from finetune_jax.tasks.segmentation import PixelTarget
from finetune_jax.tasks.tokens import TagTarget
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup


def classes(*, metric_names, weights=(), loss="cross_entropy", threshold=None, count=3):
    return ClassTarget(
        names=tuple("abc"[:count]), loss_name=loss, loss_args={}, label_smoothing=0.0,
        class_weights=weights, top_k=2, metric_names=metric_names,
        threshold_rule=threshold and "f1", threshold=threshold,
    )  # fmt: skip


def agree(target, outputs, batch):
    """Checks that the mean of the scores of each metric is the metric."""
    found = target.example_scores(outputs, batch)
    measured = target.metrics(outputs, batch)
    for name, values in found.scores.items():
        assert values.mean() == pytest.approx(measured[name], rel=1e-6), name
    return found


def logits_and_labels(count=3, examples=40):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(examples, count + 1)).astype(np.float32)
    return {"logits": logits}, {"label": rng.integers(count, size=examples)}


def test_scores_of_classes_are_those_of_the_metrics_that_are_means():
    names = ("accuracy", "brier", "top_2_accuracy", "f1_macro", "calibration_error")
    outputs, batch = logits_and_labels()
    found = agree(classes(metric_names=names), outputs, batch)
    assert set(found.scores) == {"accuracy", "brier", "top_2_accuracy", "loss"}
    chosen = outputs["logits"][:, :3].argmax(axis=1)
    np.testing.assert_array_equal(found.predicted, chosen)
    np.testing.assert_array_equal(found.scores["accuracy"], chosen == batch["label"])


@pytest.mark.parametrize(
    "loss,weights", [("focal", ()), ("cross_entropy", (1.0, 2.0, 5.0))]
)
def test_scores_of_a_weighted_loss_have_its_mean(loss, weights):
    target = classes(metric_names=("accuracy",), loss=loss, weights=weights)
    found = agree(target, *logits_and_labels())
    assert set(found.scores) == {"accuracy", "loss", "cross_entropy"}


def test_predicted_classes_obey_a_threshold():
    outputs, batch = logits_and_labels(count=2)
    outputs["logits"] = outputs["logits"][:, :2]
    found = agree(
        classes(metric_names=("accuracy",), threshold=0.9, count=2), outputs, batch
    )
    probability = metrics.probabilities(outputs["logits"])[:, 1]
    np.testing.assert_array_equal(found.predicted, probability >= 0.9)


@pytest.mark.parametrize("loss", ("mse", "mae", "huber"))
def test_scores_of_numbers_are_means_over_the_numbers_of_an_example(loss):
    rng = np.random.default_rng(0)
    target = RegressionTarget(
        names=("x", "y"),
        loss_name=loss,
        loss_args={},
        metric_names=("mse", "mae", "r2"),
    )
    given = (
        {"prediction": rng.normal(size=(30, 2))},
        {"label": rng.normal(size=(30, 2))},
    )
    found = agree(target, *given)
    assert set(found.scores) == {"mse", "mae", "loss"} and found.predicted is None


def test_scores_of_tags_are_scaled_to_means_over_words():
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 3, size=(20, 7))
    target = TagTarget(names=("O", "B-A", "I-A"), tokens=7)
    outputs = {"tag": rng.integers(3, size=(20, 7)), "loss": rng.random(20)}
    found = agree(target, outputs, {"label": label})
    assert set(found.scores) == {"accuracy", "loss"}


@pytest.mark.parametrize("weights", ((), (1.0, 3.0, 0.5)))
def test_scores_of_masks_are_scaled_to_means_over_pixels(weights):
    rng = np.random.default_rng(0)
    right = rng.integers(5, size=(20, 1, 3))
    counts = right + rng.integers(5, size=(20, 3, 3)) * np.array([0, 1, 1])[:, None]
    outputs = {"counts": counts.astype(np.int32), "loss": rng.random(20)}
    outputs |= {"cross_entropy": rng.random(20), "loss_weight": 1 + rng.random(20)}
    target = PixelTarget(
        names=tuple("abc"), loss_name="focal", loss_args={}, class_weights=weights
    )
    found = agree(target, outputs, {})
    assert set(found.scores) == {"pixel_accuracy", "loss", "cross_entropy"}


def test_scores_of_several_models_are_those_of_each_and_of_all():
    (outputs, batch), rng = logits_and_labels(), np.random.default_rng(1)
    outputs |= {f"{one}/logits": rng.normal(size=(40, 3)) for one in ("small", "large")}
    target = MutualTarget(
        target=classes(metric_names=("accuracy",)), weight=1.0, temperature=1.0
    )
    found = agree(target, outputs, batch)
    of_each = {
        f"{one}/{name}" for one in ("small", "large") for name in ("accuracy", "loss")
    }
    assert set(found.scores) == {"accuracy", "loss", *of_each}


def test_scores_of_questions_are_those_of_all_their_windows(tmp_path):
    config = text_configs.config(
        questions.write(tmp_path / "data", longest=40), name="jsonl",
        text=("question", "context"), label="answers", labels="answers", header=(),
        max_tokens=20, overlap=4, buckets=(), overrides=[("task.name", "qa")],
        model={"pool": "none", "vocabulary": 40},
    )  # fmt: skip
    setup = make_setup(config)
    dataset, rng = setup.data.held_out["test"], np.random.default_rng(0)
    start, end = dataset.label.T
    outputs = {
        "start": start, "end": np.maximum(end - rng.integers(2, size=len(end)), start),
        "span": -rng.random(len(start)), "none": -9 - rng.random(len(start)),
        "loss": rng.random(len(start)),
    }  # fmt: skip
    found = agree(setup.task.target, outputs, dataset.on_host())
    assert len(dataset) > len(found.first) == 20
    ids = per_example.example_ids(dataset, found.first)
    assert len(np.unique(ids)) == 20


def test_ids_do_not_depend_on_other_examples():
    values, label = np.zeros((6, 2), np.float32), np.array([0, 1, 0, 1, 1, 0], np.int32)
    whole = unlabelled(values, small.spec(), label=label)
    ids = per_example.example_ids(whole)
    assert len(np.unique(ids)) == 6
    some = whole.selected(np.array([4, 1]))
    np.testing.assert_array_equal(per_example.example_ids(some), ids[[4, 1]])
    # Another label is another example, and examples of one name are counted.
    other = dataclasses.replace(whole, label=1 - label)
    assert not set(per_example.example_ids(other)) & set(ids)
    twice = per_example.example_ids(whole.selected(np.array([4, 4])))
    assert twice[0] == ids[4] and twice[1] not in ids


def config(*overrides):
    given = configs.load("configs/iris_mlp.py:tiny")
    found, problems = configs.resolve(given, [("parallel.devices", "1"), *overrides])
    assert not problems
    return found


@pytest.mark.usefixtures("no_pictures")
def test_a_run_records_its_best_state(tmp_path):
    best = ("evaluate.best", "validation/accuracy")
    result = run(config(best), tmp_path / "run")
    arrays = per_example.read(tmp_path / "run")
    found = scores.check_run(tmp_path / "run", result["best"])
    assert {"test/accuracy", "test/loss"} <= found
    assert arrays["test/id"].dtype == np.uint64
    assert arrays["test/accuracy"].dtype == arrays["test/predicted"].dtype == np.uint8


@pytest.mark.slow
def test_averaged_weights_and_validation_alone_are_recorded(tmp_path):
    given = config(("evaluate.ema_decay", "0.5"), ("data.test", "None"))
    result = run(given, tmp_path / "run")
    found = scores.check_run(tmp_path / "run", result["best"])
    assert {"validation/accuracy", "validation/ema_accuracy"} <= found
    assert all(name.startswith("validation/") for name in found)


def test_a_damaged_file_counts_as_none(tmp_path):
    assert per_example.read(tmp_path) is None
    per_example.write(tmp_path, {})
    assert not list(tmp_path.iterdir())
    per_example.write(tmp_path, {"test/accuracy": np.ones(3)})
    whole = (tmp_path / per_example.FILE).read_bytes()
    (tmp_path / per_example.FILE).write_bytes(whole[:-10])
    assert per_example.read(tmp_path) is None
