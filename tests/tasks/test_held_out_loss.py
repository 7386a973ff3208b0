"""The loss of held-out splits is the loss that is trained."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax.plans.phase import Phase
from finetune_jax.sweeps.populations.population import choice_warning, member_configs
from finetune_jax.tasks.components.targets import ClassTarget, measured_names
from finetune_jax.tasks.segmentation import IGNORED, PixelTarget
from finetune_jax.training.run import run

PLAIN = ClassTarget(
    names=("a", "b", "c"), loss_name="cross_entropy", loss_args={}, label_smoothing=0.0,
    class_weights=(), top_k=1, metric_names=("accuracy",),
)  # fmt: skip
CHANGES = {
    "focal": {"loss_name": "focal", "loss_args": {"gamma": 2.0}},
    "smoothing": {"label_smoothing": 0.3},
    "weights": {"class_weights": (0.5, 2.0, 3.0)},
}
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(30, 3)).astype(np.float32)
LABEL = np.arange(30, dtype=np.int32) % 3 * (np.arange(30) > 5)


def wanted(change):
    """Returns the loss in numpy, and the cross entropy."""
    log_p = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    target = np.eye(3)[LABEL]
    each = -log_p[np.arange(30), LABEL]
    if change == "focal":
        found = (1 - np.exp(-each)) ** 2 * each
        return found.mean(), each.mean()
    if change == "smoothing":
        return -((0.7 * target + 0.1) * log_p).sum(1).mean(), each.mean()
    weights = np.array(CHANGES["weights"]["class_weights"])[LABEL]
    return np.average(each, weights=weights), each.mean()


@pytest.mark.parametrize("change", CHANGES)
def test_the_loss_of_a_split_is_the_one_that_is_trained(change):
    target = dataclasses.replace(PLAIN, **CHANGES[change])
    found = target.metrics({"logits": LOGITS}, {"label": LABEL})
    loss, cross_entropy = wanted(change)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-6)
    assert list(found) == ["accuracy", "loss", "cross_entropy"]


def test_plain_cross_entropy_is_measured_once():
    found = PLAIN.metrics({"logits": LOGITS}, {"label": LABEL})
    assert list(found) == ["accuracy", "loss"]
    assert found["loss"] == pytest.approx(wanted("focal")[1], rel=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_the_loss_of_masks_is_the_one_that_is_trained(change):
    target = PixelTarget(names=PLAIN.names, loss_name="cross_entropy", loss_args={})
    target = dataclasses.replace(target, **CHANGES[change])
    logits = LOGITS.reshape(2, 3, 5, 3)
    mask = LABEL.reshape(2, 3, 5).astype(np.uint8)
    # Ignored pixels are in no mean.
    logits = np.concatenate([logits, np.ones((2, 1, 5, 3), np.float32)], axis=1)
    mask = np.concatenate([mask, np.full((2, 1, 5), IGNORED, np.uint8)], axis=1)
    outputs = target.outputs(jnp.asarray(logits), {"mask": jnp.asarray(mask)})
    found = target.metrics({name: np.asarray(x) for name, x in outputs.items()}, {})
    loss, cross_entropy = wanted(change)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)


def test_the_names_are_known_before_the_data_is_read():
    names = ("accuracy",)
    assert measured_names(names, {"loss": None}) == ("accuracy", "loss")
    assert measured_names(names, {"loss": "huber"}) == ("accuracy", "loss")
    several = {"of_args": {"label_smoothing": 0.1}}
    assert measured_names(names, several) == ("accuracy", "loss", "cross_entropy")


def config(*overrides, steps=3):
    plan = (Phase(name="all", steps=steps, optimizer="sgd", peak_lr=0.1),)
    return small.config(model="mlp", plan=plan, hidden=(4,), overrides=overrides)


@pytest.mark.slow
def test_the_cross_entropy_may_choose_the_best_checkpoint(tmp_path):
    result = run(
        config(
            ("evaluate.best", "validation/cross_entropy"),
            ("evaluate.every_steps", "1"),
            ("task.loss", "focal"),
        ),
        tmp_path,
    )
    name = "validation/cross_entropy"
    found = {x["step"]: x[name] for x in small.lines(tmp_path) if name in x}
    assert result["best_step"] == min(found, key=found.__getitem__) == 3
    assert result["validation/loss"] < result[name]


def test_a_choice_by_losses_with_different_smoothing_is_warned_of():
    members = tuple((("task.label_smoothing", x),) for x in (0.0, 0.1))
    found = config(("evaluate.best", "validation/loss"), ("population", repr(members)))
    assert "choose 'validation/cross_entropy'" in choice_warning(member_configs(found))
    assert choice_warning(member_configs(found)[:1]) is None
