"""Accuracy that each strategy loses on the source, from the runs of the sweep.

.venv/bin/python experiments/strategies/forgotten.py [runs/strategies-digits]

Accuracy on the source before minus after, in points; the interval is Student's t over the
seeds (95 %).
"""

import json
import pathlib
import sys

import numpy as np

from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.sweeps.populations.table import interval


def main() -> None:
    """Prints a line for each case and arm whose runs are finished."""
    root = pathlib.Path(*sys.argv[1:2] or ["runs/strategies-digits"])
    lost: dict[tuple[str, str], list[float]] = {}
    for key, member in json.loads((root / "sweep.json").read_text())["members"].items():
        file = root / key / "result.json"
        if member["stage"] == "final" and file.is_file():
            before = read_metrics(root / key / "metrics.jsonl")[0]["source/accuracy"]
            after = json.loads(file.read_text())["best"]["source/accuracy"]
            values = lost.setdefault((member["case"], member["arm"]), [])
            values.append(100 * (before - after))
    print("| case | arm | source accuracy lost (points) |\n|---|---|---|")
    for (case, arm), values in sorted(lost.items()):
        half = interval(np.array(values))
        spread = "" if half is None else f" ± {half:.1f}"
        print(f"| {case} | {arm} | {np.mean(values):.1f}{spread} |")


if __name__ == "__main__":
    main()
