"""The page of a population: its settings, its members, and the way to the best one."""

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.metric_names import is_of_class
from finetune_jax.report import plots
from finetune_jax.report.html import formats
from finetune_jax.report.html.charts import many_curves
from finetune_jax.report.html.formats import SPACE, metric_text, metric_title
from finetune_jax.report.html.templates import identity, words_of, write_html
from finetune_jax.report.tables import short_labels

# Most metrics in the table, besides the one that decides.
_METRICS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a population.

    Attributes:
        number: Its number, from 0.
        settings: Config values that it has of its own, the seed among them.
        result: Content of its `result.json`; 'failed' alone if it failed.
        lines: Lines of its `metrics.jsonl`.
    """

    number: int
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    lines: Sequence[dict]

    @property
    def label(self) -> str:
        """Number and settings, in short."""
        names = short_labels(list(self.settings))
        values = zip(names, self.settings.values(), strict=True)
        own = ", ".join(f"{name} {value}" for name, value in values)
        return f"member {self.number:03d}" + (f" ({own})" if own else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationPage:
    """All that the page of a population shows.

    Attributes:
        title: Such as 'resnet20 on digits, 64 members'.
        workdir: Workdir of the population.
        metric: Metric that orders the rows and chooses the best member.
        result: Content of `result.json`: 'population', 'member' and 'wall_s'.
        manifest: Content of `manifest.json`.
        config: Content of `config.json`.
        sizes: Number of examples by split.
        members: All members.
    """

    title: str
    workdir: str
    metric: str
    result: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    members: Sequence[Member]


def write_population_page(page: PopulationPage, path: pathlib.Path) -> None:
    """Writes the page to `report/index.html` of the population's workdir."""
    rows = page.result["population"]
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    splits = ", ".join(f"{size:,} {split}" for split, size in page.sizes.items())
    failed = [member for member in page.members if "failed" in member.result]
    command = page.manifest.get("command") or []
    write_html(
        "population.html.jinja",
        path,
        page=page,
        identity=[
            # Each member has its own seed.
            *(fact for fact in identity(page.manifest, page.workdir)
              if fact[0] != "Seed"),
            ("Examples", splits, ""),
        ],
        tiles=_tiles(page),
        facts=_facts(page, len(failed)),
        heading=list(zip(keys, short_labels(keys), strict=True)),
        names=_names(page),
        rows=[_row(page, row, keys) for row in rows],
        ends=_ends(page),
        curves=_curves(page),
        best=f"../members/{page.result['member']:03d}/report/index.html",
        failed=failed,
        command=shlex.join(words_of(command)),
    )  # fmt: skip


def _names(page: PopulationPage) -> list[str]:
    """Returns the metrics of the table, the one that decides first."""
    split, _, own = page.metric.partition("/")
    others = [s for s in ("validation", "test") if s != split]
    found = dict.fromkeys([page.metric, *(f"{other}/{own}" for other in others)])
    mean = page.result["population"][0]["mean"]
    found |= dict.fromkeys(name for name in mean if not is_of_class(name))
    return [name for name in found if name in mean][: 1 + _METRICS]


def _value_of(member: Member, metric: str) -> float | None:
    value = member.result.get("best", {}).get(metric)
    return value if value is not None and np.isfinite(value) else None


def _tiles(page: PopulationPage) -> list[dict[str, str]]:
    """Returns the metrics of the best setting and those of the best member."""
    row, member = page.result["population"][0], page.result["member"]
    count = len(row["members"]) - len(row["failed"])
    tiles = []
    for name in _names(page)[:2]:
        half = row["interval_95"][name]
        half = metric_text(name, half) if half is not None else ""
        spread = f"95{SPACE}% interval ±{SPACE}{half}" if half else ""
        of = "one member" if count == 1 else f"mean of {count} members"
        tiles.append(
            {
                "label": f"{formats.capitalised(metric_title(name))}, best setting",
                "value": metric_text(name, row["mean"][name]),
                "interval": spread,
                "note": of,
            }
        )
    for name in _names(page)[:2]:
        tiles.append(
            {
                "label": f"{formats.capitalised(metric_title(name))}, best member",
                "value": metric_text(name, page.result["best"].get(name)),
                "interval": "",
                "note": f"member {member:03d}",
            }
        )
    return tiles


def _facts(page: PopulationPage, failed: int) -> list[tuple[str, str, str]]:
    members, settings = len(page.members), len(page.result["population"])
    text = f"{members - failed} finished" + (f", {failed} failed" if failed else "")
    seconds = page.result.get("wall_s")
    found = [
        ("Members", f"{members}", text),
        ("Settings", f"{settings}", "that differ in more than seeds"),
    ]
    if seconds is not None:
        each = f"{formats.time_text(seconds / members)} a member"
        found.append(("Time", formats.time_text(seconds), each))
    if device := page.manifest.get("device_kind"):
        count = page.manifest.get("device_count") or 1
        found.append(("Device", device, f"{count} device{'' if count == 1 else 's'}"))
    return found


def _ends(page: PopulationPage) -> tuple[float, float]:
    """Returns the lowest and the highest value that a member has of the metric."""
    values = [v for m in page.members if (v := _value_of(m, page.metric)) is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _row(
    page: PopulationPage, row: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, Any]:
    """Returns a row of the table: settings, members on a strip, means."""
    low, high = _ends(page)

    def place(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0)

    mean, half = (row[k].get(page.metric) for k in ("mean", "interval_95"))
    dots = [
        (place(value), f"{page.members[n].label}: {metric_text(page.metric, value)}")
        for n in row["members"]
        if (value := _value_of(page.members[n], page.metric)) is not None
    ]
    ends = (place(mean - half), place(mean + half)) if mean and half else None
    return {
        "settings": [row["settings"].get(key, "–") for key in keys],
        "dots": dots,
        "interval": ends,
        "values": [
            (metric_text(name, row["mean"].get(name)), _half(name, row))
            for name in _names(page)
        ],
        "members": len(row["members"]),
        "failed": len(row["failed"]),
        "is_best": page.result["member"] in row["members"],
    }


def _half(name: str, row: Mapping[str, Any]) -> str:
    half = row["interval_95"].get(name)
    return "" if half is None else f"±{SPACE}{metric_text(name, half)}"


def _curves(page: PopulationPage) -> Any:
    """Returns the chart of the deciding metric of all members; None without any."""
    series = []
    for member in page.members:
        steps, values = plots.points(member.lines, page.metric)
        if len(steps):
            is_best = member.number == page.result["member"]
            series.append((is_best, steps, values))
    if not series:
        return None
    size = page.config.get("data", {}).get("batch_size")
    train = page.sizes.get("train")
    epoch = train / size if size and train else None
    return many_curves(series, page.metric, epoch=epoch)
