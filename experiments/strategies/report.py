"""The study's table and picture, from the results of its runs."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats


def interval(values: Sequence[float]) -> float:
    """Returns half the 95 % interval of a mean, by Student's t."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def grouped(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns an entry for each transfer, number of labels and arm, over its seeds."""
    cells: dict[tuple, list] = {}
    for row in rows:
        cells.setdefault((row["transfer"], row["labels"], row["arm"]), []).append(row)
    found = []
    for (transfer, labels, arm), runs in sorted(cells.items()):
        accuracy = [100 * run["test"] for run in sorted(runs, key=lambda r: r["seed"])]
        entry = {
            "transfer": transfer,
            "labels": labels,
            "arm": arm,
            "rate": runs[0]["rate"],
            "test_accuracy": accuracy,
            "mean": float(np.mean(accuracy)),
            "interval_95": interval(accuracy),
            "trained": runs[0]["trained"],
            "forward_passes": runs[0]["forward_passes"],
            "train_s": float(np.median([run["train_s"] for run in runs])),
        }
        if "forgotten" in runs[0]:
            forgotten = [100 * run["forgotten"] for run in runs]
            entry["forgotten"] = float(np.mean(forgotten))
            entry["forgotten_95"] = interval(forgotten)
        found.append(entry)
    return sorted(found, key=lambda e: (e["transfer"], e["labels"], -e["mean"]))


def write_report(rows: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> None:
    """Writes results.json, table.md and table.png, and prints the table."""
    found = grouped(rows)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        "| transfer, labels per class | strategy | rate | test accuracy (%) | trained | "
        "FLOPs a step, in forward passes | training (s) | source accuracy lost (points) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in found:
        lost = "not measured"
        if "forgotten" in entry:
            lost = f"{entry['forgotten']:.1f} ± {entry['forgotten_95']:.1f}"
        lines.append(
            f"| {entry['transfer']}, {entry['labels']} | {entry['arm']} | "
            f"{entry['rate']:g} | {entry['mean']:.1f} ± {entry['interval_95']:.1f} | "
            f"{entry['trained']:,} | {entry['forward_passes']:.2f} | "
            f"{entry['train_s']:.1f} | {lost} |"
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    _draw(found, folder / "table.png")
    print("\n".join(lines))


def _draw(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws a panel for each transfer and number of labels: means, intervals, runs."""
    panels = list(dict.fromkeys((e["transfer"], e["labels"]) for e in found))
    figure = Figure(figsize=(3.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (transfer, labels) in zip(axes, panels):
        part = [e for e in found if (e["transfer"], e["labels"]) == (transfer, labels)]
        for place, entry in enumerate(part):
            values = entry["test_accuracy"]
            axis.plot(values, [-place] * len(values), "|", color="#888888", ms=8)
            axis.errorbar(
                entry["mean"], -place, xerr=entry["interval_95"], fmt="o",
                color="#0072B2", capsize=3, ms=4,
            )  # fmt: skip
        axis.set_yticks([-i for i in range(len(part))], [e["arm"] for e in part])
        axis.set_title(f"{transfer}, {labels} labels per class", fontsize=10)
        axis.set_xlabel("test accuracy (%)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#eeeeee")
    figure.savefig(path, dpi=120)
