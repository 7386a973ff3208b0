"""Metrics against scikit-learn and loops, and what chooses the best by them."""

import contextlib

import numpy as np
import pytest
import small
from scipy.special import softmax
from sklearn import metrics as oracle

from finetune_jax.core.errors import UserError
from finetune_jax.tasks.objectives import losses, metrics
from finetune_jax.training.setup import make_setup


def rows(count=50, classes=7, scale=3.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes), scale=scale)
    return logits, rng.integers(0, classes, count)


def test_metrics_are_those_of_scikit_learn():
    logits, label = rows()
    predicted = logits.argmax(axis=1)
    probability = softmax(logits, axis=1)
    assert metrics.accuracy(logits, label) == oracle.accuracy_score(label, predicted)
    assert metrics.log_loss(logits, label) == pytest.approx(
        oracle.log_loss(label, probability, labels=range(7)), rel=1e-9
    )
    np.testing.assert_array_equal(
        metrics.confusion_matrix(logits, label),
        oracle.confusion_matrix(label, predicted, labels=range(7)),
    )
    for k in (1, 3, 5, 7):
        with pytest.warns() if k == 7 else contextlib.nullcontext():
            wanted = oracle.top_k_accuracy_score(label, logits, k=k)
        assert metrics.metric(f"top_{k}_accuracy")(logits, label) == wanted
    for measure in ("precision", "recall", "f1"):
        for average in ("macro", "micro", "weighted"):
            wanted = getattr(oracle, f"{measure}_score")(
                label, predicted, average=average, zero_division=0
            )
            assert metrics.metric(f"{measure}_{average}")(logits, label) == wanted
    assert metrics.metric("roc_auc")(logits, label) == pytest.approx(
        oracle.roc_auc_score(label, probability, multi_class="ovr"), rel=1e-12
    )
    assert metrics.metric("average_precision")(logits, label) == pytest.approx(
        oracle.average_precision_score(label, probability), rel=1e-12
    )


def test_metrics_of_two_classes_are_those_of_the_second():
    logits, label = rows(classes=2)
    predicted, probability = logits.argmax(axis=1), softmax(logits, axis=1)[:, 1]
    wanted = {
        "precision_binary": oracle.precision_score(label, predicted),
        "recall_binary": oracle.recall_score(label, predicted),
        "f1_binary": oracle.f1_score(label, predicted),
        "roc_auc": oracle.roc_auc_score(label, probability),
        "average_precision": oracle.average_precision_score(label, probability),
    }
    for name, value in wanted.items():
        assert metrics.metric(name)(logits, label) == pytest.approx(value, rel=1e-12)


def test_what_is_divided_by_zero_is_zero_without_a_warning():
    logits = np.array([[1.0, 0.0], [2.0, 0.0]])
    for label in ([0, 0], [1, 1]):
        for measure in ("precision", "recall", "f1"):
            value = metrics.metric(f"{measure}_binary")(logits, np.array(label))
            assert value == 0.0


@pytest.mark.parametrize("classes", [2, 4])
def test_a_ranking_sees_differences_where_probabilities_round_to_one(classes):
    margins = np.array([50.0, 60.0, 2000.0, 3000.0, 1e4])
    logits = np.zeros((10, classes), np.float32)
    logits[:5, 1], logits[5:, 1] = margins, margins - 5
    label = np.repeat([1, 0], 5)
    wanted = oracle.roc_auc_score(label, logits[:, 1])
    odds = metrics._log_odds(logits)
    assert wanted == oracle.roc_auc_score(label, odds[:, 1]) == 0.6
    np.testing.assert_allclose(odds[:, 1], logits[:, 1] - np.log(classes - 1))


def test_log_odds_are_those_of_the_probabilities():
    logits, _ = rows(scale=2.0)
    p = softmax(logits, axis=1)
    np.testing.assert_allclose(
        metrics._log_odds(logits), np.log(p / (1 - p)), rtol=1e-9
    )


def test_the_calibration_error_is_that_of_a_loop():
    logits, label = rows(count=500, scale=1.5)
    p = softmax(logits, axis=1)
    found = {}
    for row, truth in zip(p, label):
        for index in range(15):
            if index / 15 < row.max() <= (index + 1) / 15:
                found.setdefault(index, []).append((row.max(), row.argmax() == truth))
    assert sum(map(len, found.values())) == 500 and len(found) > 8
    wanted = 0.0
    for members in found.values():
        confidence, right = np.mean(members, axis=0)
        wanted += len(members) / 500 * abs(right - confidence)
    assert metrics.calibration_error(logits, label) == pytest.approx(wanted, rel=1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = np.zeros((2, 5))
    logits[1, 0] = np.log(4 / 3)  # A confidence of 1/4; that of the first is 3/15.
    found = metrics.calibration_error(logits, np.array([1, 0]))
    assert found == pytest.approx((0.2 + 0.75) / 2)


def test_a_certain_and_right_model_is_calibrated_and_a_wrong_one_is_not():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert metrics.calibration_error(logits, np.array([0, 1])) == 0.0
    assert metrics.calibration_error(logits, np.array([1, 0])) == 1.0


@pytest.mark.parametrize("classes", [2, 7])
def test_the_brier_score_is_that_of_scikit_learn(classes):
    logits, label = rows(classes=classes)
    probability = softmax(logits, axis=1)
    given = probability[:, 1] if classes == 2 else probability
    wanted = oracle.brier_score_loss(label, given, labels=range(classes))
    assert metrics.metric("brier")(logits, label) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("percent", [50, 90, 95])
def test_the_sensitivity_is_the_best_of_all_thresholds_with_the_specificity(percent):
    logits, label = rows(count=200, classes=2, scale=1.0)
    logits[:, 1] += label  # Better than chance, and far from perfect.
    score = softmax(logits, axis=1)[:, 1]
    wanted = 0.0
    for threshold in (*score, 2.0):
        predicted = score >= threshold
        # Counts, in which a specificity of exactly 95 % has no rounding.
        if 100 * np.sum(~predicted & (label == 0)) >= percent * np.sum(label == 0):
            wanted = max(wanted, np.mean(predicted[label == 1]))
    name = f"sensitivity_at_specificity_{percent}"
    assert 0.05 < wanted < 0.95
    assert metrics.metric(name)(logits, label) == wanted


def test_a_specificity_of_exactly_the_percentage_is_enough():
    # 9 of 10 negatives are below every positive; 1 - 90 / 100 rounds to less than 0.1.
    odds = np.array([*range(9), 30.0, 25.0, 26.0])
    label = np.array([0] * 10 + [1] * 2)
    logits = np.stack([np.zeros(12), odds], axis=1)
    assert metrics.sensitivity_at_specificity(90, logits, label) == 1.0
    assert metrics.sensitivity_at_specificity(91, logits, label) == 0.0


def test_the_log_loss_is_finite_at_extreme_logits():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert metrics.log_loss(logits, np.array([0, 0])) == pytest.approx(1e4)


def test_regression_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    target = rng.normal(100.0, 5.0, size=(40, 3)).astype(np.float32)
    prediction = target + rng.normal(size=(40, 3)).astype(np.float32)
    one, other = target.astype(np.float64), prediction.astype(np.float64)
    wanted = {
        "mse": oracle.mean_squared_error(one, other),
        "mae": oracle.mean_absolute_error(one, other),
        "r2": oracle.r2_score(one, other),
    }
    for name, value in wanted.items():
        found = metrics.REGRESSION[name](prediction, target)
        assert found == pytest.approx(value, rel=1e-12)
    found = metrics.huber(prediction, target, delta=0.7)
    wanted = losses.huber(prediction, target, delta=0.7)
    assert found == pytest.approx(float(wanted.mean()), rel=1e-4)


def test_predictions_that_are_not_finite_have_no_rank_and_no_r2():
    nothing = np.full((3, 2), np.nan)
    assert np.isnan(metrics.metric("roc_auc")(nothing, np.array([0, 1, 1])))
    assert np.isnan(metrics.r2(nothing, np.ones((3, 2))))


def test_a_metric_knows_which_way_is_better():
    assert metrics.is_better("test/loss", 0.1, None)
    assert not metrics.is_better("test/loss", 0.5, 0.5)
    assert metrics.is_better("test/accuracy", 0.6, 0.5, change=0.05)
    assert not metrics.is_better("test/accuracy", 0.52, 0.5, change=0.05)
    for name in ("mse", "mae", "calibration_error", "brier", "ema_mae", "ema_loss"):
        assert metrics.is_better(f"validation/{name}", 0.1, 0.2)
    for name in (
        "r2",
        "roc_auc",
        "top_5_accuracy",
        "f1_macro",
        "ema_accuracy",
        "sensitivity_at_specificity_95",
    ):
        assert metrics.is_better(f"validation/{name}", 0.2, 0.1)


def classify(names, classes=10, **model):
    task = ("task.metrics", repr(tuple(names)))
    config = small.config(model="mlp", overrides=[task], **model)
    return small.task_of(config, small.spec(classes=classes))


def test_a_task_measures_what_is_named_and_always_the_loss():
    logits, label = rows()
    names = ("f1_macro", "top_2_accuracy")
    found = classify(names, classes=7).metrics({"logits": logits}, {"label": label})
    assert list(found) == [*names, "loss"]
    found = small.task("mlp").metrics({"logits": logits}, {"label": label})
    assert list(found) == ["accuracy", "loss"]


def test_logits_beyond_the_classes_of_the_data_count_in_no_metric():
    logits, label = rows(classes=4)
    more = np.concatenate([logits, np.full((50, 2), 99.0)], axis=1)
    names = ("accuracy", "f1_macro", "roc_auc", "calibration_error", "top_2_accuracy")
    task = classify(names, classes=4)
    wanted = task.metrics({"logits": logits}, {"label": label})
    assert task.metrics({"logits": more}, {"label": label}) == wanted
    predicted = [r["class"] for r in task.records({"logits": more}, {})]
    assert wanted["accuracy"] == np.mean([int(c) for c in predicted] == label)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("accuracc",), "no 'accuracc'; did you mean 'accuracy'"),
        (("top5_accuracy",), "no 'top5_accuracy'; did you mean 'top_5_accuracy'"),
        (("top_0_accuracy",), "no 'top_0_accuracy'"),
        (("mse",), "no 'mse', a metric of regression"),
        (("f1_binary",), "needs 2 classes, the data has 10: use f1_macro"),
        (("sensitivity_at_specificity_95",), "needs 2 classes, the data has 10"),
        (
            ("sensitivity_at_specificity_0",),
            "did you mean 'sensitivity_at_specificity_95'",
        ),
    ],
)
def test_metrics_that_there_are_not_are_refused(names, message):
    with pytest.raises(UserError) as refused:
        classify(names)
    assert message in str(refused.value)


def setup_of(tmp_path, y_test, overrides, classes=3):
    rng = np.random.default_rng(0)
    y = np.arange(30) % classes
    np.savez(
        tmp_path / "a.npz", x_train=rng.normal(size=(30, 2)), y_train=y,
        x_test=rng.normal(size=(len(y_test), 2)), y_test=np.array(y_test),
    )  # fmt: skip
    data = [("data.name", "arrays"), ("data.dir", str(tmp_path / "a.npz"))]
    data += [("data.image_size", "None"), ("data.validation", "test")]
    data += [("data.batch_size", "10")]
    return make_setup(small.config(model="mlp", overrides=data + overrides))


def test_a_split_that_lacks_a_class_cannot_be_ranked(tmp_path):
    ranks = [("task.metrics", "('roc_auc', 'average_precision')")]
    setup_of(tmp_path, [0, 1, 2], ranks)
    with pytest.raises(UserError) as refused:
        setup_of(tmp_path, [0, 1, 1], ranks)
    for name in ("roc_auc", "average_precision"):
        for split in ("validation", "test"):
            message = f"{name!r} needs examples of every class, but the split {split!r}"
            assert message in str(refused.value)
    assert "has none of 2;" in str(refused.value)


def test_the_sensitivity_at_a_specificity_needs_examples_of_both_classes(tmp_path):
    name = "sensitivity_at_specificity_95"
    with pytest.raises(UserError, match=f"'{name}' needs examples of every class"):
        setup_of(tmp_path, [1, 1], [("task.metrics", repr((name,)))], classes=2)


def test_only_what_is_measured_can_choose(tmp_path):
    def chosen(best, *more):
        names = ("task.metrics", "('f1_macro',)")
        best = ("evaluate.best", f"validation/{best}")
        setup_of(tmp_path, [0, 1, 2], [names, best, *more])

    chosen("f1_macro")
    chosen("loss")
    chosen("ema_f1_macro", ("evaluate.ema_decay", "0.9"))
    for name in ("accuracy", "f1_macr", "ema_f1_macro"):
        with pytest.raises(UserError, match="cannot choose.*validation/f1_macro"):
            chosen(name)
    with pytest.raises(UserError, match="'f1_macro' is not a tuple"):
        setup_of(tmp_path, [0, 1, 2], [("task.metrics", "f1_macro")])
