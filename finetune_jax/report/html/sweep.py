"""The page of a sweep: its table, differences, curves, costs, and how to repeat it."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.report.html import formats
from finetune_jax.report.html.charts import Chart, many_curves
from finetune_jax.report.html.formats import SPACE, metric_text, metric_title
from finetune_jax.report.html.sweep_charts import (
    Points,
    band_curves,
    costs_chart,
    progress_chart,
    slice_chart,
    styles_of,
)
from finetune_jax.report.html.templates import write_html

# A bar of a forest plot ends at so many times the largest difference.
_REACH = 3.0
_MOST_CURVES = 200
# Trials that a table shows at first.
_MOST_ROWS = 20
# Cases with tiles.
_MOST_TILES = 3
# Letters of a word that a narrow column holds.
_LONG_WORD = 18
_VERDICTS = {
    "better": "better", "worse": "worse", "open": "not told apart",
    "too few": "no test",
}  # fmt: skip
Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run of an arm.

    Attributes:
        seed: Its seed as text.
        state: 'finished', 'failed', 'ended early' or 'missing'.
        value: Metric of its best state.
        page: Address of its page from this one; '' for none.
        workdir: Its workdir.
        command: Command that makes it again, or makes it.
        curve: Steps and values of the metric of learning curves.
    """

    seed: str
    state: str
    value: float | None
    page: str
    workdir: str
    command: str
    curve: Points | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRow:
    """An arm in a case, or a trial.

    Attributes:
        case: Name of the case.
        arm: Name of the arm.
        chosen: Values that were chosen for it, as text.
        changes: Values that it changes in the base config, each as text.
        runs: Its runs.
        mean: Mean, low and high end of its interval, of the metric; None without.
        mean_text: The same as text.
        difference: The same of the difference from the baseline.
        difference_text: The same as text.
        verdict: 'better', 'worse', 'open' or 'too few'; '' without a comparison.
        answer: Sentence about the comparison.
        costs: Pairs (number, text) by the name of the cost.
        problem: Why it has no finished run; '' if it has.
        is_early: Whether it is a trial that ended early.
    """

    case: str
    arm: str
    chosen: str
    changes: Sequence[str]
    runs: Sequence[RunRow]
    mean: Interval | None
    mean_text: str
    difference: Interval | None
    difference_text: str
    verdict: str
    answer: str
    costs: Mapping[str, tuple[float, str]]
    problem: str = ""
    is_early: bool = False

    @property
    def has_long_word(self) -> bool:
        """Whether its name may break within a word, which would widen a table."""
        return any(len(word) > _LONG_WORD for word in self.arm.split())

    def count(self, state: str) -> int:
        """Returns the number of runs in a state."""
        return sum(run.state == state for run in self.runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """A trial of a search.

    Attributes:
        number: Its number.
        params: Values of the search space by name.
        value: Metric, the last one if it ended early; None if it has none.
        is_early: Whether it ended early.
    """

    number: int
    params: Mapping[str, Any]
    value: float | None
    is_early: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of a search space.

    Attributes:
        name: Name, as in `TrialPoint.params`.
        label: Name for the page.
        is_log: Whether it is searched on a logarithmic axis.
        options: Values of a choice; None for numbers.
    """

    name: str
    label: str
    is_log: bool = False
    options: Sequence[Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPage:
    """All that the page of a sweep shows.

    Attributes:
        title: Name of the sweep.
        identity: Triples (label, value, note) that tell the sweep from others.
        facts: Triples (label, value, note) about all runs.
        metric: Metric that decides.
        curve_metric: Metric of the learning curves.
        curve_note: Sentence about the split of the learning curves.
        baseline: Arm that the others are compared with; '' for none.
        rows: Arms by case, or trials, the best first.
        arms: Names of all arms, in the order of the sweep.
        remarks: Lines about what limits the comparisons.
        warnings: Lines about members of other code, packages or data.
        failures: Triples (member, last line of the error, path of its log).
        spreads: Rows (arm, source of randomness, deviation, low, high, groups).
        command: Command that makes the sweep.
        partial: Line that says that runs are missing; '' if none is.
        definition: Pairs (name of an arm or a case, values that it sets).
        tuning: Heading and rows about the values that tuning tried.
        tuning_note: Sentence about the seeds that choose.
        trials: Trials of a search.
        parameters: Parameters of its space.
    """

    title: str
    identity: Sequence[tuple[str, str, str]]
    facts: Sequence[tuple[str, str, str]]
    metric: str
    curve_metric: str
    curve_note: str
    baseline: str
    rows: Sequence[ArmRow]
    arms: Sequence[str]
    remarks: Sequence[str]
    warnings: Sequence[str]
    failures: Sequence[tuple[str, str, str]]
    spreads: Sequence[tuple[str, str, str, str, str, int]]
    command: str
    partial: str
    definition: Sequence[tuple[str, Sequence[str]]]
    tuning: Sequence[Sequence[str]] = ()
    tuning_note: str = ""
    trials: Sequence[TrialPoint] = ()
    parameters: Sequence[Parameter] = ()

    @property
    def cases(self) -> dict[str, list[ArmRow]]:
        """Rows of each case."""
        found: dict[str, list[ArmRow]] = {}
        for row in self.rows:
            found.setdefault(row.case, []).append(row)
        return found


def write_sweep_page(page: SweepPage, path: pathlib.Path) -> None:
    """Writes the page to `report/index.html` of the folder of a sweep."""
    styles = _styles(page)
    curves = _trial_curves(page) if page.trials else _curves(page, styles)
    columns, same = _cost_columns(page)
    write_html(
        "sweep.html.jinja",
        path,
        by_many=True,
        page=page,
        legends=_legend(page, styles),
        tiles=_tiles(page),
        tables=[_table(page, case, rows, styles) for case, rows in page.cases.items()],
        columns=columns,
        facts=[*page.facts, *same],
        forests=_forests(page),
        curves=curves,
        costs=[] if page.trials else _costs(page, columns, styles),
        cost_tables=_cost_tables(page, columns),
        progress=_progress(page),
        slices=_slices(page),
    )


def _styles(page: SweepPage) -> dict[str, str]:
    """Returns the colour of each arm; the first ones, and the baseline, have one."""
    best = [row.arm for row in page.rows]
    first = [page.baseline] if page.baseline else []
    few = page.arms if len(page.arms) <= len(set(page.arms)) <= 6 else best
    found = styles_of(list(dict.fromkeys([*few, *page.arms])), first)
    return found | {row.arm: found.get(row.arm, "other") for row in page.rows}


def _legend(page: SweepPage, styles: Mapping[str, str]) -> dict[str, str]:
    """Returns the colours of arms, all grey ones as one."""
    arms = dict.fromkeys(row.arm for row in page.rows)
    found = {arm: styles[arm] for arm in arms if styles[arm] != "other"}
    return found | ({"others": "other"} if len(found) < len(arms) else {})


def _cost_columns(page: SweepPage) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Returns the costs that differ between rows, and facts about those that do not."""
    columns, same = [], []
    for name in dict.fromkeys(name for row in page.rows for name in row.costs):
        texts = {row.costs[name][1] for row in page.rows if name in row.costs}
        if len(texts) > 1 or len(page.rows) == 1:
            columns.append(name)
        else:
            same.append((formats.capitalised(name), texts.pop(), "of each run"))
    return columns, same


def _tiles(page: SweepPage) -> list[dict[str, str]]:
    """Returns the best row of each case, and its difference from the baseline."""
    tiles = []
    for case, rows in list(page.cases.items())[:_MOST_TILES]:
        best = next((row for row in rows if row.mean is not None), None)
        if best is None or best.mean is None:
            continue
        mean, low, high = best.mean
        where = f", {case}" if case else ""
        runs = best.count("finished")
        ends = f"{metric_text(page.metric, low)} to {metric_text(page.metric, high)}"
        tiles.append(
            {
                "label": f"{formats.capitalised(metric_title(page.metric))}, best{where}",
                "value": metric_text(page.metric, mean),
                "interval": _interval_text(ends) if math.isfinite(low) else "",
                "note": f"{best.arm}, {runs} run{'' if runs == 1 else 's'}",
            }
        )
        if best.difference is None:
            continue
        number, _, ends = best.difference_text.partition(" (")
        number, _, unit = number.partition(" ")
        tiles.append(
            {
                "label": f"Difference from {page.baseline}{where}{unit and f', {unit}'}",
                "value": number,
                "interval": _interval_text(ends.rstrip(")")) if ends else "",
                "note": f"{best.arm}, {_VERDICTS[best.verdict]}",
            }
        )
    return tiles


def _interval_text(ends: str) -> str:
    return f"95{SPACE}% interval {ends}"


def _ends(rows: Sequence[ArmRow], metric: str) -> tuple[float, float]:
    """Returns the ends of the axis of some rows."""
    values = [r.value for row in rows for r in row.runs if r.value is not None]
    values = [value for value in values if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # Intervals may be far wider than the runs: those of two seeds, for example.
    reach = high - low or math.inf
    ends = [end for row in rows if row.mean for end in row.mean if math.isfinite(end)]
    low = max(min([low, *ends]), low - reach)
    high = min(max([high, *ends]), high + reach)
    margin = 0.03 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return (max(low, 0.0), min(high, 1.0)) if formats.is_share(metric) else (low, high)


def _table(
    page: SweepPage, case: str, rows: Sequence[ArmRow], styles: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the rows of a case with their runs on strips."""
    low, high = _ends(rows, page.metric)

    def place(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0)

    cells = []
    for row in rows:
        dots = [
            (place(run.value), f"{run.seed}: {metric_text(page.metric, run.value)}")
            for run in row.runs
            if run.value is not None and math.isfinite(run.value)
        ]
        ends = None
        if row.mean is not None and math.isfinite(row.mean[1]):
            ends = place(row.mean[1]), place(row.mean[2])
        cells.append(
            {"row": row, "dots": dots, "interval": ends, "style": styles[row.arm]}
        )
    return {
        "case": case,
        "ends": (metric_text(page.metric, low), metric_text(page.metric, high)),
        "parts": [cells[:_MOST_ROWS], cells[_MOST_ROWS:]] if page.trials else [cells],
        "has_chosen": any(row.chosen for row in rows),
        "has_strips": any(len(cell["dots"]) > 1 or cell["interval"] for cell in cells),
    }


def _forests(page: SweepPage) -> list[dict[str, Any]]:
    """Returns a forest plot of differences from the baseline for each case."""
    found = []
    for case, rows in page.cases.items():
        compared = [(row, row.difference) for row in rows if row.difference is not None]
        if not compared:
            continue
        sizes = [abs(d[0]) for _, d in compared if math.isfinite(d[0])]
        finite = [abs(v) for _, d in compared for v in d if math.isfinite(v)]
        most = max(finite, default=0.0)
        reach = 1.05 * min(most, _REACH * max(sizes, default=0.0) or most) or 1.0

        def place(value: float, reach: float = reach) -> float:
            return min(max((value + reach) / (2 * reach), 0.0), 1.0)

        bars = [
            {
                "row": row,
                "dot": place(mean) if math.isfinite(mean) else None,
                "bar": (place(low), place(high)) if math.isfinite(low) else None,
            }
            for row, (mean, low, high) in compared
        ]
        is_share = formats.is_share(page.metric)
        end = f"{100 * reach:.3g} points" if is_share else f"{reach:.3g}"
        found.append({"case": case, "bars": bars, "ends": (f"−{end}", f"+{end}")})
    return found


def _curves(page: SweepPage, styles: Mapping[str, str]) -> list[Chart]:
    """Returns learning curves with bands for each case."""
    found = []
    for case, rows in page.cases.items():
        series = {
            row.arm: [run.curve for run in row.runs if run.curve is not None]
            for row in rows
        }
        series = {
            arm: runs for arm, runs in series.items() if any(len(s) for s, _ in runs)
        }
        if series:
            title = case or metric_title(page.curve_metric)
            found.append(band_curves(series, page.curve_metric, title, styles))
    return found


def _trial_curves(page: SweepPage) -> list[Chart]:
    """Returns the chart of the learning curves of all trials."""
    series = [
        (at == 0, *run.curve)
        for at, row in enumerate(page.rows)
        for run in row.runs[:1]
        if run.curve is not None and len(run.curve[0])
    ][:_MOST_CURVES]
    if not series:
        return []
    return [many_curves(series, page.curve_metric, epoch=None, what="trial")]


def _costs(
    page: SweepPage, columns: Sequence[str], styles: Mapping[str, str]
) -> list[tuple[str, list[Chart]]]:
    """Returns, for each case, a chart for each cost that differs between arms."""
    found = []
    for case, rows in page.cases.items():
        rows = [row for row in rows if row.mean and math.isfinite(row.mean[0])]
        charts = []
        for name in columns:
            points = [
                (row.arm, *row.costs[name][:1], row.mean, row.costs[name][1])
                for row in rows
                if name in row.costs and row.mean is not None
            ]
            if len({cost for _, cost, *_ in points}) > 1:
                title = f"{name} (s)" if name.endswith("time") else name
                charts.append(costs_chart(points, page.metric, title, styles))
        if charts:
            found.append((case, charts))
    return found


def _cost_tables(
    page: SweepPage, columns: Sequence[str]
) -> list[tuple[str, list[ArmRow]]]:
    """Returns each case with its arms that have costs."""
    if page.trials or not columns:
        return []
    found = {case: [r for r in rows if r.costs] for case, rows in page.cases.items()}
    return [(case, rows) for case, rows in found.items() if rows]


def _progress(page: SweepPage) -> Chart | None:
    values = [(t.number, t.value, f"trial {t.number}", t.is_early) for t in page.trials]
    return progress_chart(values, page.metric) if values else None


def _slices(page: SweepPage) -> list[Chart]:
    """Returns a chart for each parameter of a search."""
    found = []
    for parameter in page.parameters:
        points = [
            (t.params[parameter.name], t.value, f"trial {t.number}", t.is_early)
            for t in page.trials
            if parameter.name in t.params
            and t.value is not None
            and math.isfinite(t.value)
        ]
        if points:
            found.append(
                slice_chart(
                    points, page.metric, parameter.label,
                    log=parameter.is_log, options=parameter.options,
                )
            )  # fmt: skip
    return found
