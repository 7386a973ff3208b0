"""Runs that trackers follow."""

import pathlib

from finetune_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]

# Saved are the states after 0, 3 and 6 updates; lines are read an update late.
OVERRIDES = {
    "parallel.devices": 1,
    "parallel.steps_per_call": 1,
    "plan[0].steps": 6,
    "evaluate.every_steps": 3,
}


def config(**report):
    given = configs.load(str(ROOT / "configs" / "iris_mlp.py:tiny"))
    overrides = OVERRIDES | {f"report.{key}": value for key, value in report.items()}
    found, problems = configs.resolve(
        given, [(key, str(value)) for key, value in overrides.items()]
    )
    assert not problems
    return found
