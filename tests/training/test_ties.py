"""Ties of the metric that chooses the best state."""

import math

import pytest
import small

from finetune_jax.plans.phase import Phase
from finetune_jax.sweeps.populations.population import _Population
from finetune_jax.tasks.objectives.metrics import loss_beside, replaces
from finetune_jax.training import plateau
from finetune_jax.training.progress import Progress
from finetune_jax.training.run import run

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "best", "loss", "best_loss", "wanted"),
    [
        (0.6, 0.5, 9.0, 0.1, True),  # The metric decides.
        (0.4, 0.5, 0.1, 9.0, False),
        (0.5, 0.5, 0.1, 0.2, True),  # The loss decides a tie.
        (0.5, 0.5, 0.3, 0.2, False),
        (0.5, 0.5, 0.2, 0.2, True),  # The later step decides a tie of both.
        (0.5, 0.5, NAN, 0.2, False),
        (0.5, 0.5, 0.2, NAN, True),
        (0.5, 0.5, None, None, True),  # A checkpoint of an older version has no loss.
        (0.5, 0.5, 0.7, None, True),
        (0.5, None, 0.7, None, True),
        (NAN, None, 0.7, None, False),
        (NAN, 0.5, 0.1, 0.2, False),
        (math.inf, math.inf, 0.1, 0.2, True),
    ],
)
def test_the_loss_and_then_the_later_step_decide_ties(
    value, best, loss, best_loss, wanted
):
    assert replaces("validation/accuracy", value, best, loss, best_loss) is wanted


@pytest.mark.parametrize("metric", ["loss", "mae", "mse"])
def test_ties_of_metrics_that_shall_be_low_are_decided_alike(metric):
    assert replaces(f"validation/{metric}", 0.4, 0.5, 9.0, 0.1)
    assert replaces(f"validation/{metric}", 0.5, 0.5, 0.1, 0.2)
    assert not replaces(f"validation/{metric}", 0.5, 0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("validation/f1", "validation/loss"),
        ("validation/ema_loss", "validation/ema_loss"),
        ("validation/usps/accuracy", "validation/usps/loss"),
    ],
)
def test_the_loss_is_that_of_the_same_split_and_weights(name, loss):
    assert loss_beside(name) == loss


def test_step_0_is_best_only_if_it_is_better(tmp_path):
    """A rate so small that no bit moves: every evaluation is a tie."""
    still = (Phase(name="all", steps=3, optimizer="sgd", peak_lr=1e-30),)
    overrides = [
        ("evaluate.best", "validation/accuracy"),
        ("evaluate.every_steps", "1"),
    ]
    config = small.config(model="mlp", plan=still, hidden=(4,), overrides=overrides)
    result = run(config, tmp_path / "run")
    found = [line["validation/loss"] for line in small.lines(tmp_path / "run")
             if "validation/loss" in line]  # fmt: skip
    assert len(set(found)) == 1 and result["best_step"] == 3


def test_plateaus_restore_the_tie_with_the_lower_loss_and_count_no_improvement():
    phase = Phase(name="all", steps=9, plateau_metric="validation/accuracy")
    progress = Progress()

    def reached(step, accuracy, loss):
        measured = {"validation/accuracy": accuracy, "validation/loss": loss}
        return plateau.is_reached(phase, progress, measured, step)

    assert not reached(1, 0.5, 0.9)
    assert not reached(2, 0.5, 0.3)
    assert progress.plateau_best_step == 2 and progress.plateau_bad == 1
    assert not reached(3, 0.5, 0.4)
    assert progress.plateau_best_step == 2 and progress.plateau_bad == 2
    assert reached(4, 0.4, 0.1)


def test_the_loss_and_then_the_number_decide_ties_of_members():
    def member(accuracy, loss):
        return {"best": {"validation/accuracy": accuracy, "validation/loss": loss}}

    results = [member(0.5, 0.9), member(0.5, 0.3), {"failed": "x"}, member(0.5, 0.3)]
    holder = type("Population", (), {"_metric": "validation/accuracy"})
    assert _Population.best(holder, results) == 1  # type: ignore[arg-type]
    assert _Population.best(holder, results[:1]) == 0  # type: ignore[arg-type]
