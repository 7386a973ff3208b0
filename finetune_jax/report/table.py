"""The table of a population: what its members came to, with intervals over seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from finetune_jax.grid import Overrides
from finetune_jax.metrics import higher_is_better


def table(
    population: Sequence[Overrides], results: Sequence[Mapping[str, Any]], metric: str
) -> list[dict[str, Any]]:
    """Returns a row for members that differ in seeds only, the best mean first.

    Args:
        population: What each member overrides.
        results: Of each.
        metric: By which they are in order.

    Returns:
        'settings', 'members' (their numbers), and under 'mean' and 'interval_95' each
        metric of the best states; the interval is half of that of the mean by Student's
        t, None of a single member.
    """
    groups: dict[Overrides, list[int]] = {}
    for number, overrides in enumerate(population):
        kept = [pair for pair in overrides if not pair[0].startswith("seed")]
        groups.setdefault(tuple(kept), []).append(number)
    rows = []
    for settings, members in groups.items():
        values = {
            name: np.array([results[number]["best"][name] for number in members])
            for name in results[0]["best"]
        }
        rows.append(
            {
                "settings": dict(settings),
                "members": members,
                "mean": {name: float(np.mean(v)) for name, v in values.items()},
                "interval_95": {name: interval(v) for name, v in values.items()},
            }
        )
    sign = -1 if higher_is_better(metric) else 1
    return sorted(rows, key=lambda row: sign * row["mean"][metric])


def interval(values: np.ndarray) -> float | None:
    """Returns half the 95 % interval of a mean, by Student's t; None of one value."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stdtrit(len(values) - 1, 0.975) * error)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a table as text, a line each."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    names = list(rows[0]["mean"])
    heading = [text for name in names for text in (name, f"{name} +- 95%")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "members", *heading])
    for row in rows:
        numbers = [(row["mean"][name], row["interval_95"][name]) for name in names]
        writer.writerow(
            [
                *(row["settings"].get(key, "") for key in keys),
                len(row["members"]),
                *("" if n is None else f"{n:.6g}" for pair in numbers for n in pair),
            ]
        )
    return text.getvalue()
