"""Updates that are not finite stop a run, are left out, or lead back, without a trace."""

import json

import numpy as np
import pytest
import small
from small import lines

from finetune_jax import config as configs
from finetune_jax.core.errors import TrainingError
from finetune_jax.core.pytrees import named
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.restore import restore
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

POISON = 7
PLAN = (
    Phase(name="first", steps=12, optimizer="adamw", peak_lr=1e-2, accumulate_steps=2,
          clip_norm=1.0),
    Phase(name="second", steps=12, optimizer="sgd", peak_lr=1e-2,
          optimizer_args={"momentum": 0.9}),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Returns a file of 40 examples, one of which no float32 loss survives."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    x[POISON] = 3e38
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x_train=x, y_train=np.arange(40) % 4, x_test=x[:4], y_test=range(4))
    return path


def config(data, policy, **overrides):
    given = configs.default()
    given.data.update(name="arrays", dir=str(data), batch_size=8)
    given.model.name = "mlp"
    given.model.hidden = (6,)
    given.plan = as_config(PLAN)
    keys = {
        "parallel.devices": 1, "report.every_steps": 1, "checkpoint.every_steps": 4,
        "evaluate.ema_decay": 0.9, "nonfinite.policy": policy,
        "model.head.dropout": 0.2,
    } | overrides  # fmt: skip
    pairs = [(key, str(value)) for key, value in keys.items()]
    resolved, problems = configs.resolve(given, pairs)
    assert not problems, problems
    return resolved


def bad_steps(workdir):
    return [x["step"] for x in lines(workdir) if "train/nonfinite" in x]


def states(config, workdir, steps):
    """Returns leaves by name of the states of some checkpoints, but for the step."""
    setup = make_setup(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=99, read_only=True)
    found = [named(restore(setup, checkpoints, step)) for step in steps]
    checkpoints.close()
    return [{k: np.asarray(v) for k, v in x.items() if k != "step"} for x in found]


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


@pytest.mark.slow
def test_by_default_the_run_stops_and_keeps_what_the_update_got(data, tmp_path):
    with pytest.raises(TrainingError, match="norms of the gradient") as caught:
        run(config(data, "stop"), tmp_path / "run")
    (place,) = (tmp_path / "run" / "nonfinite").iterdir()
    told = json.loads((place / "update.json").read_text())
    assert f"at step {told['step']}, phase 'first'" in str(caught.value)
    assert told["examples"][str(POISON)] == f"example {POISON}"
    assert len(told["examples"]) == 8 and set(told["norms"]["gradient"]) == {
        "stage1", "head",
    }  # fmt: skip
    with np.load(place / "batch.npz") as batch:
        assert batch["inputs"].shape == (2, 4, 5)
        assert (batch["inputs"] == np.float32(3e38)).all(-1).sum() == 1
    logged = [x["step"] for x in lines(tmp_path / "run") if "train/loss" in x]
    assert logged == list(range(1, told["step"]))
    assert told["checkpoint"] == told["step"] // 4 * 4


@pytest.mark.slow
def test_what_is_skipped_leaves_nothing_but_the_step(data, tmp_path):
    keys = {"checkpoint.every_steps": 1, "checkpoint.keep": 99}
    chosen = config(data, "skip", **keys)
    run(chosen, tmp_path / "run")
    bad = bad_steps(tmp_path / "run")
    assert len(bad) >= 4 and bad[0] <= 12 < bad[-1]
    for step in bad:
        if step not in (1, 13):  # Before which the optimizer state is another one.
            before, after = states(chosen, tmp_path / "run", (step - 1, step))
            assert same(before, after)
    good = next(s for s in range(2, 12) if s not in bad)
    assert not same(*states(chosen, tmp_path / "run", (good - 1, good)))
    last = states(chosen, tmp_path / "run", (24,))[0]
    assert all(np.isfinite(leaf).all() for leaf in last.values())
    logged = [x["step"] for x in lines(tmp_path / "run") if "train/loss" in x]
    assert logged == [s for s in range(1, 25) if s not in bad]


@pytest.mark.slow
def test_a_rollback_returns_to_the_last_checkpoint_that_was_due(data, tmp_path):
    keys = {"checkpoint.every_steps": 4, "checkpoint.keep": 99}
    chosen = config(data, "rollback", **keys)
    run(chosen, tmp_path / "run")
    due = [s for s in bad_steps(tmp_path / "run") if s % 4 == 0]
    assert due  # Saved themselves, so that they can be seen.
    for step in due:
        before, after = states(chosen, tmp_path / "run", (step - 4, step))
        if step == 16:  # The optimizer state before it is of another phase.
            before, after = (
                {name: leaf for name, leaf in x.items() if "opt_state" not in name}
                for x in (before, after)
            )
        assert same(before, after)
    other = run(config(data, "skip", **keys), tmp_path / "skip")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert other["params_sha256"] != result["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("calls", [5, 1])
@pytest.mark.ci_runs("5-rollback")
def test_stopped_again_and_again_it_ends_in_the_same_bits(
    data, tmp_path, policy, calls
):
    chosen = config(data, policy)
    whole = run(chosen, tmp_path / "whole")
    result, stops = small.run_with_stops(chosen, tmp_path / "run", calls)
    assert stops >= 4 and small.same_result(result, whole)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert len(bad_steps(tmp_path / "run")) >= 4


@pytest.mark.slow
def test_there_may_be_so_many_and_no_more(data, tmp_path):
    with pytest.raises(TrainingError, match="This is number 3"):
        run(config(data, "skip", **{"nonfinite.limit": 2}), tmp_path / "run")
    assert len(bad_steps(tmp_path / "run")) == 2


@pytest.mark.bits
@pytest.mark.slow
def test_without_such_updates_guarding_changes_no_bit(tmp_path):
    plan = (Phase(name="all", steps=6, optimizer="adamw", clip_norm=1.0),)
    results = [
        run(
            small.config(
                model="mlp", plan=plan, overrides=[("nonfinite.policy", policy)],
                hidden=(8,),
            ),
            tmp_path / policy,
        )
        for policy in ("stop", "skip")
    ]  # fmt: skip
    assert small.same_result(*results)
