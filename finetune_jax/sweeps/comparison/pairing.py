"""Pairs of runs by seed, and of their scores by test example."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.metric_names import is_of_class
from finetune_jax.core.registry import closest
from finetune_jax.evaluation import per_example
from finetune_jax.report.tables import first_of
from finetune_jax.report.workdir import read_manifest
from finetune_jax.sweeps.comparison.runs import Run

# Entries of the manifest that should be the same, and their names.
SAME = {
    "data_fingerprint": "data",
    "code_sha256": "code of this package",
    "packages": "package versions",
}


def with_metric(
    ours: Sequence[Run], theirs: Sequence[Run], metric: str
) -> tuple[list[Run], list[Run], list[str]]:
    """Returns the runs of both groups that have a metric, and lines about the others.

    Raises:
        UserError: No run of a group has it.
    """
    notes, groups = [], []
    for group in (ours, theirs):
        having, absent = with_value(group, metric)
        if not having:
            known = {name for run in group for name in run.result.get("best") or ()}
            listed = ", ".join(sorted(name for name in known if not is_of_class(name)))
            folders = ", ".join(str(run.folder) for run in group) or "no run"
            raise UserError(
                f"--metric: no finite value of {metric!r} in {folders}"
                f"{closest(metric, known)}; there is {listed or 'no metric'}"
            )
        notes += absent
        groups.append(having)
    return groups[0], groups[1], notes


def with_value(runs: Sequence[Run], metric: str) -> tuple[list[Run], list[str]]:
    """Returns the runs with a finite value of a metric, and lines about the others."""
    having = [run for run in runs if run.value(metric) is not None]
    absent = [run for run in runs if run.value(metric) is None]
    notes = [
        f"{run.folder}: {_seed(run)} has no finite {metric}; left out" for run in absent
    ]
    return having, notes


def paired(
    ours: Sequence[Run], theirs: Sequence[Run]
) -> tuple[list[tuple[Run, Run]], list[str]]:
    """Returns the pairs of runs with the same seed, and lines about the others.

    Raises:
        UserError: No seed is in both groups, or one is twice in a group.
    """
    if len(ours) == len(theirs) == 1:
        told = [f"the seeds differ: {_seed(ours[0])} and {_seed(theirs[0])}"]
        return [(ours[0], theirs[0])], told if ours[0].seed != theirs[0].seed else []
    groups, problems = [], []
    for group in (ours, theirs):
        by_seed: dict[Any, Run] = {}
        for run in group:
            other = by_seed.setdefault(tuple(sorted(run.seed)), run)
            if other is not run:
                problems.append(f"{run.folder} and {other.folder}: both {_seed(run)}")
        groups.append(by_seed)
    raise_if(problems, "Runs of one configuration need different seeds:")
    mine, other = groups
    common = sorted(mine.keys() & other.keys())
    if not common:
        listed = [", ".join(map(_seed, group.values())) for group in (mine, other)]
        raise UserError(
            f"The seeds do not pair: {listed[0]}, against {listed[1]}. Run both with the "
            "same seeds."
        )
    alone = [run for seed, run in (*mine.items(), *other.items()) if seed not in common]
    notes = [f"{run.folder}: {_seed(run)} has no pair; left out" for run in alone]
    return [(mine[seed], other[seed]) for seed in common], notes


def _seed(run: Run) -> str:
    """Returns the seed of a run as a person reads it."""
    if not run.seed:
        return "an unknown seed"
    numbers = {number for _, number in run.seed}
    if len(numbers) == 1:
        return f"seed {numbers.pop()}"
    return "seed " + ", ".join(f"{source} {number}" for source, number in run.seed)


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns lines about data, code and packages that are not the same in all runs."""
    manifests = [read_manifest(run.folder) or {} for run in runs]
    notes = []
    for key, name in SAME.items():
        known = [str(manifest[key]) for manifest in manifests if manifest.get(key)]
        if len(set(known)) > 1:
            other = next(
                run.folder
                for run, manifest in zip(runs, manifests)
                if manifest.get(key) and str(manifest[key]) != known[0]
            )
            notes.append(f"{other} had other {name} than {runs[0].folder}")
    return notes


def paired_scores(
    pairs: Sequence[tuple[Run, Run]], metric: str
) -> tuple[np.ndarray | None, list[str]]:
    """Returns the scores [S, 2, E] of examples that all runs have; None without.

    Raises:
        UserError: No example is common to all runs, nor to those of each pair.
    """
    runs = [run for pair in pairs for run in pair]
    files = [per_example.read(run.folder) for run in runs]
    absent = [str(run.folder) for run, one in zip(runs, files) if one is None]
    if absent:
        return None, [
            f"compared over seeds alone: no {per_example.FILE} in {first_of(absent)}"
        ]
    found = [
        per_example.scores_of(one or {}, run.name_of(metric))
        for run, one in zip(runs, files)
    ]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None, [f"compared over seeds alone: {_no_scores(files, metric)}"]
    common = known[0][0]
    for ids, _ in known[1:]:
        if not np.array_equal(ids, common):
            common = np.intersect1d(common, ids)
    notes = []
    if any(len(ids) != len(common) for ids, _ in known):
        if all(_same(known[at][0], known[at + 1][0]) for at in range(0, len(known), 2)):
            return None, [
                "compared over seeds alone: each seed has other test examples"
            ]
        if not len(common):
            raise UserError(
                f"{runs[0].folder} and {runs[1].folder} were measured on other test "
                "examples, or with other labels; evaluate both on the same data"
            )
        sizes = sorted({len(ids) for ids, _ in known})
        notes.append(
            f"compared on the {len(common):,} test examples that all runs have, of "
            + " and ".join(f"{size:,}" for size in sizes)
        )
    rows = []
    for ids, scores in known:
        order = np.argsort(ids)
        rows.append(scores[order[np.searchsorted(ids[order], np.sort(common))]])
    return np.stack(rows).reshape(len(pairs), 2, -1), notes


def _no_scores(files: Sequence[Mapping[str, Any] | None], metric: str) -> str:
    """Returns why runs have no scores of a metric."""
    recorded = {name.partition("/")[0] for one in files if one for name in one}
    if metric.partition("/")[0] not in recorded:
        splits = " and ".join(sorted(recorded)) or "no"
        return f"{per_example.FILE} has scores of the {splits} split, not of {metric}"
    return f"{metric} is no mean over single examples"


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) == len(other) and bool(np.array_equal(np.sort(one), np.sort(other)))
