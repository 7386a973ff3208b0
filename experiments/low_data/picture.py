"""Draws the means, intervals and single runs of the sweep into table.png beside itself.

.venv/bin/python experiments/low_data/picture.py [runs/low_data]
"""

import csv
import json
import pathlib
import sys

from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent


def main() -> None:
    """Draws a line for each arm of the sweep's table, the best first."""
    root = pathlib.Path(*sys.argv[1:2] or ["runs/low_data"])
    with (root / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    panel = (figure := Figure(figsize=(7, 2.6), layout="constrained")).subplots()
    for place, row in enumerate(rows):
        mean, low, high = (
            100 * float(row[key]) for key in ("test/accuracy", "low_95", "high_95")
        )
        panel.errorbar(
            mean, -place, xerr=[[mean - low], [high - mean]], fmt="o",
            color="#0072B2", capsize=4,
        )  # fmt: skip
        results = (root / "by_arm" / row["case"] / row["arm"]).glob("seed*/result.json")
        found = [
            json.loads(path.read_text())["best"]["test/accuracy"] for path in results
        ]
        panel.plot(
            [100 * value for value in found], [-place] * len(found), "|",
            color="#888888", ms=9,
        )  # fmt: skip
    panel.set_yticks([-place for place in range(len(rows))], [r["arm"] for r in rows])
    panel.set_xlabel("test accuracy on digits, 10 labels a class, 5 seeds (%)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#eeeeee")
    figure.savefig(HERE / "table.png", dpi=130)


if __name__ == "__main__":
    main()
