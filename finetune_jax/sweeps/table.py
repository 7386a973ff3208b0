"""The result table of a population, with intervals over seeds."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from finetune_jax.config.grids import Overrides
from finetune_jax.core.files import write_text
from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.report.tables import aligned
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import Wanted


def table(
    population: Sequence[Overrides], results: Sequence[Mapping[str, Any]], metric: str
) -> list[dict[str, Any]]:
    """Returns a row for members that differ in seeds only, the best mean first.

    Args:
        population: Overrides of each member.
        results: Result of each member.
        metric: Metric that orders the rows.

    Returns:
        Rows with 'settings', 'members' (their numbers), and under 'mean' and
        'interval_95' each metric of the best states; the interval is half of the 95 %
        interval of the mean by Student's t, None for a single member. 'failed' are
        members without metrics; a row whose members all failed has no means and is last.
    """
    groups: dict[Overrides, list[int]] = {}
    for number, overrides in enumerate(population):
        kept = [pair for pair in overrides if not pair[0].startswith("seed")]
        groups.setdefault(tuple(kept), []).append(number)
    rows = []
    for settings, members in groups.items():
        failed = [number for number in members if "failed" in results[number]]
        found = [results[n]["best"] for n in members if n not in failed]
        names = found[0] if found else ()
        values = {name: np.array([best[name] for best in found]) for name in names}
        rows.append(
            {
                "settings": dict(settings),
                "members": members,
                "failed": failed,
                "mean": {name: float(np.mean(v)) for name, v in values.items()},
                "interval_95": {name: interval(v) for name, v in values.items()},
            }
        )
    sign = -1 if higher_is_better(metric) else 1
    return sorted(rows, key=lambda row: sign * row["mean"].get(metric, sign * math.inf))


def interval(values: np.ndarray) -> float | None:
    """Returns half the 95 % interval of a mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stdtrit(len(values) - 1, 0.975) * error)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a table as CSV."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    names = list(rows[0]["mean"])  # The first row has some if any has.
    heading = [text for name in names for text in (name, f"{name} +- 95%")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "members", "failed", *heading])
    for row in rows:
        numbers = [
            (row["mean"].get(name), row["interval_95"].get(name)) for name in names
        ]
        writer.writerow(
            [
                *(row["settings"].get(key, "") for key in keys),
                len(row["members"]),
                len(row["failed"]),
                *("" if n is None else f"{n:.6g}" for pair in numbers for n in pair),
            ]
        )
    return text.getvalue()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of an arm in a case.

    Attributes:
        case: Name of the case.
        arm: Name of the arm.
        tuned: Values that were chosen for it.
        members: Its members that are complete, in the order of seeds.
        results: Content of `result.json` of each.
        missing: Number of members that are not complete.
    """

    case: str
    arm: str
    tuned: Mapping[str, Any]
    members: Sequence[Member]
    results: Sequence[Mapping[str, Any]]
    missing: int

    def values(self, metric: str) -> np.ndarray:
        """Returns a metric of the best states, a number for each run that has it."""
        found = [result["best"].get(metric) for result in self.results]
        return np.array([value for value in found if value is not None], float)


def rows_of(folder: SweepFolder, wanted: Wanted) -> list[Row]:
    """Returns a row for each arm, or trial, in each case."""
    grouped: dict[tuple[str, str], list[Member]] = {}
    for member in wanted.members:
        if member.stage in ("final", "trial"):
            grouped.setdefault((member.case, member.arm), []).append(member)
    rows = []
    for (case, arm), members in grouped.items():
        ended = [(m, folder.outcome(m.key)) for m in members]
        done = [(m, o.result) for m, o in ended if o and o.state == "complete"]
        done.sort(key=lambda pair: pair[0].seed)
        rows.append(
            Row(
                case=case,
                arm=arm,
                tuned=wanted.tuned.get((arm, case), {}),
                members=[member for member, _ in done],
                results=[result for _, result in done],
                missing=len(members) - len(done),
            )
        )
    return rows


def write_tables(folder: SweepFolder, name: str, wanted: Wanted) -> list[str]:
    """Writes `table.csv` of a sweep; returns lines for a person."""
    metric = folder.sweep.search.metric if folder.sweep.search else folder.sweep.metric
    sign = -1 if higher_is_better(metric) else 1

    def key(row: Row) -> tuple:
        values = row.values(metric)
        return row.case, sign * float(np.mean(values)) if len(values) else math.inf

    text, lines = io.StringIO(), [("case", "arm", "runs", metric)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "arm", "tuned", "runs", "missing", metric, "interval_95"])
    for row in sorted(rows_of(folder, wanted), key=key):
        values = row.values(metric)
        mean = f"{np.mean(values):.6g}" if len(values) else ""
        half = interval(values) if len(values) else None
        spread = "" if half is None else f"{half:.6g}"
        tuned = json.dumps(dict(row.tuned)) if row.tuned else ""
        cells = [row.case, row.arm, tuned, len(row.results), row.missing, mean, spread]
        writer.writerow(cells)
        lines.append((row.case, row.arm, str(len(row.results)), f"{mean} ± {spread}"))
    write_text(folder.root / "table.csv", text.getvalue())
    return aligned(lines)
