"""Claim: a grid of 64 heads takes at most 2.5 times the wall time of one run.

.venv/bin/python scripts/bench_population.py [--members=64] [--rounds=2]
  [--config=FILE[:ARG]]

Runs the config alone, as a sweep of rates and seeds by one worker, and as a population of
them, from command to table, in turn, with an empty cache first and with what that left
behind second; prints seconds, and the ratios. Then compares what the updates of all
members took with what those of the same number of single runs in one process would have,
by the runs' own clocks.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from finetune_jax.config import grid

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "resnet_head.py"
SEEDS = 4
SWEEP = """
from finetune_jax import sweeps

def get_sweep():
    return sweeps.Sweep(
        base={base!r}, arms=sweeps.grid({{"plan[0].peak_lr": {rates!r}}}), seeds={seeds},
        metric="test/accuracy", keep="best", pages=False,
    )
"""
SINGLES = """
import pathlib, sys
from finetune_jax import config as configs
from finetune_jax.modes.startup import pin_environment
pin_environment(None, False)
from finetune_jax.training.run import run
for seed in range(int(sys.argv[3])):
    config, problems = configs.resolve(configs.load(sys.argv[1]), [("seed", str(seed))])
    assert not problems
    run(config, pathlib.Path(sys.argv[2]) / str(seed))
"""


def seconds(command: list[str], cache: pathlib.Path) -> float:
    """Returns what a command takes."""
    environment = {**os.environ, "FINETUNE_JAX_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *command],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def training_s(workdir: pathlib.Path) -> float:
    """Returns the seconds that the updates of a run took."""
    result = json.loads((workdir / "result.json").read_text())
    config = json.loads((workdir / "config.json").read_text())
    return result["steps"] * config["data"]["batch_size"] / result["examples_per_s"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", default=str(CONFIG))
    arguments = parser.parse_args()
    rates = [10 ** (-k / 8) for k in range(arguments.members // SEEDS)]
    members = grid({"plan[0].peak_lr": rates, "seed": range(SEEDS)})
    command = ["-m", "finetune_jax.main", f"--config={arguments.config}"]
    print(f"jax {jax.__version__}, {len(members)} members")
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for kind in ("nothing kept", "all kept"):
                one = folder / f"one {kind}"
                many = folder / f"many {kind}"
                single = seconds([*command, f"--workdir={one}"], folder / "cache one")
                population = f"--config.population={members!r}"
                taken = seconds(
                    [*command, f"--workdir={many}", population], folder / "cache many"
                )
                file = folder / "sweep.py"
                # Sweeps beside each other would take each other's runs.
                file.write_text(
                    SWEEP.format(base=arguments.config, rates=tuple(rates), seeds=SEEDS)
                )
                swept = seconds(
                    ["-m", "finetune_jax.sweep", f"--sweep={file}",
                     f"--dir={folder / kind / 'sweep'}", "run"],
                    folder / "cache sweep",
                )  # fmt: skip
                print(
                    f"round {number + 1}, {kind:12}: one run {single:6.1f} s, sweep "
                    f"{swept:6.1f} s = {swept / single:.2f} runs, population {taken:6.1f} "
                    f"s = {taken / single:.2f} runs",
                    flush=True,
                )
            trained = sum(map(training_s, (many / "members").iterdir()))
            count, singles = SEEDS, folder / "singles"
            seconds(
                ["-c", SINGLES, arguments.config, str(singles), str(count)],
                folder / "cache one",
            )
            alone = sum(map(training_s, singles.iterdir())) * len(members) / count
            print(
                f"updates of all members {trained:6.1f} s, of as many single runs in one "
                f"process {alone:6.1f} s: {trained / alone:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
