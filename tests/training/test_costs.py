"""Costs of a run: what its updates compute and need, whatever stops it meets."""

import pytest
import small

from finetune_jax import config as configs
from finetune_jax.core.pytrees import count
from finetune_jax.modes.plan import step_flops
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")


def config(*overrides):
    given = configs.load("configs/iris_mlp.py:tiny")
    # The small batch leaves little to optimise away beside the products of matrices.
    fixed = [
        ("parallel.devices", "1"),
        ("plan[0].steps", "6"),
        ("plan[0].epochs", "None"),
    ]
    found, problems = configs.resolve(given, [*fixed, *overrides])
    assert not problems, problems
    return found


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """Returns the costs of an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_jax.training.run.write_report", lambda *_: None)
        return run(config(), tmp_path_factory.mktemp("run") / "whole")["cost"]


def test_operations_are_those_of_the_plan(cost):
    given = config()
    setup = make_setup(given)
    size = given.data.batch_size
    update = step_flops(setup.phase(0), setup.task, setup.shapes, size)
    assert cost["gflop"] == pytest.approx(6 * update / 1e9, rel=0.05)
    assert cost["trained_parameters"] == count(setup.shapes.params)
    assert cost["memory_mb"] > 4 * cost["trained_parameters"] / 1e6


@pytest.mark.slow
def test_a_stopped_run_has_the_costs_of_an_undisturbed_one(cost, tmp_path):
    stopped, stops = small.run_with_stops(config(), tmp_path / "stopped")
    assert stops and stopped["cost"] == cost


@pytest.mark.exhaustive
def test_operations_are_unknown_under_pmap(tmp_path):
    on_two = ("parallel.mode", "pmap"), ("parallel.devices", "2")
    cost = run(config(*on_two), tmp_path / "run")["cost"]
    assert cost["gflop"] is None and cost["memory_mb"] is None
