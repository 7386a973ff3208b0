"""FLOPs of an update, and accuracy lost on the source, by strategy.

.venv/bin/python experiments/strategies/costs.py [runs/strategies-digits]

Reads the folder of a sweep; prints a line for each case and arm. FLOPs are those of the
mean update, in forward passes of its batch. Intervals are Student's t over seeds, 95 %.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from finetune_jax import config as configs
from finetune_jax.modes.plan import forward_flops, step_flops
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.sweeps.populations.table import interval
from finetune_jax.training.setup import make_setup


def forward_passes(workdir: pathlib.Path) -> float:
    """Returns the FLOPs of the mean update of a run, in forward passes of its batch."""
    config, problems = configs.resolve(
        json.loads((workdir / "config.json").read_text())
    )
    assert not problems, problems
    setup = make_setup(config)
    size, shapes = config.data.batch_size, setup.shapes
    updates = [phase.steps or 0 for phase in setup.plan]
    flops = [
        step_flops(setup.phase(index), setup.task, shapes, size)
        for index in range(len(updates))
    ]
    one = forward_flops(setup.task, shapes, size)
    return float(np.dot(updates, flops)) / sum(updates) / one


def forgotten(workdirs: Sequence[pathlib.Path]) -> str:
    """Returns the points of accuracy that runs have lost on the source."""
    lost = []
    for workdir in workdirs:
        first = read_metrics(workdir / "metrics.jsonl")[0]
        last = json.loads((workdir / "result.json").read_text())["best"]
        if "source/accuracy" not in last:
            return "not measured"
        lost.append(100 * (first["source/accuracy"] - last["source/accuracy"]))
    half = interval(np.array(lost))
    return f"{np.mean(lost):.1f}" + ("" if half is None else f" ± {half:.1f}")


def main() -> None:
    """Prints the table of the runs that are finished."""
    root = pathlib.Path(*sys.argv[1:2] or ["runs/strategies-digits"])
    runs: dict[tuple[str, str], list[pathlib.Path]] = {}
    for key, member in json.loads((root / "sweep.json").read_text())["members"].items():
        if member["stage"] == "final" and (root / key / "result.json").is_file():
            runs.setdefault((member["case"], member["arm"]), []).append(root / key)
    print("| case | arm | FLOPs | source accuracy lost |\n|---|---|---|---|")
    passes: dict[str, float] = {}
    for (case, arm), workdirs in sorted(runs.items()):
        if arm not in passes:
            passes[arm] = forward_passes(workdirs[0])
        print(f"| {case} | {arm} | {passes[arm]:.2f} | {forgotten(workdirs)} |")


if __name__ == "__main__":
    main()
