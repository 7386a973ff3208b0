"""Comparison of workdirs that a user names."""

import os
import pathlib
import string
from collections.abc import Mapping, Sequence

from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.report.tables import aligned
from finetune_jax.report.workdir import read_json
from finetune_jax.sweeps.comparison.comparing import compare_all
from finetune_jax.sweeps.comparison.runs import COSTS, Run, costs, open_run


def compare_workdirs(paths: Sequence[str], metric: str | None = None) -> list[str]:
    """Returns lines that compare workdirs with the first one.

    Args:
        paths: A workdir each, or several that differ in their seed alone: separated by
            commas, or all workdirs in a folder such as `by_arm/CASE/ARM` of a sweep.
        metric: Name of the metric; None is that of `evaluate.best` on the test split, or
            else the first metric of the test split.

    Raises:
        UserError: Lists the workdirs that cannot be compared, and why.
    """
    if len(paths) < 2:
        raise UserError("compare: give at least two workdirs")
    groups, problems = {}, list[Problem | str]()
    for name, path in zip(_names(paths), paths):
        try:
            groups[name] = [open_run(folder) for folder in _folders(path)]
        except UserError as error:
            problems += error.problems
    raise_if(problems, "Runs cannot be compared:")
    first, *others = groups
    metric = metric or _metric(groups[first][0])
    found = compare_all(groups, first, metric)
    pairs = {name: one.pairs for name, one in found.items()}
    pairs[first] = min(pairs.values())
    lines = [*_table(groups, metric, pairs), ""]
    lines += [found[name].sentence((name, first)) for name in others]
    notes = dict.fromkeys(note for one in found.values() for note in one.notes)
    lines += [f"note: {note}" for note in notes]
    if len(others) > 1:
        lines.append(
            f"p-values are adjusted for {len(others)} comparisons (Holm), intervals are "
            "not"
        )
    return lines


def _names(paths: Sequence[str]) -> list[str]:
    """Returns names of groups of workdirs: where their paths differ, or else letters."""
    given = [_given(path) for path in paths]
    if len(set(map(tuple, given))) < len(given):
        raise UserError("compare: the same workdir twice", *paths)
    common = [
        pathlib.Path(os.path.commonpath([path.absolute() for path in group])).parts
        for group in given
    ]
    start = len(os.path.commonprefix(common))
    common = [path[start:] for path in common]
    end = len(os.path.commonprefix([path[::-1] for path in common]))
    names = ["/".join(path[: len(path) - end]) for path in common]
    if len(set(names)) == len(names) and all(names):
        return names
    return list(string.ascii_uppercase[: len(paths)])


def _given(path: str) -> list[pathlib.Path]:
    """Returns the folders of an argument, whose name may contain a comma itself."""
    whole = pathlib.Path(path)
    if whole.is_dir() or "," not in path:
        return [whole]
    return [pathlib.Path(one) for one in path.split(",") if one] or [whole]


def _folders(path: str) -> list[pathlib.Path]:
    """Returns the workdirs that an argument names.

    Raises:
        UserError: It is the folder of a sweep.
    """
    given = _given(path)
    if len(given) == 1 and not (given[0] / "config.json").is_file():
        if (given[0] / "sweep.json").is_file():
            raise UserError(f"{path}: is a sweep; give folders by_arm/CASE/ARM in it")
        inside = sorted(place.parent for place in given[0].glob("*/result.json"))
        return inside or given
    return given


def _metric(run: Run) -> str:
    """Returns the metric by which a run is compared if the user names none."""
    known = list(run.result.get("best") or ())
    config = read_json(run.folder / "config.json") or {}
    chosen = str((config.get("evaluate") or {}).get("best")).partition("/")[2]
    tests = [name for name in known if name.startswith("test/")]
    candidates = [f"test/{chosen}", *tests, *known]
    found = next((name for name in candidates if name in known), None)
    if found is None:
        raise UserError(f"{run.folder}: no metrics; its data has no held-out split")
    return found


def _table(
    groups: Mapping[str, Sequence[Run]], metric: str, pairs: Mapping[str, int]
) -> list[str]:
    """Returns the lines of a table: the mean of the metric, and costs.

    Args:
        groups: Runs by name.
        metric: Name of the metric.
        pairs: Number of runs of each group that are compared.
    """
    rows = {name: costs([run.result for run in runs]) for name, runs in groups.items()}
    columns = [c for c in COSTS if any(row[c] is not None for row in rows.values())]
    table = [("", "runs", metric, *columns)]
    for name, runs in groups.items():
        values = [v for run in runs if (v := run.value(metric)) is not None]
        mean = f"{sum(values) / len(values):.4f}" if values else "-"
        cells = ["-" if (v := rows[name][c]) is None else f"{v:,.4g}" for c in columns]
        used = f", {pairs[name]} paired" if pairs[name] < len(runs) else ""
        table.append((name, f"{len(runs)}{used}", mean, *cells))
    return aligned(table)
