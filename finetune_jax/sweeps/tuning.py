"""Tables and notes about the values that tuning tried."""

import json
import math
from collections.abc import Mapping
from typing import Any

from finetune_jax.report.html.formats import metric_text
from finetune_jax.report.tables import first_of, short_labels
from finetune_jax.sweeps.members import as_plain
from finetune_jax.sweeps.schedule import Wanted


def values_text(values: Mapping[str, Any]) -> str:
    """Returns values of config keys as text.

    >>> values_text({"plan[0].peak_lr": 0.1, "data.augment": ["flip"]})
    'peak_lr 0.1, augment ["flip"]'
    """
    return ", ".join(
        f"{label} {value if isinstance(value, str) else json.dumps(value)}"
        for label, value in zip(
            short_labels(list(values)), values.values(), strict=True
        )
    )


def tuning_table(wanted: Wanted) -> list[list[str]]:
    """Returns the heading, and a row for each combination of values; [] without tuning.

    The mean is that of the metric that chooses, over the tuning seeds.
    """
    has_cases = any(one.case for one in wanted.tuning)
    rows = [["case", "arm", "values", "chosen by", "mean", ""]]
    for one in wanted.tuning:
        mean = "failed" if one.has_failed else "–"
        if one.mean is not None:
            mean = metric_text(one.metric, one.mean)
        is_chosen = wanted.tuned.get((one.arm, one.case)) == one.values
        values = values_text(as_plain(one.values))
        last = "chosen" if is_chosen else ""
        rows.append([one.case, one.arm, values, one.metric, mean, last])
    return [row[not has_cases :] for row in rows] if wanted.tuning else []


def tuning_notes(wanted: Wanted) -> list[str]:
    """Returns a note for each value at the edge of those tried that was chosen."""
    tried: dict[tuple[str, str], dict[str, set[float]]] = {}
    for one in wanted.tuning:
        for key, value in one.values.items():
            if type(value) in (int, float) and math.isfinite(value):
                own = tried.setdefault((one.arm, one.case), {})
                own.setdefault(key, set()).add(value)
    arms: dict[str, list[str]] = {}
    for (arm, case), own in tried.items():
        chosen = wanted.tuned.get((arm, case), {})
        for key, values in own.items():
            value = chosen.get(key)
            if len(values) < 2 or value not in (min(values), max(values)):
                continue
            end = "largest" if value == max(values) else "smallest"
            text = f"{key}={value:g}, the {end} of the {len(values)} values tried,"
            arms.setdefault(text, []).append(f"{arm} ({case})" if case else arm)
    return [
        f"{text} was chosen for {first_of(names)}; values beyond it may be better"
        for text, names in arms.items()
    ]
