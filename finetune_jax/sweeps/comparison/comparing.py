"""Comparisons of groups of runs, by the examples and seeds that they share."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.metric_names import higher_is_better, is_bounded
from finetune_jax.sweeps import statistics
from finetune_jax.sweeps.comparison.answer import Comparison
from finetune_jax.sweeps.comparison.pairing import (
    differing,
    paired,
    paired_scores,
    with_metric,
)
from finetune_jax.sweeps.comparison.runs import Run


def compare(
    ours: Sequence[Run], theirs: Sequence[Run], metric: str, *, level: float = 0.95
) -> Comparison:
    """Returns the comparison of two groups of runs.

    Runs are paired by seed; two single runs are a pair whatever their seeds. Where all
    runs have scores of the metric for the same examples, these are paired, too.

    Args:
        ours: Runs of one configuration.
        theirs: Runs of another one.
        metric: Name of the metric, of the best state of each run.
        level: Coverage of intervals.

    Raises:
        UserError: No run has the metric, the seeds do not pair, or the runs were measured
            on other examples.
    """
    ours, theirs, notes = with_metric(ours, theirs, metric)
    pairs, found = paired(ours, theirs)
    runs = [run for pair in pairs for run in pair]
    notes += [*found, *differing(runs)]
    scores, found = paired_scores(pairs, metric)
    notes += found
    values = np.array([[run.value(metric) for run in pair] for pair in pairs], float)
    by_seed = values[:, 0] - values[:, 1]
    if scores is None:
        estimate = statistics.estimate(by_seed[:, None], level=level)
    else:
        difference = scores[:, 0] - scores[:, 1]
        values, by_seed = scores.mean(axis=2), difference.mean(axis=1)
        extremes = (-1.0, 1.0) if is_bounded(metric) else None
        estimate = statistics.estimate(difference, level=level, extremes=extremes)
    if estimate.is_widened:
        notes.append("nearly all examples have the same score, so the interval is wide")
    if is_bounded(metric):
        estimate = estimate.clipped(-1.0, 1.0)
    sign = 1 if higher_is_better(metric) else -1
    is_finite = bool(np.isfinite(by_seed).all())
    return Comparison(
        metric=metric,
        ours=float(values[:, 0].mean()),
        theirs=float(values[:, 1].mean()),
        estimate=estimate,
        improvement=statistics.improvement(sign * by_seed, level=level),
        seed_p_value=statistics.sign_flip_test(by_seed) if is_finite else math.nan,
        level=level,
        same_seed=all(a.seed == b.seed for a, b in pairs),
        notes=tuple(notes),
        **needs(estimate, level),
    )


def needs(estimate: statistics.Estimate, level: float) -> dict[str, Any]:
    """Returns `more_seeds`, `more_examples` and `detectable` of a comparison.

    Args:
        estimate: Difference.
        level: Coverage of the interval that decides.
    """
    if math.isnan(estimate.p_value):
        return {}
    seeds, examples = estimate.seeds, estimate.examples
    given: Any = (estimate.mean, estimate.components)
    wanted = statistics.seeds_needed(*given, examples=examples, level=level)
    rows = statistics.examples_needed(*given, seeds=seeds, level=level)
    size: Any = {"seeds": seeds, "examples": examples, "level": level}
    return {
        "more_seeds": None if wanted is None else max(wanted - seeds, 1),
        "more_examples": (
            None if rows is None or examples == 1 else max(rows - examples, 1)
        ),
        "detectable": statistics.detectable(estimate.components, **size),
    }


def compare_each(
    groups: Mapping[str, Sequence[Run]],
    baseline: str,
    metric: str,
    *,
    level: float = 0.95,
) -> tuple[dict[str, Comparison], dict[str, list[str]]]:
    """Returns the comparison of each group with the baseline, p-values adjusted by Holm.

    Beside them, it returns the problems of each group that cannot be compared.

    Args:
        groups: Runs by the name of their configuration.
        baseline: Name of the group that the others are compared with.
        metric: Name of the metric.
        level: Coverage of intervals, which are not adjusted.
    """
    found, problems = {}, {}
    for name, runs in groups.items():
        if name == baseline:
            continue
        try:
            found[name] = compare(runs, groups[baseline], metric, level=level)
        except UserError as error:
            problems[name] = list(map(str, error.problems))
    return _adjusted(found), problems


def compare_all(
    groups: Mapping[str, Sequence[Run]],
    baseline: str,
    metric: str,
    *,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Returns the comparisons of `compare_each`, if there are no problems.

    Raises:
        UserError: Lists the groups that cannot be compared.
    """
    found, problems = compare_each(groups, baseline, metric, level=level)
    raise_if(
        [
            f"{name} and {baseline}: {one}"
            for name, all in problems.items()
            for one in all
        ],
        "Runs cannot be compared:",
    )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best of several groups of runs.

    Attributes:
        name: Name of the group.
        comparisons: Comparison of each other group with it, adjusted for their number.
        problems: Why a group cannot be compared with it, by name.
    """

    name: str
    comparisons: Mapping[str, Comparison]
    problems: Mapping[str, Sequence[str]]

    @property
    def rivals(self) -> list[str]:
        """Names of the groups that are not told apart from the best one."""
        known = self.comparisons.items()
        return [name for name, one in known if one.verdict != "worse"]

    def sentence(self) -> str:
        """Returns which groups are worse than the best one."""
        answer = f"{self.name} is better than all others"
        if self.rivals or not self.comparisons:
            answer = f"{self.name} has the best mean"
        if self.rivals:
            answer += f"; not told apart from it: {', '.join(self.rivals)}"
        if self.problems:
            answer += f"; cannot be compared with it: {', '.join(self.problems)}"
        return answer


def best_of(groups: Mapping[str, Sequence[Run]], best: str, metric: str) -> Best:
    """Returns the comparisons of the group with the best mean with all others.

    Args:
        groups: Runs by the name of their configuration.
        best: Name of the group with the best mean.
        metric: Name of the metric.
    """
    found, problems = compare_each(groups, best, metric)
    return Best(name=best, comparisons=found, problems=problems)


def _adjusted(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Returns comparisons with p-values that are adjusted for their number by Holm.

    Args:
        comparisons: Comparisons with the same runs, by name.
    """
    found = dict(comparisons)
    if len(found) < 2:
        return found
    p_values = statistics.holm([one.p_value for one in found.values()])
    for (name, one), p_value in zip(comparisons.items(), p_values):
        # The level at which this comparison alone would have to be decided.
        share = one.p_value / p_value if p_value else 1.0
        more = needs(one.estimate, 1 - (1 - one.level) * share)
        found[name] = dataclasses.replace(one, adjusted=p_value, **more)
    return found


def spread(
    runs: Sequence[Run], metric: str, *, level: float = 0.95
) -> dict[str, statistics.Spread]:
    """Returns the spread of a metric that each source of randomness causes.

    Args:
        runs: Runs of one configuration, whose seeds differ in one source at a time, as
            those of `sweeps.by_source` do; otherwise only the spread over all is known.
        metric: Name of the metric.
        level: Coverage of the intervals.
    """
    values = {run.seed: run.value(metric) for run in runs}
    known: dict[Any, float] = {k: v for k, v in values.items() if v is not None}
    return statistics.spread_by_source(known, level=level)
