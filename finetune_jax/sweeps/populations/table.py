"""The result table of a population, with intervals over seeds."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from finetune_jax.config.grids import Overrides
from finetune_jax.core.metric_names import higher_is_better


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
