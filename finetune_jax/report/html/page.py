"""The page of a run: one HTML file that shows what was learned, from what, and how."""

import dataclasses
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.data.kind import Example
from finetune_jax.report import plots
from finetune_jax.report.html import classes, formats
from finetune_jax.report.html.charts import Chart, curves, schedule
from finetune_jax.report.html.formats import SPACE, metric_text, metric_title
from finetune_jax.report.html.templates import identity, words_of, write_html

# The split that decides comes first: it chose the checkpoint.
SPLITS = ("validation", "test", "train")
# More phases get charts over the whole width, one below the other.
NARROW_PHASES = 3
LEVELS = 5
TILES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One example with its prediction.

    Attributes:
        example: The example.
        truth: Its class, number or answer.
        top: Pairs (prediction, probability), best first; the probability of a number is
            None.
        is_right: Whether the first prediction is right; None for numbers.
        name: Name of the file, or one such as 'test 17'.
        tags: True and predicted tag of each of the example's words.
    """

    example: Example
    truth: str
    top: tuple[tuple[str, float | None], ...]
    is_right: bool | None
    name: str
    tags: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: Full name.
        stage: Stage of the model.
        shape: Shape of the array.
        scales: Factor of the learning rate in each phase; 0 is frozen.
    """

    name: str
    stage: str
    shape: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def count(self) -> int:
        """Values in the array."""
        return math.prod(self.shape)

    @property
    def is_trained(self) -> bool:
        """Whether it learns in any phase."""
        return any(self.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One phase, as it was run.

    Attributes:
        name: Unique name.
        first_step: Its first update.
        end_step: The update after its last; a plateau may have ended it early.
        optimizer: Name of the optimizer.
        schedule: Name of the schedule.
        peak_lr: The highest learning rate of a parameter with scale 1.
        batch_stats: Which running averages of BatchNorm move; None without BatchNorm.
        warmup_steps: Updates over which the rate rises.
        clip_norm: Bound of the gradient's norm.
        accumulate_steps: Micro-batches of an update.
        weight_decay: Weight decay of the parameters that decay.
        optimizer_state: 'reset' or 'carry'.
        rates: Learning rate of each planned update, [steps].
    """

    name: str
    first_step: int
    end_step: int
    optimizer: str
    schedule: str
    peak_lr: float
    batch_stats: str | None = None
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate_steps: int = 1
    weight_decay: float = 0.0
    optimizer_state: str = "reset"
    rates: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that a page shows.

    Attributes:
        title: Such as 'resnet20 on digits'.
        workdir: Workdir of the run.
        result: Content of `result.json`.
        manifest: Content of `manifest.json`.
        config: Content of `config.json`.
        lines: Lines of `metrics.jsonl`.
        sizes: Number of examples by split.
        class_counts: Examples of each class of a held-out split, or the number of
            independent ones; a split without such a number is left out.
        phases: Phases in their order.
        parameters: Parameters in the order of the stages.
        confusion: Counts [K, K], class names, and a caption such as 'test, 360
            examples'; None where there are no classes.
        charts: Charts of the predictions, such as ROC curves.
        examples: Examples with predictions, by the title of their group.
        segments: Masks, from `segments.for_page`; None where there are none.
    """

    title: str
    workdir: str = ""
    result: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    lines: Sequence[dict]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    class_counts: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )
    phases: Sequence[PhaseRow]
    parameters: Sequence[ParameterRow]
    confusion: tuple[np.ndarray, Sequence[str], str] | None = None
    charts: Sequence[Chart] = ()
    examples: Mapping[str, Sequence[Prediction]] = dataclasses.field(
        default_factory=dict
    )
    segments: Mapping[str, Any] | None = None

    @property
    def epoch(self) -> float | None:
        """Updates in an epoch; None if unknown."""
        size = self.config.get("data", {}).get("batch_size")
        examples = self.sizes.get("train")
        return examples / size if size and examples else None


def write_page(page: Page, path: pathlib.Path) -> None:
    """Writes the page: self-contained, and the same bytes for the same `page`."""
    command = page.manifest.get("command") or []
    confusion = page.confusion and classes.confusion(*page.confusion)
    write_html(
        "page.html.jinja",
        path,
        page=page,
        identity=list(identity(page.manifest, page.workdir)),
        splits=_splits(page),
        tiles=tiles(page),
        facts=_facts(page),
        results=_results(page),
        curves=_curves(page),
        confusion=confusion,
        stages=_stages(page),
        level=_level,
        command=shlex.join(words_of(command)),
        again=_again(page.workdir) if command else "",
        python=str(command[0]) if command else "",
    )


def _splits(page: Page) -> str:
    names = [name for name in ("train", "validation", "test") if name in page.sizes]
    return ", ".join(f"{page.sizes[name]:,} {name}" for name in names)


def tiles(page: Page) -> list[dict[str, str]]:
    """Returns the headline metrics: the one that decides, then those of the task."""
    final, best = page.result.get("final", {}), page.result.get("best", {})
    best_step, last = page.result.get("best_step"), page.result.get("steps")
    chosen = page.config.get("evaluate", {}).get("best") or ""
    first = chosen.partition("/")[0]
    splits = dict.fromkeys((first, *SPLITS))
    own = {
        key.partition("/")[2]: None for key in final if key.partition("/")[0] in splits
    }
    names = dict.fromkeys((chosen.partition("/")[2], *own))
    keys = [f"{s}/{n}" for n in names for s in splits if f"{s}/{n}" in final]
    found = []
    for key in keys[:TILES]:
        value, note = final[key], "after the last update"
        if best_step is not None and best_step == last:
            note = f"best and final, step{SPACE}{best_step:,}"
        elif best_step is not None:
            value, end = best.get(key), metric_text(key, value)
            note = f"best, step{SPACE}{best_step:,}; final {end}"
        found.append(
            {
                "label": formats.capitalised(metric_title(key)),
                "value": metric_text(key, value),
                "note": note,
                "interval": interval_text(key, value, page.class_counts),
            }
        )
    return found


def interval_text(
    key: str, value: float | None, counts: Mapping[str, tuple[int, ...]]
) -> str:
    """Returns the 95 % interval of a metric and the number of examples; '' for none.

    Args:
        key: Split and name of the metric.
        value: Value of the metric.
        counts: Examples of each class, or their number, by split.
    """
    split, _, name = key.partition("/")
    own = counts.get(split, ())
    bounds = formats.interval(name, value, own)
    if bounds is None:
        return ""
    low, high = (metric_text(name, bound) for bound in bounds)
    low = low.removesuffix(f"{SPACE}%")
    return f"95{SPACE}% interval {low} to {high}, n{SPACE}={SPACE}{sum(own):,}"


def _facts(page: Page) -> list[tuple[str, str, str]]:
    """Returns facts about the run: label, value, note."""
    result, manifest, found = page.result, page.manifest, []
    if result.get("steps") is not None:
        phases = len(page.phases)
        note = f"in {phases} phase{'' if phases == 1 else 's'}" if phases else ""
        if page.epoch:
            note += f", {result['steps'] / page.epoch:.3g} epochs"
        found.append(("Updates", f"{result['steps']:,}", note))
    if total := sum(row.count for row in page.parameters):
        trained = sum(row.count for row in page.parameters if row.is_trained)
        note = f"of {formats.count_text(total)}, {formats.percent(trained / total)}"
        if size := result.get("disk_bytes", {}).get("checkpoints"):
            note += f"; checkpoints take {formats.size_text(size)}"
        found.append(("Trained parameters", formats.count_text(trained), note))
    if result.get("wall_s") is not None:
        found.append(("Time", formats.time_text(result["wall_s"]), _time_note(page)))
    if manifest.get("device_kind"):
        count = manifest.get("device_count") or 1
        note = f"{count} device{'' if count == 1 else 's'}"
        found.append(("Device", manifest["device_kind"], note))
    return found


def _time_note(page: Page) -> str:
    """Returns which part of the time updates took, and their rate."""
    rate, seconds = page.result.get("examples_per_s"), page.result.get("train_s")
    parts = []
    if rate and seconds:
        parts.append(
            f"{formats.time_text(seconds)} of it in updates, {rate:,.0f} examples a second"
        )
    elif rate:
        parts.append(f"{rate:,.0f} examples a second within updates")
    cached = page.result.get("cached_phases") or ()
    if parts and cached:
        is_all = len(cached) == len(page.phases)
        where = "" if is_all else f" in {', '.join(map(repr, cached))}"
        parts.append(f"on cached features{where}")
    if compiling := page.result.get("compile_s"):
        parts.append(f"{formats.time_text(compiling)} compiling")
    return ", ".join(parts)


def _results(page: Page) -> dict[str, Any] | None:
    """Returns tables of metrics: before, best and final of the splits beside each other."""
    final, best = page.result.get("final", {}), page.result.get("best", {})
    best_step, last = page.result.get("best_step"), page.result.get("steps")
    start = next((line for line in page.lines if line["step"] == 0), {})
    columns: list[tuple[str, int | None, Mapping[str, Any]]] = []
    if set(start) & set(final):
        columns.append(("Before", 0, start))
    if best_step not in (None, last):
        columns.append(("Best", best_step, best))
    both = best_step is not None and best_step == last
    columns.append(("Best and final" if both else "Final", last, final))
    splits: dict[str, list[str]] = {}
    for key in final:
        split, _, name = key.partition("/")
        splits.setdefault(split, []).append(name)
    if not splits:
        return None
    # Splits with the same metrics share a table.
    groups: dict[tuple[str, ...], list[str]] = {}
    for split in sorted(splits, key=lambda s: SPLITS.index(s) if s in SPLITS else 9):
        groups.setdefault(tuple(splits[split]), []).append(split)
    chosen = page.config.get("evaluate", {}).get("best")
    way = "highest " if chosen and higher_is_better(chosen) else "lowest "
    is_chosen = best_step is not None and chosen
    return {
        "columns": columns,
        "groups": groups,
        "sizes": page.sizes,
        "chosen_by": way + metric_title(chosen) if is_chosen else None,
    }


def _curves(page: Page) -> dict[str, Any] | None:
    """Returns the charts of the metrics and of the learning rate, and their legend."""
    spans = [plots.Span(p.name, p.first_step, p.end_step) for p in page.phases]
    spans = spans or plots.spans_of(page.lines)
    names = [n for n in plots.curve_names(page.lines) if n != "learning_rate"]
    best_step = page.result.get("best_step")
    panels = [
        curves(page.lines, name, spans=spans, best_step=best_step, epoch=page.epoch)
        for name in names
    ]
    rates = schedule(_rates(page), spans=spans, epoch=page.epoch)
    panels += [rates] if rates is not None else []
    if not panels:
        return None
    phases = [span.name for span in spans]
    labels = [label for *_, label in panels[0].phases]
    styles = {line.name: line.style for p in panels for line in p.lines if line.name}
    return {
        "panels": panels,
        "wide": len(spans) > NARROW_PHASES,
        "numbered": phases if labels != phases else [],
        "legend": styles,
    }


def _rates(page: Page) -> list[np.ndarray]:
    """Returns the learning rates of each phase; a plateau's are those that were logged."""
    found = []
    for phase in page.phases:
        rates = np.array(phase.rates, float)
        if phase.schedule == "plateau":
            for line in page.lines:
                step, rate = line["step"], line.get("train/learning_rate")
                if rate is not None and phase.first_step < step <= phase.end_step:
                    rates[step - 1 - phase.first_step :] = rate
        found.append(rates)
    return found


def _stages(page: Page) -> dict[str, Any]:
    """Returns the parameter map: a row for each stage, in it a cell for each phase."""
    stages: dict[str, list[ParameterRow]] = {}
    for row in page.parameters:
        stages.setdefault(row.stage, []).append(row)
    cells = {
        stage: [_cell(rows, i, phase.peak_lr) for i, phase in enumerate(page.phases)]
        for stage, rows in stages.items()
    }
    rates = [c["rates"][0][1] for row in cells.values() for c in row if c["rates"]]
    return {"rows": stages, "cells": cells, "rates": sorted({r for r in rates if r})}


def _cell(rows: Sequence[ParameterRow], index: int, peak: float) -> dict[str, Any]:
    """Returns how many values of a stage learn at which rate in phase `index`."""
    counts: dict[float, int] = {}
    for row in rows:
        scale = row.scales[index]
        counts[scale] = counts.get(scale, 0) + row.count
    frozen = counts.pop(0.0, 0)
    rates = [(scale, scale * peak, counts[scale]) for scale in sorted(counts)[::-1]]
    return {"rates": rates, "frozen": frozen}


def _level(cell: Mapping[str, Any], rates: Sequence[float]) -> int:
    """Returns the colour of a cell: 0 frozen, 1 the lowest of all rates, 5 the highest."""
    if not cell["rates"]:
        return 0
    rate = cell["rates"][0][1]
    if not rate or len(rates) < 2:
        return LEVELS - 1
    return 1 + round((LEVELS - 1) * math.log(rate / rates[0], rates[-1] / rates[0]))


def _again(workdir: str) -> str:
    """Returns the command that runs a run again and compares the bits."""
    words = ["python", "-m", "finetune_jax.main", "--mode=reproduce"]
    return shlex.join([*words, f"--workdir={workdir}"])
