"""The studies in experiments/ are sweeps: they load, resolve and run."""

import csv
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pages
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.sweeps import schedule
from finetune_jax.sweeps.checks import config_problems
from finetune_jax.sweeps.definition import load

EXPERIMENTS = pages.ROOT / "experiments"
# Sweeps by their address below experiments/, with the number of their first runs.
SWEEPS = {
    "low_data/sweep.py": 12,
    "strategies/sweep.py:digits": 29,
    "strategies/sweep.py:flowers": 12,
    "domains/sweep.py:joint": 35,
    "domains/sweep.py:noisy": 30,
    "domains/sweep.py:rotated": 30,
    "domains/sweep.py:inverted": 30,
    "domains/sweep.py:mutual": 10,
    "domains/sweep.py:distill": 11,
    "sst2/sweep.py": 9,
}
# Two arms, rates and seeds of the study of few labels, cut to four updates.
SHORT = """
import dataclasses, runpy

def get_sweep():
    whole = runpy.run_path("experiments/low_data/sweep.py")["get_sweep"]()
    [(case, overrides)] = whole.cases.items()
    short = {"plan[0].steps": 4, "evaluate.every_steps": 2, "data.test": "test[:100]",
             "data.validation": "validation[:100]"}
    arms = {arm: whole.arms[arm] for arm in ("frozen, pretrained", "frozen, random")}
    return dataclasses.replace(
        whole, cases={case: overrides | short}, arms=arms, seeds=2,
        tune={"plan[0].peak_lr": (1e-2, 1e-1)},
    )
"""
# Folders of real data that they name.
FOLDERS = ("fashion_mnist", "flowers", "sst2")


@pytest.mark.parametrize("address", SWEEPS)
def test_a_study_loads_and_resolves(address, monkeypatch, tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FINETUNE_JAX_TESTDATA", str(tmp_path))
    one = jax.devices()[:1]  # As on a machine with one accelerator.
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.chdir(pages.ROOT)
    sweep, _ = load(str(EXPERIMENTS / address))
    assert config_problems(sweep, schedule.check(sweep)) == []
    first = schedule.Schedule(sweep).wanted(lambda _: None)
    assert len(first.members) == SWEEPS[address]


@pytest.mark.parametrize(
    "address",
    ["strategies/sweep.py:flowers", "domains/sweep.py:joint", "sst2/sweep.py"],
)
def test_data_that_is_missing_is_told_before_anything_runs(
    address, monkeypatch, tmp_path
):
    monkeypatch.delenv("FINETUNE_JAX_TESTDATA", raising=False)
    with pytest.raises(UserError, match="'FINETUNE_JAX_TESTDATA' is not set"):
        load(str(EXPERIMENTS / address))
    monkeypatch.setenv("FINETUNE_JAX_TESTDATA", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/.* does not exist"):
        load(str(EXPERIMENTS / address))


def test_an_unknown_question_is_told():
    with pytest.raises(UserError, match="no question 'nosy'; there are joint, noisy"):
        load(str(EXPERIMENTS / "domains/sweep.py:nosy"))


def test_every_study_with_a_sweep_is_checked_here():
    found = {pathlib.Path(address.partition(":")[0]) for address in SWEEPS}
    there = {file.relative_to(EXPERIMENTS) for file in EXPERIMENTS.glob("*/sweep.py")}
    assert found == there


def test_labels_of_a_target_domain_decide_and_choose_nothing(monkeypatch):
    monkeypatch.chdir(pages.ROOT)
    sweep, _ = load(str(EXPERIMENTS / "domains/sweep.py:noisy"))
    [(case, overrides)] = sweep.cases.items()
    tuned = dataclasses.replace(
        sweep,
        cases={case: {**overrides, "data.validation": "validation"}},
        tune={"plan[*].peak_lr": (1e-3, 3e-3)},
        tune_by="validation/noisy/accuracy",
    )
    problems = map(str, config_problems(tuned, schedule.check(tuned)))
    assert any("Sweep.tune_by: no run has 'validation/noisy" in p for p in problems)


@pytest.mark.slow
def test_the_study_of_few_labels_runs_from_the_command_line(tmp_path):
    file = tmp_path / "short.py"
    file.write_text(SHORT)
    command = [sys.executable, "-m", "finetune_jax.sweep", f"--sweep={file}"]
    command += [f"--dir={tmp_path / 'runs'}", "run"]
    # Unoptimised programs would take longer for the features than they save.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    printed = subprocess.run(
        command, cwd=pages.ROOT, env=environment, check=True, text=True,
        capture_output=True,
    ).stdout  # fmt: skip
    assert "tuning 10 labels a class, frozen, pretrained" in printed
    with (tmp_path / "runs" / "table.csv").open() as table:
        rows = {row["arm"]: row for row in csv.DictReader(table)}
    assert set(rows) == {"frozen, pretrained", "frozen, random"}
    for row in rows.values():
        assert (row["runs"], row["missing"], row["failed"]) == ("2", "0", "0")
        assert "plan[0].peak_lr" in row["chosen"]
        assert 0 < float(row["test/accuracy"]) <= 1
    # Two rates with seed 0, and the better one with seed 1.
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2 * 3
