"""The studies in experiments/ are sweeps: they load, resolve and run."""

import pathlib

import jax
import pages
import pytest

from finetune_jax.sweeps import schedule
from finetune_jax.sweeps.checks import config_problems
from finetune_jax.sweeps.definition import load

EXPERIMENTS = pages.ROOT / "experiments"
# Sweeps by their address below experiments/, with the number of their first runs.
SWEEPS = {"low_data/sweep.py": 12}


@pytest.mark.parametrize("address", SWEEPS)
def test_a_study_loads_and_resolves(address, monkeypatch):
    one = jax.devices()[:1]  # As on a machine with one accelerator.
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.chdir(pages.ROOT)
    sweep, _ = load(str(EXPERIMENTS / address))
    assert config_problems(sweep, schedule.check(sweep)) == []
    first = schedule.Schedule(sweep).wanted(lambda _: None)
    assert len(first.members) == SWEEPS[address]


def test_every_study_with_a_sweep_is_checked_here():
    found = {pathlib.Path(address.partition(":")[0]) for address in SWEEPS}
    there = {file.relative_to(EXPERIMENTS) for file in EXPERIMENTS.glob("*/sweep.py")}
    assert found == there
