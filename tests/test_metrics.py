import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as oracle

from finetune_jax import losses, metrics


def rows(count=50, classes=7, scale=3.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes), scale=scale)
    return logits, rng.integers(0, classes, count)


def test_metrics_are_those_of_scikit_learn():
    logits, label = rows()
    predicted = logits.argmax(axis=1)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics.accuracy(logits, label) == oracle.accuracy_score(label, predicted)
    assert metrics.log_loss(logits, label) == pytest.approx(
        oracle.log_loss(label, probability, labels=range(7)), rel=1e-9
    )
    np.testing.assert_array_equal(
        metrics.confusion_matrix(logits, label),
        oracle.confusion_matrix(label, predicted, labels=range(7)),
    )


def test_the_log_loss_is_finite_at_extreme_logits():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert metrics.log_loss(logits, np.array([0, 0])) == pytest.approx(1e4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_a_numpy_rewrite(smoothing):
    logits, label = rows()
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.eye(7)[label] * (1 - smoothing) + smoothing / 7
    with jax.enable_x64(True):
        found = losses.cross_entropy(
            jnp.asarray(logits), jnp.asarray(label), label_smoothing=smoothing
        )
        np.testing.assert_allclose(found, -(target * logs).sum(axis=1), rtol=1e-6)


def test_cross_entropy_and_its_gradient_are_finite_at_extreme_logits():
    logits = jnp.array([[1e4, -1e4], [-1e30, 1e30]])
    label = jnp.array([1, 0])
    value, gradient = jax.value_and_grad(
        lambda z: losses.cross_entropy(z, label).sum()
    )(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_metric_knows_which_way_is_better():
    assert metrics.is_better("test/loss", 0.1, None)
    assert not metrics.is_better("test/loss", 0.5, 0.5)
    assert metrics.is_better("test/accuracy", 0.6, 0.5, change=0.05)
    assert not metrics.is_better("test/accuracy", 0.52, 0.5, change=0.05)
