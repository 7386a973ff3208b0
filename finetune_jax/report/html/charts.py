"""Charts of a page, as coordinates; the template draws them as SVG and HTML.

A chart has no script and no picture: it follows the colours and the width of the page,
and shows the values under the pointer.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from finetune_jax.report import plots
from finetune_jax.report.html.formats import (
    is_share,
    metric_text,
    metric_title,
    rate_text,
)

# Lines are drawn on a square of so many units, which the page stretches.
UNITS = 1000
# Most places of a chart that show their values.
_READINGS = 160
# Width of a chart on the narrowest screens, in inches, which decides whether names of
# phases fit.
_NARROW_IN = 2.9
# Most numbers with a chart of their own, and most of their dots.
_TARGETS, _DOTS = 4, 400
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        title: What it measures.
        ticks: Pairs (place from 0 to 1, label).
    """

    title: str
    ticks: tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        name: Name for the legend; '' leaves it out.
        style: CSS class, which gives its colour.
        path: SVG path of the line; '' draws none.
        dots: SVG path of its points; '' draws none.
        band: SVG path of the area around the line; '' draws none.
    """

    name: str
    style: str
    path: str = ""
    dots: str = ""
    band: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart.

    Attributes:
        title: Title above the chart.
        alt: Description for those who do not see it.
        x: Horizontal axis.
        y: Vertical axis.
        lines: Lines, the last one on top.
        phases: Triples (place of the begin, share of the width, label).
        readings: Pairs (share of the width, values under the pointer there).
    """

    title: str
    alt: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    phases: tuple[tuple[float, float, str], ...] = ()
    readings: tuple[tuple[float, str], ...] = ()


class Scale:
    """Maps values to places from 0 to 1."""

    def __init__(self, low: float, high: float, *, log: bool = False):
        """Maps [low, high], by powers of ten if `log`."""
        self.low, self.high, self.log = low, high, log

    def __call__(self, value: float) -> float:
        """Returns the place of a value; values outside lie at the ends."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log(low), math.log(high)
            value = math.log(max(value, self.low))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(
        self, values: Sequence[float], text: Callable[[float], str]
    ) -> tuple[tuple[float, str], ...]:
        """Returns the ticks at those of some values that the axis has."""
        slack = 1e-9 * (self.high - self.low)
        inside = [v for v in values if self.low - slack <= v <= self.high + slack]
        return tuple((self(v), text(v)) for v in inside)


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """Returns the SVG path through points with places from 0 to 1, y upwards.

    >>> path_of([(0, 0), (0.5, 1)])
    'M0 1000L500 0'
    """
    texts = [f"{UNITS * x:.0f} {UNITS * (1 - y):.0f}" for x, y in points]
    return f"M{'L'.join(texts)}" if texts else ""


def dots_of(points: Sequence[tuple[float, float]]) -> str:
    """Returns the SVG path of dots, lines without a length.

    >>> dots_of([(0, 0), (0.5, 1)])
    'M0 1000h0M500 0h0'
    """
    return "".join(f"M{UNITS * x:.0f} {UNITS * (1 - y):.0f}h0" for x, y in points)


def stairs(steps: Sequence[int], values: Sequence[float], end: int) -> list[Any]:
    """Returns the corners of a line that keeps each value until the next step.

    >>> stairs([0, 2], [0.5, 0.1], 3)
    [(0, 0.5), (2, 0.5), (2, 0.1), (3, 0.1)]
    """
    corners, ends = [], [*steps[1:], end]
    for begin, stop, value in zip(steps, ends, values):
        corners += [(begin, value), (stop, value)]
    return corners


def vertical(values: np.ndarray, name: str) -> tuple[Scale, tuple]:
    """Returns the scale and the ticks of the values of a metric."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12:
        low, high = low - max(abs(low), 1e-6) / 20, high + max(abs(high), 1e-6) / 20
    margin = 0.04 * (high - low)
    found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    scale = Scale(low - margin, high + margin)
    if not is_share(name):
        return scale, scale.ticks(found, lambda v: f"{v:.6g}")
    inside = [v for v in found if 0 <= round(v, 9) <= 1]
    return scale, scale.ticks(inside, lambda v: f"{100 * v:.3g} %")


def steps_axis(spans: Sequence[plots.Span], epoch: float | None) -> tuple[Scale, Axis]:
    """Returns the scale and the axis of updates.

    Args:
        spans: Spans of the phases.
        epoch: Updates in an epoch; None if unknown.
    """
    end = max(spans[-1].end if spans else 1, 1)
    scale = Scale(0, end)
    found = MaxNLocator(5, integer=True).tick_values(0, end)
    title = "step"
    if epoch:
        title += f" (an epoch is {epoch:,.4g} steps)"
    ticks = scale.ticks(found, lambda v: f"{v:,.0f}")
    return scale, Axis(title=title, ticks=ticks)


def _phases(
    spans: Sequence[plots.Span], scale: Scale
) -> tuple[tuple[float, float, str], ...]:
    labels = plots.phase_labels(spans, _NARROW_IN)
    places = [(scale(span.first), scale(span.end)) for span in spans]
    return tuple((a, b - a, text) for (a, b), text in zip(places, labels))


def readings_of(
    found: Mapping[int, Sequence[str]], scale: Scale, epoch: float | None
) -> tuple[tuple[float, str], ...]:
    """Returns the values under the pointer at each step where there are some.

    Args:
        found: Texts of the values by step.
        scale: Scale of the steps.
        epoch: Updates in an epoch; None if unknown.
    """
    steps = sorted(found)
    steps = steps[:: -(-len(steps) // _READINGS) or 1]
    # A place reaches half of the way to its neighbours.
    cuts = [(scale(a) + scale(b)) / 2 for a, b in itertools.pairwise(steps)]
    edges = [0.0, *cuts, 1.0]
    texts = []
    for step in steps:
        place = f"step {step:,}" + (f", epoch {step / epoch:.3g}" if epoch else "")
        texts.append(" · ".join([place, *found[step]]))
    return tuple(
        (b - a, text) for (a, b), text in zip(itertools.pairwise(edges), texts)
    )


def curves(
    lines: Sequence[Mapping[str, Any]],
    name: str,
    *,
    spans: Sequence[plots.Span],
    best_step: int | None,
    epoch: float | None,
) -> Chart:
    """Returns the chart of one metric on every split.

    Args:
        lines: Lines of `metrics.jsonl`.
        name: Name of the metric, such as 'loss'.
        spans: Spans of the phases.
        best_step: Step of the best checkpoint, which has a ring; None for none.
        epoch: Updates in an epoch; None if unknown.
    """
    series = {split: plots.points(lines, f"{split}/{name}") for split in SPLITS}
    series = {split: found for split, found in series.items() if len(found[0])}
    y, ticks = vertical(np.concatenate([v for _, v in series.values()]), name)
    x, axis = steps_axis(spans, epoch)
    drawn, told = [], dict[int, list[str]]()
    for split, (steps, values) in series.items():
        points = [(x(a), y(b)) for a, b in zip(steps, values)]
        is_curve = split != "test" and len(points) > 1
        drawn.append(
            Line(
                name=split,
                style=split,
                path=path_of(points) if is_curve else "",
                # Many measurements are a line, few are points on it.
                dots=dots_of(points) if split != "train" or not is_curve else "",
            )
        )
        ring = [p for p, at in zip(points, steps) if at == best_step]
        if split == "validation" and ring:
            drawn.append(Line(name="best", style="best", dots=dots_of(ring)))
        for step, value in zip(steps, values):
            told.setdefault(round(step), []).append(
                f"{split} {metric_text(name, float(value))}"
            )
    return Chart(
        title=metric_title(name),
        alt=f"{metric_title(name)} after each update on {', '.join(series)}",
        x=axis,
        y=Axis(title=metric_title(name), ticks=ticks),
        lines=tuple(drawn),
        phases=_phases(spans, x),
        readings=readings_of(told, x, epoch),
    )


def many_curves(
    series: Sequence[tuple[bool, np.ndarray, np.ndarray]],
    name: str,
    *,
    epoch: float | None,
    what: str = "member",
) -> Chart:
    """Returns the chart of one metric of many runs.

    Args:
        series: Whether a run is the best, its steps and its values, for each run.
        name: Split and name of the metric.
        epoch: Updates in an epoch; None if unknown.
        what: Name of one run, such as 'trial'.
    """
    y, ticks = vertical(np.concatenate([values for *_, values in series]), name)
    end = int(max(steps[-1] for _, steps, _ in series))
    x, axis = steps_axis([plots.Span("", 0, end)], epoch)
    by_step: dict[int, list[float]] = {}
    best: dict[int, float] = {}
    drawn = []
    for is_best, steps, values in sorted(series, key=lambda one: one[0]):
        points = [(x(a), y(b)) for a, b in zip(steps, values)]
        label, style = (
            (f"best {what}", "validation") if is_best else ("others", "other")
        )
        dots = dots_of(points) if is_best else ""
        drawn.append(Line(name=label, style=style, path=path_of(points), dots=dots))
        for step, value in zip(steps, values):
            by_step.setdefault(round(step), []).append(float(value))
            if is_best:
                best[round(step)] = float(value)
    told = {
        step: [
            *([f"best {what} {metric_text(name, best[step])}"] if step in best else []),
            f"median of {len(values)} {metric_text(name, float(np.median(values)))}",
            f"{metric_text(name, min(values))} to {metric_text(name, max(values))}",
        ]
        for step, values in by_step.items()
    }
    return Chart(
        title=metric_title(name),
        alt=f"{metric_title(name)} of {len(series)} {what}s",
        x=axis,
        y=Axis(title=metric_title(name), ticks=ticks),
        lines=tuple(drawn),
        readings=readings_of(told, x, epoch),
    )


def schedule(
    rates: Sequence[np.ndarray],
    *,
    spans: Sequence[plots.Span],
    epoch: float | None,
) -> Chart | None:
    """Returns the chart of the learning rate of every update; None without updates.

    Args:
        rates: Learning rates of each phase.
        spans: Spans of the phases, as they were run.
        epoch: Updates in an epoch; None if unknown.
    """
    steps: list[int] = []
    values: list[float] = []
    few: list[tuple[int, float]] = []
    for span, own in zip(spans, rates):
        taken = own[: span.end - span.first]
        # Many updates of one rate are one stair.
        changes = np.flatnonzero(np.diff(taken, prepend=np.nan) != 0)
        changes = changes[:: -(-len(changes) // plots.MOST_POINTS) or 1]
        steps += (span.first + changes).tolist()
        values += taken[changes].tolist()
        # A phase of one update, or of one rate, has a point.
        few += [(span.first, float(taken[0]))] if len(changes) == 1 else []
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    x, axis = steps_axis(spans, epoch)
    peaks = [float(own.max()) for own in rates if len(own) and own.max() > 0]
    if max(peaks) > 9 * min(peaks):
        y = Scale(min(peaks) / 30, max(peaks) * 2, log=True)
        ticks = y.ticks(LogLocator(10).tick_values(y.low, y.high), rate_text)
    else:
        y = Scale(0, 1.06 * max(positive))
        found = MaxNLocator(5).tick_values(0, max(positive))
        ticks = y.ticks(found, rate_text)
    corners = [(x(a), y(b)) for a, b in stairs(steps, values, spans[-1].end)]
    told = {step: [f"rate {rate_text(value)}"] for step, value in zip(steps, values)}
    dots = [(x(a), y(b)) for a, b in few]
    return Chart(
        title="learning rate",
        alt="learning rate of each update",
        x=axis,
        y=Axis(title="rate of scale 1", ticks=ticks),
        lines=(Line(name="", style="rate", path=path_of(corners), dots=dots_of(dots)),),
        phases=_phases(spans, x),
        readings=readings_of(told, x, epoch),
    )


def agreement(
    prediction: np.ndarray, target: np.ndarray, names: Sequence[str]
) -> list[Chart]:
    """Returns charts of predicted over true numbers.

    Args:
        prediction: Predictions, [N, T].
        target: True numbers, [N, T].
        names: Names of the numbers; only the first ones get a chart if there are many.
    """
    found = []
    for index, name in list(enumerate(names))[:_TARGETS]:
        x, y = target[:, index].astype(float), prediction[:, index].astype(float)
        if not np.isfinite(y).all() or not len(x):
            continue
        taken = np.unique(np.linspace(0, len(x) - 1, min(len(x), _DOTS)).astype(int))
        points = list(zip(x[taken].tolist(), y[taken].tolist()))
        low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
        margin = 0.05 * (high - low) or 1.0
        limits = low - margin, high + margin
        diagonal = [(bound, bound) for bound in limits]
        told = [(a, f"true {a:.4g}, predicted {b:.4g}") for a, b in points]
        lines = [
            ("", "chance", diagonal, True),
            ("", "cloud", points, False),
        ]
        title = f"{plots.shortened(name, 30)}, {len(taken):,} of {len(x):,} examples"
        found.append(plane(title, ("true", "predicted"), lines, told, limits))
    return found


def plane(
    title: str,
    axes: tuple[str, str],
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]], bool]],
    told: Sequence[tuple[float, str]],
    limits: tuple[float, float] = (0.0, 1.0),
) -> Chart:
    """Returns a chart whose axes have the same limits.

    Args:
        title: Title of the chart.
        axes: Titles of the horizontal and the vertical axis.
        lines: Name, style, points and whether they are joined, for each line.
        told: Pairs (horizontal place of a reading, its text).
        limits: Lowest and highest value of both axes.
    """
    low, high = limits
    scale = Scale(low, high)
    ticks = scale.ticks(MaxNLocator(5).tick_values(low, high), lambda v: f"{v:.6g}")
    drawn = []
    for name, style, points, is_joined in lines:
        places = [(scale(a), scale(b)) for a, b in points]
        draw = {"path": path_of(places)} if is_joined else {"dots": dots_of(places)}
        drawn.append(Line(name=name, style=style, **draw))
    texts = sorted(told)
    texts = texts[:: -(-len(texts) // _READINGS) or 1]
    cuts = [(scale(a) + scale(b)) / 2 for (a, _), (b, _) in itertools.pairwise(texts)]
    edges = itertools.pairwise([0.0, *cuts, 1.0]) if texts else ()
    return Chart(
        title=title,
        alt=f"{title}: {axes[1]} over {axes[0]}",
        x=Axis(title=axes[0], ticks=ticks),
        y=Axis(title=axes[1], ticks=ticks),
        lines=tuple(drawn),
        readings=tuple((b - a, text) for (a, b), (_, text) in zip(edges, texts)),
    )
