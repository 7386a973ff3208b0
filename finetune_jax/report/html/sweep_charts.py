"""Charts of a sweep: curves with bands, costs with the Pareto front, trials of a search."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.report import plots
from finetune_jax.report.html.charts import (
    Axis,
    Chart,
    Line,
    Scale,
    dots_of,
    path_of,
    readings_of,
    steps_axis,
    vertical,
)
from finetune_jax.report.html.formats import metric_text, metric_title

# Series with a colour of their own; others are grey.
COLOURS = 6
# Values whose ratio is larger are shown on a logarithmic axis.
_LOG_RATIO = 20

Points = tuple[np.ndarray, np.ndarray]


def styles_of(names: Sequence[str], first: Sequence[str]) -> dict[str, str]:
    """Returns the CSS class of each name.

    >>> styles_of(["a", "b"], ["b"])
    {'a': 'c1', 'b': 'c0'}

    Args:
        names: Names, in the order in which they get colours.
        first: Names that get a colour before all others.
    """
    order = [*dict.fromkeys([*first, *names])]
    return {
        name: f"c{order.index(name)}" if order.index(name) < COLOURS else "other"
        for name in names
    }


def band_curves(
    series: Mapping[str, Sequence[Points]],
    name: str,
    title: str,
    styles: Mapping[str, str],
) -> Chart:
    """Returns the chart of mean curves, each in the band of all its runs.

    Args:
        series: Steps and values of each run, by the name of its arm.
        name: Split and name of the metric.
        title: Title of the chart.
        styles: CSS class by arm.
    """
    merged = {arm: _merged(runs) for arm, runs in series.items()}
    merged = {arm: found for arm, found in merged.items() if found}
    values = np.array(
        [v for found in merged.values() for own in found.values() for v in own]
    )
    y, ticks = vertical(values, name)
    end = max(step for found in merged.values() for step in found)
    x, axis = steps_axis([plots.Span("", 0, end)], None)
    drawn, told = [], dict[int, list[str]]()
    # Grey lines lie below all others.
    for arm in sorted(merged, key=lambda arm: styles[arm] != "other"):
        found = merged[arm]
        steps = sorted(found)
        means = [(x(s), y(float(np.mean(found[s])))) for s in steps]
        highs = [(x(s), y(max(found[s]))) for s in steps]
        lows = [(x(s), y(min(found[s]))) for s in reversed(steps)]
        is_group = len(steps) > 1 and any(len(own) > 1 for own in found.values())
        is_other = styles[arm] == "other"
        drawn.append(
            Line(
                name=arm,
                style=styles[arm],
                path=path_of(means) if len(steps) > 1 else "",
                dots="" if len(steps) > 12 and not is_other else dots_of(means),
                band=f"{path_of([*highs, *lows])}Z"
                if is_group and not is_other
                else "",
            )
        )
        for step in steps if not is_other else ():
            text = metric_text(name, float(np.mean(found[step])))
            told.setdefault(step, []).append(f"{plots.shortened(arm, 24)} {text}")
    return Chart(
        title=title,
        alt=f"{metric_title(name)} of {', '.join(merged)} after each update",
        x=axis,
        y=Axis(title=metric_title(name), ticks=ticks),
        lines=tuple(drawn),
        readings=readings_of(told, x, None),
    )


def _merged(runs: Sequence[Points]) -> dict[int, list[float]]:
    """Returns the values of runs by step, at the steps that the most runs have."""
    found: dict[int, list[float]] = {}
    for steps, values in runs:
        for step, value in zip(steps, values):
            if np.isfinite(value):
                found.setdefault(round(float(step)), []).append(float(value))
    most = max(map(len, found.values()), default=0)
    # A mean over other runs at each step would jump.
    return {step: own for step, own in found.items() if 2 * len(own) > most}


def axis_of(values: Sequence[float], *, log: bool | None = None) -> tuple[Scale, Any]:
    """Returns the scale and the ticks of positive or other numbers.

    Args:
        values: Numbers, at least one.
        log: Whether the axis is logarithmic; None decides by their range.
    """
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and high / low > _LOG_RATIO
    if log and low > 0:
        margin = (high / low) ** 0.06 if high > low else 2.0
        scale = Scale(low / margin, high * margin, log=True)
        ticks = LogLocator(10).tick_values(low, high)
        inside = [v for v in ticks if scale.low <= v <= scale.high]
        if len(inside) < 2:
            ticks = LogLocator(10, subs=(1.0, 2.0, 5.0)).tick_values(low, high)
        return scale, scale.ticks(_few(list(ticks), scale), number_text)
    margin = 0.06 * (high - low) or abs(high) / 10 or 1.0
    scale = Scale(low - margin, high + margin)
    found = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return scale, scale.ticks(list(found), number_text)


def _few(ticks: list[float], scale: Scale, most: int = 5) -> list[float]:
    """Returns every second tick, or fewer, if there are too many for a narrow chart."""
    inside = [v for v in ticks if scale.low <= v <= scale.high]
    return inside[:: -(-len(inside) // most) or 1]


def number_text(value: float) -> str:
    """Returns a number for an axis.

    >>> [number_text(v) for v in (1e-05, 0.3, 1200.0, 2.5e6, 0)]
    ['1e-5', '0.3', '1,200', '2.5 M', '0']
    """
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.3g} M"
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")


def costs_chart(
    points: Sequence[tuple[str, float, tuple[float, float, float], str]],
    metric: str,
    title: str,
    styles: Mapping[str, str],
) -> Chart:
    """Returns the chart of a metric over a cost, with the Pareto front.

    Args:
        points: Name, cost, (mean, low, high) of the metric and text of the cost.
        metric: Split and name of the metric.
        title: Name of the cost.
        styles: CSS class by name.
    """
    x, x_ticks = axis_of([cost for _, cost, *_ in points])
    ends = [v for *_, of, _ in points for v in of if math.isfinite(v)]
    y, y_ticks = vertical(np.array(ends), metric)
    front = pareto([(cost, of[0]) for _, cost, of, _ in points], metric)
    corners: list[tuple[float, float]] = []
    for cost, value in front:
        corners += (
            [(cost, corners[-1][1]), (cost, value)] if corners else [(cost, value)]
        )
    corners.append((x.high, corners[-1][1]))
    drawn = [
        Line(name="", style="chance", path=path_of([(x(a), y(b)) for a, b in corners]))
    ]
    for name, cost, (mean, low, high), _ in points:
        whisker = [(x(cost), y(low)), (x(cost), y(high))]
        has_interval = math.isfinite(low) and math.isfinite(high)
        drawn.append(
            Line(
                name=name,
                style=styles[name],
                path=path_of(whisker) if has_interval else "",
                dots=dots_of([(x(cost), y(mean))]),
            )
        )
    told: dict[float, list[str]] = {}
    for name, cost, (mean, *_), text in points:
        value = metric_text(metric, mean)
        told.setdefault(cost, []).append(f"{plots.shortened(name, 24)} {value}, {text}")
    return Chart(
        title=title,
        alt=f"{metric_title(metric)} over {title}, with the Pareto front",
        x=Axis(title=title, ticks=x_ticks),
        y=Axis(title=metric_title(metric), ticks=y_ticks),
        lines=tuple(drawn),
        readings=_cells({x(cost): texts for cost, texts in told.items()}),
    )


def pareto(
    points: Sequence[tuple[float, float]], metric: str
) -> list[tuple[float, float]]:
    """Returns the points than which none is cheaper and as good, by cost.

    >>> pareto([(1, 0.5), (2, 0.4), (3, 0.9)], "test/accuracy")
    [(1, 0.5), (3, 0.9)]
    """
    sign = 1 if higher_is_better(metric) else -1
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not found or sign * value > sign * found[-1][1]:
            found.append((cost, value))
    return found


def _cells(told: Mapping[float, Sequence[str]]) -> tuple[tuple[float, str], ...]:
    """Returns the texts under the pointer, each as far as half of the way to the next."""
    places = sorted(told)
    places = places[:: -(-len(places) // 160) or 1]
    cuts = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    edges = itertools.pairwise([0.0, *cuts, 1.0])
    return tuple(
        (b - a, " · ".join(told[place])) for (a, b), place in zip(edges, places)
    )


def slice_chart(
    points: Sequence[tuple[Any, float, str, bool]],
    metric: str,
    name: str,
    *,
    log: bool | None,
    options: Sequence[Any] | None,
) -> Chart:
    """Returns the chart of a metric over one parameter of a search.

    Args:
        points: Value of the parameter, of the metric, text, and whether the trial ended
            early.
        metric: Split and name of the metric.
        name: Name of the parameter.
        log: Whether its axis is logarithmic.
        options: Values of a choice; None for numbers.
    """
    y, y_ticks = vertical(np.array([value for _, value, *_ in points]), metric)
    if options is None:
        x, x_ticks = axis_of([float(value) for value, *_ in points], log=log)
        places = [x(float(value)) for value, *_ in points]
    else:
        middles = {repr(o): (at + 0.5) / len(options) for at, o in enumerate(options)}
        label_of = [(middles[repr(o)], plots.shortened(str(o), 14)) for o in options]
        x_ticks = tuple(label_of)
        counts: dict[str, int] = {}
        places = []
        for value, *_ in points:
            # Neighbours would hide one another: they lie beside one another.
            turn = counts[repr(value)] = counts.get(repr(value), -1) + 1
            shift = ((turn * 0.618) % 1 - 0.5) * 0.4 / len(options)
            places.append(middles[repr(value)] + shift)
    whole = [(at, y(p[1])) for at, p in zip(places, points) if not p[3]]
    early = [(at, y(p[1])) for at, p in zip(places, points) if p[3]]
    told: dict[float, list[str]] = {}
    for at, (value, result, text, is_early) in zip(places, points):
        own = value if isinstance(value, str) or value is None else f"{value:.4g}"
        end = ", ended early" if is_early else ""
        found = f"{text}: {own}, {metric_text(metric, result)}{end}"
        told.setdefault(at, []).append(found)
    return Chart(
        title=name,
        alt=f"{metric_title(metric)} over {name}",
        x=Axis(title="", ticks=x_ticks),
        y=Axis(title=metric_title(metric), ticks=y_ticks),
        lines=(
            Line(name="ended early", style="early", dots=dots_of(early)),
            Line(name="complete", style="cloud", dots=dots_of(whole)),
        ),
        readings=_cells(told),
    )


def progress_chart(
    values: Sequence[tuple[int, float | None, str, bool]], metric: str
) -> Chart | None:
    """Returns the chart of the best value so far by trial; None without values.

    Args:
        values: Number, value, text and whether it ended early, for each trial.
        metric: Split and name of the metric.
    """
    known = [(n, v, text, early) for n, v, text, early in values if v is not None]
    complete = [(n, v) for n, v, _, early in known if not early]
    if not complete:
        return None
    y, y_ticks = vertical(np.array([v for _, v, *_ in known]), metric)
    end = max(max(n for n, *_ in values), 1)
    x = Scale(-0.5, end + 0.5)
    ticks = MaxNLocator(5, integer=True).tick_values(0, end)
    best = pareto(complete, metric)
    corners: list[tuple[float, float]] = []
    for number, value in best:
        corners += [(number, corners[-1][1])] if corners else []
        corners.append((number, value))
    corners.append((end + 0.5, corners[-1][1]))
    told = {}
    for number, value, text, early in known:
        so_far = [v for n, v in best if n <= number]
        parts = [
            f"{text}: {metric_text(metric, value)}{', ended early' if early else ''}"
        ]
        parts += [f"best so far {metric_text(metric, so_far[-1])}"] if so_far else []
        told[x(number)] = parts
    early_dots = [(x(n), y(v)) for n, v, _, early in known if early]
    dots = [(x(n), y(v)) for n, v, _, early in known if not early]
    return Chart(
        title=f"{metric_title(metric)} of each trial",
        alt=f"{metric_title(metric)} of each trial, and the best so far",
        x=Axis(title="trial", ticks=x.ticks(list(ticks), lambda v: f"{v:,.0f}")),
        y=Axis(title=metric_title(metric), ticks=y_ticks),
        lines=(
            Line(name="ended early", style="early", dots=dots_of(early_dots)),
            Line(name="complete", style="cloud", dots=dots_of(dots)),
            Line(
                name="best so far",
                style="test",
                path=path_of([(x(a), y(b)) for a, b in corners]),
            ),
        ),
        readings=_cells(told),
    )
