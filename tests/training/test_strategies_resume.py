"""Every strategy, stopped inside any phase and at its end, goes on to the same bits."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest
import small
from test_run import lines, same_result

from finetune_jax.plans import strategies
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import Stop
from finetune_jax.training.run import run

ROOT = pathlib.Path(__file__).parents[2]
MLP = dict(model="mlp", hidden=(8, 8))
CNN = dict(model="cnn", convolutions=(4,), dense=(8,), kernel_size=3)
STAGES = ("stage1", "stage2", "head")
FIELDS: dict[str, Any] = dict(steps=2, peak_lr=1e-2, optimizer="adam")
CARRY: dict[str, Any] = dict(**FIELDS, optimizer_state="carry")
# Model and plan.
PLANS = {
    "full": (MLP, strategies.full(**FIELDS)),
    "head_only": (MLP, strategies.head_only(**FIELDS)),
    "partial": (CNN, strategies.partial(STAGES, named=("stage1",), **FIELDS)),
    "layerwise": (MLP, strategies.layerwise(STAGES, **CARRY)),
    "gradual": (CNN, strategies.gradual(STAGES, decay=0.5, **CARRY)),
    "progressive": (MLP, strategies.progressive(STAGES, steps=2, optimizer="adam")),
    "two_stage": (
        CNN, strategies.two_stage(head_lr=1e-2, all_lr=1e-3, steps=2, optimizer="adam"),
    ),
    "alternating": (MLP, strategies.alternating(STAGES, cycles=2, **FIELDS)),
    "discriminative": (MLP, strategies.discriminative(STAGES, decay=0.3, **FIELDS)),
    "surgical": (MLP, strategies.surgical(STAGES, block="stage1", **FIELDS)),
    "bias_only": (MLP, strategies.bias_only(**FIELDS)),
    "norm_only": (CNN, strategies.norm_only(**FIELDS)),
    "lora": (dict(**MLP, lora_rank=2), strategies.lora(**FIELDS)),
}  # fmt: skip


def config(name):
    """Returns a config of digits, saved at the ends of phases and where it is stopped."""
    model, plan = PLANS[name]
    overrides = {
        "report.every_steps": "1",
        "evaluate.best": "validation/loss",
        "data.train": "train[:200]",
        "data.validation": "validation[:20]",
        "data.test": "test[:20]",
        "model.head.dropout": "0.2",
    }
    return small.config(plan=plan, overrides=tuple(overrides.items()), **model)


def run_with_stops(name, workdir, updates):
    """Returns the result of a run that is stopped again and again, and how often.

    Args:
        name: Of the plan.
        workdir: Of the run.
        updates: How many each attempt makes before it is stopped.
    """

    class After(Stop):
        made = 0

        def asked(self):
            self.made += 1
            return self.made == updates

    for stops in range(100):
        with contextlib.suppress(Preempted):
            return run(config(name), workdir, After()), stops
    raise AssertionError("The run never ends.")


def test_every_strategy_is_here():
    named = {name for name in vars(strategies) if not name.startswith("_")}
    assert set(PLANS) <= named and len(PLANS) == 13


@pytest.mark.slow
def test_a_strategy_stopped_twice_ends_in_the_same_bits(tmp_path, no_pictures):
    whole = run(config("layerwise"), tmp_path / "whole")
    workdir = tmp_path / "stopped"
    result, stops = run_with_stops("layerwise", workdir, updates=3)
    # After update 3, inside the second phase, and after 6, at the end of the last.
    assert stops == 2 and same_result(result, whole)
    assert lines(workdir) == lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_strategy_stopped_after_every_update_ends_in_the_same_bits(
    name, tmp_path, no_pictures
):
    whole = run(config(name), tmp_path / "whole")
    workdir = tmp_path / "stopped"
    result, stops = run_with_stops(name, workdir, updates=1)
    assert stops == whole["steps"] == 2 * len(PLANS[name][1])
    assert same_result(result, whole)
    assert lines(workdir) == lines(tmp_path / "whole")


KILLED = """
import os, sys, pathlib, signal
sys.path[:0] = ['tests', 'tests/training']
import test_strategies_resume as tests
from finetune_jax.training.updates.phase_run import PhaseRun
from finetune_jax.training.run import run

call = PhaseRun.call

def dies(self, placed, stop, **rate):
    if self.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, placed, stop, **rate)

PhaseRun.call = dies
run(tests.config(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradual", "alternating"])
def test_a_strategy_killed_in_each_phase_ends_in_the_same_bits(
    name, tmp_path, no_pictures
):
    whole = run(config(name), tmp_path / "whole")
    workdir = tmp_path / "killed"
    # At updates inside the first phase, at the start of the second, in the third.
    for step in (1, 2, 5):
        command = [sys.executable, "-c", KILLED, name, str(workdir), str(step)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert same_result(run(config(name), workdir), whole)
    assert lines(workdir) == lines(tmp_path / "whole")
    assert json.loads((workdir / "result.json").read_text())["steps"] == whole["steps"]
