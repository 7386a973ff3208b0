"""Pictures of a run: learning curves, the confusion matrix, predicted numbers."""

import base64
import io
import pathlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from PIL import Image

from finetune_jax.core.metric_names import is_of_class

# Of Okabe & Ito 2008: told apart by colour-blind readers too.
COLOURS = {"train": "#999999", "validation": "#0072B2", "test": "#D55E00"}
# The test split is measured at the ends of phases only: points, not a curve.
STYLES = {
    "train": {"lw": 1},
    "validation": {"lw": 1.8, "marker": "o", "ms": 3},
    "test": {"ls": "", "marker": "D", "ms": 5},
}
HELD_OUT = ("validation", "test")
MOST_POINTS = 600
LEFT_IN, RIGHT_IN = 0.55, 0.15
SHADES = ("#f3f4f6", "#ffffff")
MOST_NUMBERED, MOST_NAMED = 20, 40
THUMBNAIL_PX = 160
# Smaller images are shown pixel by pixel.
PIXELATED_PX = 64


class Span(NamedTuple):
    """Where a phase lies on the axis of updates."""

    name: str
    first: int
    end: int


def spans_of(lines: Sequence[Mapping]) -> list[Span]:
    """Returns the phases that some lines of `metrics.jsonl` are of.

    >>> spans_of([{"step": s, "phase": p} for s, p in ((0, "a"), (9, "a"), (12, "b"))])
    [Span(name='a', first=0, end=9), Span(name='b', first=9, end=12)]
    """
    ends: dict[str, int] = {}
    for line in lines:
        ends[line["phase"]] = line["step"]
    firsts = [0, *ends.values()]
    return [Span(name, first, end) for first, (name, end) in zip(firsts, ends.items())]


def phase_labels(spans: Sequence[Span], width_in: float) -> list[str]:
    """Returns the names of phases, or their numbers where one name does not fit.

    Args:
        spans: Spans of the phases.
        width_in: Inches that they share.
    """
    total = max(spans[-1].end - spans[0].first, 1) if spans else 1
    fits = all(
        text_width_in(span.name) < width_in * (span.end - span.first) / total
        for span in spans
    )
    return [span.name if fits else str(i) for i, span in enumerate(spans, start=1)]


def text_width_in(text: str) -> float:
    """Returns about how wide a label of 8 points is, in inches."""
    return 0.072 * len(text)


def points(lines: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a metric where it was measured and finite.

    More than `MOST_POINTS` points are replaced by means of neighbours.
    """
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if not found:
        return np.zeros(0), np.zeros(0)
    table = np.array(found, np.float64)
    size = -(-len(table) // MOST_POINTS)
    cuts = range(0, len(table), size)
    return tuple(np.array([table[i : i + size].mean(axis=0) for i in cuts]).T)


def curve_names(lines: Sequence[Mapping]) -> list[str]:
    """Returns the metrics that have curves: the loss, what is measured, the rate."""
    keys = {key: None for line in lines for key in line if line[key] is not None}
    parts = [key.partition("/") for key in keys]
    measured = [name for split, _, name in parts if split in HELD_OUT and name]
    measured = [name for name in measured if not is_of_class(name)]
    names = ["loss", *measured, "accuracy", "learning_rate"]
    there = {name for split, _, name in parts if split in COLOURS}
    return [name for name in dict.fromkeys(names) if name in there]


def draw_curves(
    panel: Axes,
    lines: Sequence[Mapping],
    name: str,
    *,
    spans: Sequence[Span],
    width_in: float,
    best_step: int | None = None,
) -> None:
    """Draws the curves of one metric on every split, the phases behind them.

    Args:
        panel: To draw on.
        lines: Of `metrics.jsonl`.
        name: Name of the metric, such as 'loss'.
        spans: Spans of the phases.
        width_in: About how wide the panel is, in inches.
        best_step: Where the validation curve has a ring.
    """
    if name == "learning_rate":
        _draw_rates(panel, lines)
    for split, colour in COLOURS.items() if name != "learning_rate" else ():
        steps, values = points(lines, f"{split}/{name}")
        if len(steps):
            panel.plot(steps, values, color=colour, label=split, **STYLES[split])
        if split == "validation" and best_step is not None:
            at = steps == best_step
            panel.plot(
                steps[at], values[at], "o", ms=9, mew=1.5, mfc="none", mec=colour,
                label="_best", clip_on=False, zorder=4,
            )  # fmt: skip
    _draw_phases(panel, spans, width_in)
    if name.endswith("accuracy"):
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)


def _draw_phases(panel: Axes, spans: Sequence[Span], width_in: float) -> None:
    labels = phase_labels(spans, width_in)
    if not spans:
        return
    first, end = spans[0].first, max(spans[-1].end, spans[0].first + 1)
    taken = -float("inf")
    for index, (span, label) in enumerate(zip(spans, labels)):
        if len(spans) > 1:
            panel.axvspan(span.first, span.end, color=SHADES[index % 2], lw=0, zorder=0)
        # A narrow phase pushes the number of the next one to the right.
        half = text_width_in(label) / 2 / width_in * (end - first)
        centre = max((span.first + span.end) / 2, taken + half)
        taken = centre + half
        panel.text(
            centre, 1.01, label, transform=panel.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=8, color="#555555", parse_math=False,
        )  # fmt: skip
    panel.set_xlim(first - 0.015 * (end - first), end + 0.015 * (end - first))


def _draw_rates(panel: Axes, lines: Sequence[Mapping]) -> None:
    """Draws the rate of each phase, by powers of ten where the phases differ much."""
    peaks = []
    for phase in dict.fromkeys(line["phase"] for line in lines):
        of_phase = [line for line in lines if line["phase"] == phase]
        steps, rates = points(of_phase, "train/learning_rate")
        panel.plot(steps, rates, color="#444444", lw=1.2)
        peaks += [rates.max()] if len(rates) and rates.max() > 0 else []
    if peaks and max(peaks) > 9 * min(peaks):
        panel.set_yscale("log")
        panel.set_ylim(bottom=min(peaks) / 30, top=max(peaks) * 2)


def learning_curves(lines: Sequence[dict], path: pathlib.Path) -> None:
    """Draws every metric that has curves, a panel each, phases marked.

    Args:
        lines: Of `metrics.jsonl`.
        path: Path of the picture.
    """
    names, spans = curve_names(lines) or ["loss"], spans_of(lines)
    width_in = 3.9
    figure = Figure(figsize=(4.33 * len(names), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names):
        draw_curves(panel, lines, name, spans=spans, width_in=width_in)
        panel.set_xlabel("update")
        panel.set_title(name.replace("_", " "), pad=16)
    if panels[0].lines:
        panels[0].legend(frameon=False)
    if spans and phase_labels(spans, width_in)[0] != spans[0].name:
        key = "   ".join(f"{i} {span.name}" for i, span in enumerate(spans, start=1))
        key = textwrap.fill(key, 55 * len(names))
        figure.supxlabel(key, fontsize=8, color="#555555", parse_math=False)
    _save(figure, path, dpi=120)


def curve_figure(
    lines: Sequence[Mapping],
    name: str,
    *,
    spans: Sequence[Span],
    size_in: tuple[float, float],
    best_step: int | None,
) -> Figure:
    """Returns the curves of one metric without title and legend.

    Args:
        lines: Of `metrics.jsonl`.
        name: Name of the metric.
        spans: Spans of the phases.
        size_in: Width and height.
        best_step: Where the validation curve has a ring; None has none.
    """
    figure, (width, height) = Figure(figsize=size_in), size_in
    panel = figure.subplots()
    # Fixed margins, so that panels below each other have one axis of updates.
    figure.subplots_adjust(
        left=LEFT_IN / width, right=1 - RIGHT_IN / width,
        bottom=0.3 / height, top=1 - 0.22 / height,
    )  # fmt: skip
    draw_curves(
        panel, lines, name, spans=spans, width_in=panel_width_in(size_in),
        best_step=best_step,
    )  # fmt: skip
    panel.tick_params(labelsize=9)
    return figure


def panel_width_in(size_in: tuple[float, float]) -> float:
    """Returns how wide the panel of `curve_figure` is, in inches."""
    return size_in[0] - LEFT_IN - RIGHT_IN


def confusion_figure(
    counts: np.ndarray, class_names: Sequence[str], title: str
) -> Figure:
    """Returns the picture of a confusion matrix, shares of each true class in colour.

    Args:
        counts: [K, K], a row a true class.
        class_names: In the order of the rows.
        title: Above it; may be empty.
    """
    classes = len(class_names)
    # Folder names may hold bytes that are no text, which the font cannot draw.
    names = [
        shortened(name, 24).encode("utf-8", "replace").decode() for name in class_names
    ]
    longest_in = max(map(text_width_in, names))
    if classes <= MOST_NAMED:
        cell = 0.42 if classes <= MOST_NUMBERED else 0.25
        size = 1.0 + cell * classes + longest_in
    else:
        size = 6.6
    wide = 0.7 if classes > MOST_NUMBERED else 0.0
    size = max(size, 3.4)
    figure = Figure(figsize=(size + wide, size), layout="constrained")
    panel = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Among many classes a confusion is a small share of each.
    norm = PowerNorm(0.5 if classes > MOST_NUMBERED else 1.0, vmin=0, vmax=1)
    picture = panel.imshow(share, cmap="Blues", norm=norm)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    panel.set_title(title, parse_math=False)
    panel.tick_params(length=0)
    panel.spines[:].set_color("#999999")
    if classes <= MOST_NAMED:
        style = {"fontsize": 9, "parse_math": False}
        upright = longest_in < 0.8 * (size - 1.0 - longest_in) / classes
        panel.set_xticks(range(classes), names, rotation=0 if upright else 90, **style)
        panel.set_yticks(range(classes), names, **style)
    if classes <= MOST_NUMBERED:
        for row, column in zip(*np.nonzero(counts)):
            panel.text(
                column, row, str(counts[row, column]), ha="center", va="center",
                fontsize=8, color="white" if share[row, column] > 0.5 else "black",
            )  # fmt: skip
    else:
        label = "share of the true class"
        bar = figure.colorbar(picture, ax=panel, shrink=0.6, aspect=30, label=label)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def shortened(text: str, most: int) -> str:
    """Returns a text with its middle left out where it is too long.

    >>> shortened("a_rather_long_name.jpg", 12)
    'a_rath…e.jpg'
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def confusion_matrix(
    counts: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str
) -> None:
    """Draws a confusion matrix, shares of each true class in colour.

    Args:
        counts: [K, K], a row a true class.
        class_names: In the order of the rows.
        path: Path of the picture.
        title: Above it.
    """
    _save(confusion_figure(counts, class_names, title), path, dpi=120)


def predicted(
    prediction: np.ndarray,
    target: np.ndarray,
    names: Sequence[str],
    path: pathlib.Path,
    title: str,
) -> None:
    """Draws what was predicted over what is true, a panel a target.

    Args:
        prediction: [N, T].
        target: [N, T].
        names: Names of the targets; only the first ones are drawn if there are many.
        path: Path of the picture.
        title: Above it.
    """
    panels = min(len(names), 4)
    figure = Figure(figsize=(4.0 * panels, 4.0), layout="constrained")
    for index, panel in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        x, y = target[:, index], prediction[:, index]
        panel.axline((x.mean(), x.mean()), slope=1, color="#999999", lw=1)
        panel.plot(x, y, ".", color=COLOURS["validation"], ms=4, alpha=0.6)
        panel.set_xlabel("true")
        panel.set_ylabel("predicted")
        name = shortened(names[index], 30)
        panel.set_title(name, fontsize=9, parse_math=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    _save(figure, path, dpi=120)


def _save(figure: Figure, target: pathlib.Path | io.BytesIO, **options: Any) -> None:
    with warnings.catch_warnings():
        # A class may be named in a script that the font lacks: boxes, and no message.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(target, **options)


def svg(figure: Figure) -> bytes:
    """Returns a figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "finetune_jax"}):
        _save(figure, buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """Returns a figure as PNG, two points of it to a point of the screen."""
    buffer = io.BytesIO()
    _save(figure, buffer, format="png", dpi=192, metadata={"Software": None})
    return buffer.getvalue()


def address(content: bytes, kind: str) -> str:
    """Returns a picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: np.ndarray, *, exact: bool = False) -> tuple[str, int, int, bool]:
    """Returns address, width and height in pixels, and whether pixels shall be seen.

    Args:
        image: uint8 [H, W, C], C 1 or 3.
        exact: Whether a larger image keeps its colours, as masks need.
    """
    grey = image.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    buffer, largest = io.BytesIO(), max(picture.size)
    if largest <= PIXELATED_PX:
        picture.save(buffer, format="png")
        width, height = (side * (THUMBNAIL_PX // largest) for side in picture.size)
        return address(buffer.getvalue(), "png"), width, height, True
    if exact:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.NEAREST)
        picture.save(buffer, format="png")
        return address(buffer.getvalue(), "png"), *picture.size, True
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(buffer, format="jpeg", quality=88)
    return address(buffer.getvalue(), "jpeg"), *picture.size, False
