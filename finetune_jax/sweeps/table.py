"""The result table of a sweep: a row for each arm in each case, or for each trial."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.metric_names import higher_is_better, is_bounded, is_of_class
from finetune_jax.evaluation import per_example
from finetune_jax.sweeps import statistics
from finetune_jax.sweeps.comparison import (
    Best,
    Comparison,
    Run,
    best_of,
    compare_each,
    with_value,
)
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import Wanted
from finetune_jax.sweeps.tuning import tuning_notes, tuning_table

NOT_TUNED = "no tuning run gave a value to choose by"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of an arm in a case, or those of a trial.

    Attributes:
        case: Name of the case.
        arm: Name of the arm.
        chosen: Values that were chosen for it: the tuned ones, or those of the trial.
        members: Members of the runs, in the order of seeds.
        runs: Finished runs, in the same order.
        missing: Number of runs that have not ended.
        failed: Number of runs that failed.
        pruned: Whether it is a trial that was ended early.
        estimate: Mean of the metric with its interval; None without runs.
        comparison: Comparison with the baseline.
        problem: Why there is no comparison, or no run; '' if there is no reason.
    """

    case: str
    arm: str
    chosen: Mapping[str, Any]
    members: Sequence[Member]
    runs: Sequence[Run]
    missing: int
    failed: int
    pruned: bool = False
    estimate: statistics.Estimate | None = None
    comparison: Comparison | None = None
    problem: str = ""

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """Content of `result.json` of each finished run."""
        return [run.result for run in self.runs]

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric that all finished runs have."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            for name, value in result["best"].items():
                if value is not None and not is_of_class(name):
                    found.setdefault(name, []).append(value)
        return {
            name: math.fsum(values) / len(values)
            for name, values in found.items()
            if len(values) == len(self.runs)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a sweep.

    Attributes:
        metric: Metric that decides.
        baseline: Arm that the others are compared with; None for a search.
        rows: Rows by case, the best first.
        best: Best arm of each case with at least three arms that have a mean.
        notes: Lines about what limits the comparisons.
        tuning: Heading and rows about the values that tuning tried.
    """

    metric: str
    baseline: str | None
    rows: Sequence[Row]
    best: Mapping[str, Best] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    tuning: Sequence[Sequence[str]] = ()

    @property
    def cases(self) -> dict[str, list[Row]]:
        """Rows of each case."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, []).append(row)
        return found


def table_of(folder: SweepFolder, wanted: Wanted) -> Table:
    """Returns the table of the runs that have finished.

    Args:
        folder: Folder of the sweep.
        wanted: Members that are known by now.
    """
    sweep = folder.sweep
    if sweep.search is not None:
        metric = sweep.search.metric
        found = [_row(folder, wanted, "", arm, metric) for arm in _trials(wanted)]
        return Table(metric=metric, baseline=None, rows=_best_first(found, metric))
    rows, notes, best = list[Row](), dict[str, None](), dict[str, Best]()
    for case in sweep.cases:
        found = [
            _row(folder, wanted, case, arm, sweep.metric) for arm in sweep.all_arms
        ]
        found = _compared(found, sweep.the_baseline, sweep.metric)
        for row in found:
            notes |= dict.fromkeys(with_value(row.runs, sweep.metric)[1])
            if row.comparison is not None:
                notes |= dict.fromkeys(row.comparison.notes)
        found = _best_first(found, sweep.metric)
        runs = {row.arm: row.runs for row in found if row.estimate is not None}
        if len(runs) > 2:
            best[case] = best_of(runs, next(iter(runs)), sweep.metric)
        rows += found
    return Table(
        metric=sweep.metric,
        baseline=sweep.the_baseline,
        rows=rows,
        best=best,
        # Tables of the same sweep in other folders are the same.
        notes=[
            *_collapsed([note.replace(f"{folder.root}/", "") for note in notes]),
            *tuning_notes(wanted),
        ],
        tuning=tuning_table(wanted),
    )


def _collapsed(notes: Sequence[str]) -> list[str]:
    """Returns notes, of those that differ in their runs alone the first one.

    >>> _collapsed(["0123456789ab: seed 1 has no pair", "f123456789ab: seed 2 has no pair"])
    ['0123456789ab: seed 1 has no pair (and 1 more note like this)']
    """
    alike: dict[str, list[str]] = {}
    for note in notes:
        kind = re.sub(r"(\b[0-9a-f]{12}\b(, )?)+( and \d+ more)?|\d+", "", note)
        alike.setdefault(kind, []).append(note)
    found = []
    for first, *others in alike.values():
        s = "s" if len(others) > 1 else ""
        more = f" (and {len(others)} more note{s} like this)" if others else ""
        found.append(first + more)
    return found


def _trials(wanted: Wanted) -> list[str]:
    """Returns the names of trials, in order."""
    return list(dict.fromkeys(m.arm for m in wanted.labelled if m.stage == "trial"))


def _row(folder: SweepFolder, wanted: Wanted, case: str, arm: str, metric: str) -> Row:
    """Returns the row of an arm, or of a trial, without its comparison."""
    members = [
        member
        for member in wanted.labelled
        if member.stage in ("final", "trial")
        and (member.case, member.arm) == (case, arm)
    ]
    members.sort(key=lambda member: folder.sweep.all_seeds.index(member.seed))
    ended = [folder.outcome(member.key) for member in members]
    names = {metric: folder.sweep.metric_of(arm)} if folder.sweep.search is None else {}
    runs = [
        Run(
            folder=folder.workdir(member.key),
            seed=tuple(sorted(member.seed)),
            result=outcome.result,
            names=names,
        )
        for member, outcome in zip(members, ended)
        if outcome is not None and outcome.state == "complete"
    ]
    number = members[0].trial if members else None
    trial = None if number is None else wanted.trials.get(number)
    chosen = dict(wanted.tuned.get((arm, case), {}))
    if number is not None:
        chosen = dict(members[0].overrides)
    all_failed = "" in chosen
    states = [outcome.state for outcome in ended if outcome is not None]
    wanted_runs = 0 if all_failed else max(len(folder.sweep.all_seeds), len(members))
    is_pruned = trial is not None and trial.state == "pruned"
    return Row(
        case=case,
        arm=arm,
        chosen={} if all_failed else chosen,
        members=members,
        runs=runs,
        missing=0 if trial is not None else wanted_runs - len(states),
        failed=states.count("failed"),
        pruned=is_pruned,
        estimate=None if is_pruned else mean_of(runs, metric),
        problem=NOT_TUNED if all_failed else "",
    )


def mean_of(runs: Sequence[Run], metric: str) -> statistics.Estimate | None:
    """Returns the mean of a metric with its interval; None if no run has the metric.

    The interval is over seeds and test examples, if all runs have scores of the same
    examples, and otherwise over seeds alone.
    """
    having, _ = with_value(runs, metric)
    if not having:
        return None
    extremes = (0.0, 1.0) if is_bounded(metric) else None
    found = []
    for run in having:
        name = run.name_of(metric)
        scores = per_example.scores_of(per_example.read(run.folder) or {}, name)
        if scores is None:
            break
        order = np.argsort(scores[0])
        found.append((scores[0][order], scores[1][order]))
    same = found and all(np.array_equal(found[0][0], ids) for ids, _ in found)
    if len(found) < len(having) or not same:
        values = np.array([run.value(metric) for run in having], np.float64)
        mean = statistics.estimate(values[:, None])
    else:
        scores_SxE = np.stack([scores for _, scores in found]).astype(np.float64)
        mean = statistics.estimate(scores_SxE, extremes=extremes)
    return mean.clipped(*extremes) if extremes else mean


def _compared(rows: Sequence[Row], baseline: str, metric: str) -> list[Row]:
    """Returns rows of one case with their comparisons, adjusted for their number."""
    by_arm = {row.arm: row for row in rows}
    runs = {row.arm: row.runs for row in rows if row.runs}
    found, problems = dict[str, Comparison](), dict[str, list[str]]()
    if baseline in runs:
        found, problems = compare_each(runs, baseline, metric)
    for row in rows:
        if row.arm != baseline and not (row.runs and baseline in runs):
            without = by_arm[baseline] if row.runs else row
            problems[row.arm] = [_without_runs(without, is_own=without is row)]
    return [
        dataclasses.replace(
            row,
            comparison=found.get(row.arm),
            problem=row.problem or "; ".join(problems.get(row.arm, ())),
        )
        for row in rows
    ]


def _without_runs(row: Row, *, is_own: bool) -> str:
    """Returns why an arm has no finished run.

    Args:
        row: Row of the arm.
        is_own: Whether the line is about this arm, so that it need not name it.
    """
    if row.problem:
        return row.problem if is_own else f"{row.arm}: {row.problem}"
    of = "" if is_own else f" of {row.arm}"
    if not row.missing:
        count = f"all {row.failed} runs" if row.failed > 1 else "the only run"
        return f"{count}{of} failed"
    failed = f" ({row.failed} failed, {row.missing} missing)" if row.failed else ""
    return f"no run{of} has finished{failed}"


def _best_first(rows: Sequence[Row], metric: str) -> list[Row]:
    """Returns rows by their means; those without one are last."""
    sign = -1 if higher_is_better(metric) else 1

    def key(row: Row) -> float:
        if row.estimate is None or math.isnan(row.estimate.mean):
            return math.inf
        return sign * row.estimate.mean

    return sorted(rows, key=key)


def metric_names(table: Table) -> list[str]:
    """Returns the metrics that rows have, the one that decides first."""
    found = itertools.chain.from_iterable(row.means() for row in table.rows)
    return list(dict.fromkeys([table.metric, *found]))
