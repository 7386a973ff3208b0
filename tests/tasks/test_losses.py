"""Losses against other people's implementations, and at extreme inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import small
from scipy.special import expit, log_softmax, softmax

from finetune_jax.core.errors import UserError
from finetune_jax.models.modes import Mode
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.task import StepContext

RTOL = 1e-6


def drawn(count=40, classes=6, scale=3.0):
    """Returns logits, hard targets and soft ones, float64."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes), scale=scale)
    hard = np.eye(classes)[rng.integers(0, classes, count)]
    return logits, hard, rng.dirichlet(np.ones(classes), count)


def found(name, one, other, **arguments):
    loss = {**losses.CLASSIFICATION, **losses.REGRESSION}[name]
    with jax.enable_x64(True):
        loss = jax.jit(functools.partial(loss, **arguments))
        return np.asarray(loss(np.asarray(one), np.asarray(other)))


def test_classification_losses_are_those_of_a_numpy_rewrite():
    logits, hard, soft = drawn()
    p, log_p, yes = softmax(logits, 1), log_softmax(logits, 1), expit(logits)
    for target in (hard, soft, 0.9 * hard + 0.1 / 6):
        binary = -target * np.log(yes) - (1 - target) * np.log(1 - yes)
        wanted = {
            "cross_entropy": -(target * log_p).sum(1),
            "binary_cross_entropy": binary.sum(1),
            "focal": -(target * (1 - p) ** 2 * log_p).sum(1),
        }
        for name, values in wanted.items():
            np.testing.assert_allclose(found(name, logits, target), values, RTOL)
        yes_t = yes * target + (1 - yes) * (1 - target)
        alpha = 0.25 * target + 0.75 * (1 - target)
        values = (alpha * binary * (1 - yes_t) ** 2).sum(1)
        np.testing.assert_allclose(found("sigmoid_focal", logits, target), values, RTOL)


def test_focal_has_the_gradient_of_its_definition():
    logits, _, soft = drawn(scale=1.0)

    def naive(z, gamma):
        p = jax.nn.softmax(z)
        return -jnp.sum(soft * (1 - p) ** gamma * jnp.log(p))

    def ours(z, gamma):
        return losses.focal(z, soft, gamma=gamma).sum()

    with jax.enable_x64(True):
        ours, naive = jax.jit(jax.grad(ours)), jax.jit(jax.grad(naive))
        for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
            np.testing.assert_allclose(
                ours(logits, gamma), naive(logits, gamma), rtol=1e-9, atol=1e-12
            )


def test_focal_losses_with_gamma_0_are_cross_entropies():
    logits, _, soft = drawn()
    ours = found("focal", logits, soft, gamma=0.0)
    np.testing.assert_allclose(ours, found("cross_entropy", logits, soft), RTOL)
    ours = found("sigmoid_focal", logits, soft, alpha=-1.0, gamma=0.0)
    np.testing.assert_allclose(ours, found("binary_cross_entropy", logits, soft), RTOL)


@pytest.mark.parametrize("name", ["focal", "sigmoid_focal"])
def test_focal_losses_and_gradients_are_finite_where_p_is_0_or_1(name):
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, -1e4], [0, 0, 0], [88, 0, -88]]
    logits = np.array(rows, np.float32)
    hard = np.eye(3, dtype=np.float32)[np.zeros(5, int)]

    @jax.jit
    @jax.value_and_grad
    def loss(logits, target, gamma):
        return losses.CLASSIFICATION[name](logits, target, gamma=gamma).sum()

    for target in (hard, 0.7 * hard + np.float32(0.1)):
        for gamma in (0.0, 0.5, 1.0, 2.0):
            value, gradient = loss(logits, target, gamma)
            assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_cross_entropies_and_gradients_are_finite_at_extreme_logits(name):
    logits = np.array([[1e4, -1e4], [-1e30, 1e30]], np.float32)
    loss = jax.jit(lambda z: losses.CLASSIFICATION[name](z, np.eye(2)[::-1]).sum())
    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_hard_target_at_extreme_logits_has_the_loss_of_the_margin():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    target = np.array([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(found("focal", logits, target), [0, 2e4], RTOL)


def test_smoothing_spreads_a_share_of_the_target_evenly():
    target = losses.smoothed(losses.one_hot(jnp.array([2]), 4, jnp.float32), 0.2)
    np.testing.assert_allclose(target, [[0.05, 0.05, 0.85, 0.05]], RTOL)


@pytest.mark.slow
def test_classification_losses_are_torchs():
    vision = oracles.import_torchvision()
    torch = pytest.importorskip("torch")
    logits, hard, soft = map(torch.tensor, drawn())
    functional = torch.nn.functional
    label = hard.argmax(1)
    for target in (hard, soft):
        ours = found("cross_entropy", logits, target)
        wanted = functional.cross_entropy(logits, target, reduction="none")
        np.testing.assert_allclose(ours, wanted, RTOL)
        ours = found("binary_cross_entropy", logits, target)
        wanted = functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        )
        np.testing.assert_allclose(ours, wanted.sum(1), RTOL)
        for alpha, gamma in ((0.25, 2.0), (-1.0, 2.0), (0.6, 0.5), (-1.0, 0.0)):
            ours = found("sigmoid_focal", logits, target, alpha=alpha, gamma=gamma)
            wanted = vision.ops.sigmoid_focal_loss(logits, target, alpha, gamma)
            np.testing.assert_allclose(ours, wanted.sum(1), RTOL)
    smooth = functional.cross_entropy(
        logits, label, label_smoothing=0.1, reduction="none"
    )
    with jax.enable_x64(True):
        target = losses.smoothed(jnp.asarray(hard), 0.1)
        ours = losses.cross_entropy(jnp.asarray(logits), target)
    np.testing.assert_allclose(ours, smooth, RTOL)


@pytest.mark.slow
def test_regression_losses_are_torchs():
    torch = pytest.importorskip("torch")
    one, other, _ = map(torch.tensor, drawn())
    functional = torch.nn.functional
    for name, arguments, wanted in (
        ("mse", {}, functional.mse_loss),
        ("mae", {}, functional.l1_loss),
        ("huber", {"delta": 0.7}, functional.huber_loss),
        ("huber", {}, functional.huber_loss),
    ):
        values = wanted(one, other, reduction="none", **arguments).mean(1)
        np.testing.assert_allclose(found(name, one, other, **arguments), values, RTOL)


def total(overrides, counts=(), **extra):
    """Returns loss and weight of a linear head on vectors, and its logits, float64."""
    spec = small.spec((4,), classes=3)
    task = small.task_of(
        small.config(model="mlp", hidden=(), overrides=overrides),
        type(spec)(**{**vars(spec), "train_counts": counts, "dtype": "float32"}),
    )
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(4, 3))
    params = {"head": {"logits": {"kernel": kernel, "bias": np.zeros(3)}}}
    batch = {
        "inputs": rng.normal(size=(12, 4)),
        "label": np.arange(12) % 3,
        "weight": np.ones(12),
        **extra,
    }
    loss = functools.partial(task.loss, context=StepContext(mode=Mode()))
    with jax.enable_x64(True):
        found = jax.jit(loss)(small.variables(params), batch)
    return float(found.total), float(found.weight), batch["inputs"] @ kernel


@pytest.mark.slow
def test_the_loss_with_class_weights_is_torchs():
    torch = pytest.importorskip("torch")
    counts = (50, 10, 3)
    overrides = [("precision", "float64"), ("task.class_weights", "balanced")]
    loss, weight, logits = total(overrides, counts)
    weights = torch.tensor([63 / 3 / count for count in counts], dtype=torch.float64)
    wanted = torch.nn.CrossEntropyLoss(weight=weights)(
        torch.tensor(logits), torch.arange(12) % 3
    )
    assert loss / weight == pytest.approx(float(wanted), rel=RTOL)


def test_a_task_trains_the_loss_that_it_names_with_its_arguments():
    precision = ("precision", "float64")
    hard = np.eye(3)[np.arange(12) % 3]
    for overrides, name, arguments in (
        ([("task.loss", "focal"), ("task.loss_args", "{'gamma': 1.0}")],
         "focal", {"gamma": 1.0}),
        ([("task.loss", "sigmoid_focal"), ("task.loss_args", "{'alpha': -1}")],
         "sigmoid_focal", {"alpha": -1}),
        ([("task.loss", "binary_cross_entropy")], "binary_cross_entropy", {}),
    ):  # fmt: skip
        loss, weight, logits = total([precision, *overrides])
        wanted = found(name, logits, hard, **arguments).sum()
        assert weight == 12 and loss == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "message"),
    [
        ("classification", "focl", {}, "did you mean 'focal'"),
        ("classification", "mse", {},
         "'mse' is a loss of regression; classification has cross_entropy, "),
        ("regression", "focal", {},
         "'focal' is a loss of classification; regression has mse, mae, huber"),
        ("regression", "hubber", {}, "did you mean 'huber'"),
        ("classification", "focal", {"gama": 1.0}, "gama: unknown; did you mean 'gamma'"),
        ("classification", "focal", {"gamma": "a"}, "gamma: 'a'; 2.0 is such a value"),
        ("classification", "focal", {"gamma": -1.0}, "gamma: -1.0; at least 0"),
        ("classification", "sigmoid_focal", {"alpha": 1.5}, "alpha: 1.5; at most 1"),
        ("classification", "cross_entropy", {"gamma": 1.0}, "gamma: unknown"),
        ("classification", "focal", {"logits_BxK": 1.0}, "logits_BxK: unknown"),
        ("classification", "focal", 2.0, "2.0 is not a dict"),
        ("regression", "huber", {"delta": 0}, "delta: 0; more than 0"),
    ],
)  # fmt: skip
def test_losses_and_arguments_that_there_are_not_are_refused(
    kind, name, arguments, message
):
    with pytest.raises(UserError) as refused:
        losses.make_loss(kind, name, arguments)
    assert message in str(refused.value)


def test_a_loss_of_the_wrong_kind_is_refused_by_the_task():
    with pytest.raises(UserError, match="'mae' is a loss of regression"):
        small.task("mlp", overrides=[("task.loss", "mae")])


def test_regression_losses_are_means_over_targets_of_optaxs():
    one, other, _ = drawn()
    wanted = {"mse": (one - other) ** 2, "mae": np.abs(one - other)}
    wanted["huber"] = np.asarray(optax.huber_loss(one, other))
    for name, values in wanted.items():
        np.testing.assert_allclose(found(name, one, other), values.mean(1), RTOL)
