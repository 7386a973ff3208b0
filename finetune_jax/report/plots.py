"""Pictures of a run: learning curves and the confusion matrix."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Of Okabe & Ito 2008: told apart by colour-blind readers too.
COLOURS = {"train": "#999999", "validation": "#0072B2", "test": "#D55E00"}
# The test split is measured at the ends of phases only: points, not a curve.
STYLES = {
    "train": {"lw": 1},
    "validation": {"lw": 1.8, "marker": "o", "ms": 3},
    "test": {"ls": "", "marker": "D", "ms": 5},
}


def learning_curves(lines: Sequence[dict], path: pathlib.Path) -> None:
    """Draws every metric that has curves, a panel each, phases marked.

    Args:
        lines: Of `metrics.jsonl`.
        path: Of the picture.
    """
    names = ("loss", "accuracy", "learning_rate")
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, len(names))
    starts: dict[str, int] = {}
    for line in lines:
        starts.setdefault(line["phase"], line["step"])
    for panel, name in zip(panels, names):
        for split, colour in COLOURS.items():
            key = f"{split}/{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, values = zip(*points)
                panel.plot(steps, values, color=colour, label=split, **STYLES[split])
        for phase, step in starts.items():
            panel.axvline(step, color="#cccccc", lw=0.8, zorder=0)
            panel.text(
                step, 1.0, f" {phase}", transform=panel.get_xaxis_transform(),
                va="bottom", fontsize=8, color="#666666",
            )  # fmt: skip
        panel.set_xlabel("update")
        panel.set_title(name.replace("_", " "), pad=14)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def confusion_matrix(
    counts: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str
) -> None:
    """Draws a confusion matrix, shares of each true class in colour.

    Args:
        counts: [K, K], a row a true class.
        class_names: In the order of the rows.
        path: Of the picture.
        title: Above it.
    """
    classes = len(class_names)
    size = float(np.clip(2.4 + 0.42 * classes, 4, 24))
    figure = Figure(figsize=(size, size), layout="constrained")
    panel = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    panel.set_title(title)
    if classes <= 40:
        panel.set_xticks(range(classes), class_names, rotation=90)
        panel.set_yticks(range(classes), class_names)
    if classes <= 20:
        for row, column in zip(*np.nonzero(counts)):
            panel.text(
                column, row, str(counts[row, column]), ha="center", va="center",
                fontsize=8, color="white" if share[row, column] > 0.5 else "black",
            )  # fmt: skip
    figure.savefig(path, dpi=120)
