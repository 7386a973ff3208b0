"""Plateaus that restore the best, lower the rate, and survive being stopped anywhere."""

import dataclasses

import numpy as np
import pytest
import small
from small import lines

from finetune_jax.core.pytrees import digest, named
from finetune_jax.core.train_state import eval_params
from finetune_jax.plans.phase import Phase, optimizer_state_moves
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.restore import restore
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

# So high a rate that the validation loss soon rises.
WILD = Phase(
    name="wild", steps=30, optimizer="sgd", optimizer_args={"momentum": 0.9},
    peak_lr=0.5, schedule="constant", plateau_metric="validation/loss",
    plateau_patience=2, plateau_restore=True,
)  # fmt: skip
CALM = Phase(
    name="calm", steps=8, optimizer="schedule_free_adamw", peak_lr=1e-2,
    schedule="plateau", schedule_args={"patience": 1, "factor": 0.5, "min_change": 9.0},
    rules=small.HEAD, batch_stats="hold",
)  # fmt: skip
LAST = Phase(name="last", steps=3, optimizer="adam", peak_lr=1e-3)


def config(plan=(WILD, CALM, LAST), **overrides):
    keys = {
        "evaluate.every_steps": 2, "evaluate.ema_decay": 0.9, "report.every_steps": 1,
        "evaluate.best": "validation/ema_loss", "data.batch_size": 16,
    } | overrides  # fmt: skip
    pairs = [(key, str(value)) for key, value in keys.items()]
    return small.config(model="mlp", plan=plan, overrides=pairs, hidden=(8,))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return run(config(), workdir), workdir


@pytest.mark.slow
def test_a_phase_leaves_its_best_evaluation_behind(tmp_path):
    plan = (WILD,)
    found = run(config(plan, **{"evaluate.best": "None"}), tmp_path / "run")
    log = [line for line in lines(tmp_path / "run") if "validation/loss" in line]
    losses = {line["step"]: line["validation/loss"] for line in log if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert found["steps"] == best + 4 < 30  # Patience of 2, an evaluation every 2.
    np.testing.assert_allclose(found["validation/loss"], losses[best], rtol=1e-6)
    setup = make_setup(config(plan, **{"evaluate.best": "None"}))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    progress = checkpoints.progress(found["steps"])
    saved = checkpoints.restore(best, setup.target(progress))
    checkpoints.close()
    assert digest(saved.params) == found["params_sha256"]
    # What the log says of the test split is of the state that is left behind.
    tested = [line for line in lines(tmp_path / "run") if "test/loss" in line][-1]
    np.testing.assert_allclose(tested["test/loss"], found["test/loss"], rtol=1e-6)


@pytest.mark.slow
def test_a_plateau_halves_the_rate_at_every_evaluation_without_improvement(undisturbed):
    rates = [
        line["train/learning_rate"]
        for line in lines(undisturbed[1])
        if line["phase"] == "calm" and "train/learning_rate" in line
    ]
    # Nothing improves by 9: after the first evaluation, each lowers the rate.
    where = [round(np.log2(1e-2 / rate)) for rate in rates]
    assert where[0] == 0 and where[-1] >= 2
    assert all(0 <= b - a <= 1 for a, b in zip(where, where[1:]))


@pytest.mark.slow
def test_averaged_weights_are_measured_beside_the_others(undisturbed):
    measured = [x for x in lines(undisturbed[1]) if "validation/loss" in x]
    assert all("validation/ema_accuracy" in line for line in measured)
    assert measured[0]["validation/loss"] == measured[0]["validation/ema_loss"]
    assert any(x["validation/loss"] != x["validation/ema_loss"] for x in measured)
    best = min(measured, key=lambda line: line["validation/ema_loss"])
    assert undisturbed[0]["best_step"] == best["step"]


@pytest.mark.slow
def test_a_schedule_free_phase_hands_on_what_was_evaluated(tmp_path):
    still = Phase(name="still", steps=2, optimizer="sgd", peak_lr=0.0)
    run(config((CALM, still)), tmp_path / "run")
    log = [x for x in lines(tmp_path / "run") if "validation/loss" in x]
    calm = [x for x in log if x["phase"] == "calm"][-1]
    np.testing.assert_allclose(
        log[-1]["validation/loss"], calm["validation/loss"], rtol=1e-5
    )
    assert log[-1]["phase"] == "still"


@pytest.mark.slow
@pytest.mark.parametrize("calls", [5, 1])
@pytest.mark.ci_runs("5")
def test_stopped_again_and_again_it_ends_in_the_same_bits(undisturbed, tmp_path, calls):
    result, stops = small.run_with_stops(config(), tmp_path / "run", calls)
    assert stops >= 3 and small.same_result(result, undisturbed[0])
    assert lines(tmp_path / "run") == lines(undisturbed[1])


def test_what_happens_to_optimizer_state_is_told():
    plan = (
        Phase(name="head", steps=1, rules=small.HEAD),
        Phase(name="all", steps=1, optimizer_state="carry"),
        Phase(name="body", steps=1, rules=(("head/.*", 0.0), (".*", 1.0))),
    )
    names = ("stem/kernel", "head/kernel", "head/bias")
    assert optimizer_state_moves(plan, 1, names) == {
        "kept": ["head/kernel", "head/bias"], "new": ["stem/kernel"], "dropped": [],
    }  # fmt: skip
    moves = optimizer_state_moves(plan, 2, names)
    assert moves["kept"] == [] and moves["new"] == ["stem/kernel"]
    assert moves["dropped"] == list(names)


@pytest.mark.slow
def test_the_best_checkpoint_is_what_was_measured(tmp_path):
    """The end of a phase that goes back to its best does not pass for another's best."""
    name = "validation/accuracy"  # Still rises where the loss does.
    found = run(config((WILD,), **{"evaluate.best": name}), tmp_path / "run")
    log = {x["step"]: x[name] for x in lines(tmp_path / "run") if name in x}
    assert max(log, key=lambda step: log[step]) == found["steps"] != found["best_step"]
    np.testing.assert_allclose(found["best"][name], log[found["best_step"]], rtol=1e-6)


@pytest.mark.slow
def test_what_leaves_a_carried_schedule_free_phase_is_what_was_evaluated(tmp_path):
    every = dataclasses.replace(
        CALM, steps=6, schedule="constant", schedule_args={}, rules=((".*", 1.0),)
    )
    head = dataclasses.replace(
        every, name="head", rules=small.HEAD, optimizer_state="carry"
    )
    keys = {"evaluate.every_steps": "6", "checkpoint.keep": "9"}
    run(config((every, head), **keys), tmp_path / "run")
    setup = make_setup(config((every, head), **keys))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=9, read_only=True)
    before, after = (restore(setup, checkpoints, step) for step in (6, 12))
    checkpoints.close()
    evaluated = named(eval_params(before))
    for name, leaf in named(after.params).items():
        if not name.startswith("head/"):
            assert not np.array_equal(leaf, named(before.params)[name])
            np.testing.assert_array_equal(leaf, evaluated[name])
