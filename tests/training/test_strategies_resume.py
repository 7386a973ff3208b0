"""Every strategy, stopped inside any phase and at its end, goes on to the same bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import small
from strategy_runs import PLANS, config

from finetune_jax.plans import strategies
from finetune_jax.training.run import run

ROOT = pathlib.Path(__file__).parents[2]


def test_every_strategy_is_here():
    named = {name for name in vars(strategies) if not name.startswith("_")}
    assert set(PLANS) <= named and len(PLANS) == 13


@pytest.mark.slow
def test_a_strategy_stopped_twice_ends_in_the_same_bits(tmp_path, no_pictures):
    whole = run(config("layerwise"), tmp_path / "whole")
    workdir = tmp_path / "stopped"
    result, stops = small.run_with_stops(config("layerwise"), workdir, calls=3)
    # After update 3, inside the second phase, and after 6, at the end of the last.
    assert stops == 2 and small.same_result(result, whole)
    assert small.lines(workdir) == small.lines(tmp_path / "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PLANS)
def test_every_strategy_stopped_after_every_update_ends_in_the_same_bits(
    name, tmp_path, no_pictures
):
    whole = run(config(name), tmp_path / "whole")
    workdir = tmp_path / "stopped"
    result, stops = small.run_with_stops(config(name), workdir)
    assert stops == whole["steps"] == 2 * len(PLANS[name][1])
    assert small.same_result(result, whole)
    assert small.lines(workdir) == small.lines(tmp_path / "whole")


KILLED = """
import os, sys, pathlib, signal
sys.path[:0] = ['tests']
import strategy_runs as tests
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
@pytest.mark.exhaustive
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
    assert small.same_result(run(config(name), workdir), whole)
    assert small.lines(workdir) == small.lines(tmp_path / "whole")
    assert json.loads((workdir / "result.json").read_text())["steps"] == whole["steps"]
