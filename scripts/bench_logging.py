"""Claim: logging every step costs at most 3 % for steps of 5 ms and more.

.venv/bin/python scripts/bench_logging.py [--rounds=7] [--steps=400]

Trains a small convolutional network on digits, with a line of metrics for every update and
with none, in turn, in one process; prints the time of an update and the ratio, by the
runs' own clocks, which count reading and writing the metrics as a part of the update.
"""

import argparse
import pathlib
import statistics
import tempfile

import jax

from finetune_jax import config as configs
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.training.run import run


def update_s(steps: int, every: int, workdir: pathlib.Path) -> float:
    """Returns the seconds of an update."""
    given = configs.default()
    given.data.update(image_size=8, batch_size=128)
    given.model.name = "cnn"
    given.model.convolutions, given.model.dense = (8, 8), (32,)
    given.parallel.devices = 1
    given.report.every_steps = every
    given.plan = as_config((Phase(name="all", steps=steps, optimizer="adamw"),))
    config, problems = configs.resolve(given)
    assert not problems, problems
    return config.data.batch_size / run(config, workdir)["examples_per_s"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds + 1):
            found.append(
                [
                    update_s(
                        arguments.steps, every, pathlib.Path(name, f"{number}-{every}")
                    )
                    for every in (1, 10**6)
                ]
            )
    ratios = sorted(logged / silent for logged, silent in found[1:])
    logged, silent = (1e3 * statistics.median(column) for column in zip(*found[1:]))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(
        f"a line an update {logged:.2f} ms, none {silent:.2f} ms: "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
