"""The page of a run: one HTML file that shows what was learned, from what, and how."""

import dataclasses
import json
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from finetune_jax.core.files import write_text
from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.report import plots

SPLITS = ("test", "validation", "train")
# More phases get panels over the whole width, one below the other.
NARROW_PHASES = 3
NARROW_IN, WIDE_IN = (3.9, 2.7), (11.6, 2.3)
LEVELS = 5
SPACE = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One example of the sheet.

    Attributes:
        image: uint8 [H, W, C], C 1 or 3, as the model saw it before normalisation.
        truth: The example's class.
        top: (class, probability), best first.
        name: Name of the file, or one such as 'test 17'.
    """

    image: np.ndarray
    truth: str
    top: tuple[tuple[str, float], ...]
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: Full.
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
        name: Unique.
        first_step: Its first update.
        end_step: The update after its last; a plateau may have ended it early.
        optimizer: Its name.
        schedule: Its name.
        peak_lr: The highest learning rate of a parameter with scale 1.
        batch_stats: Which running averages of BatchNorm move.
        warmup_steps: Updates over which the rate rises.
        clip_norm: Bound of the gradient's norm.
        accumulate_steps: Micro-batches of an update.
        weight_decay: Weight decay of the parameters that decay.
        optimizer_state: 'reset' or 'carry'.
    """

    name: str
    first_step: int
    end_step: int
    optimizer: str
    schedule: str
    peak_lr: float
    batch_stats: str
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate_steps: int = 1
    weight_decay: float = 0.0
    optimizer_state: str = "reset"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that a page shows.

    Attributes:
        title: Such as 'resnet20 on digits'.
        result: As in `result.json`.
        manifest: As in `manifest.json`.
        config: As in `config.json`.
        lines: Of `metrics.jsonl`.
        phases: In their order.
        parameters: In the order of the stages.
        confusion: Counts [K, K], class names, and a caption such as 'test, 360
            examples'; None where there are no classes.
        right: Examples predicted rightly; may be empty.
        wrong: Examples predicted wrongly; may be empty.
        segments: From `segments.for_page`; None where there are no masks.
    """

    title: str
    result: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    lines: Sequence[dict]
    phases: Sequence[PhaseRow]
    parameters: Sequence[ParameterRow]
    confusion: tuple[np.ndarray, Sequence[str], str] | None
    right: Sequence[Prediction]
    wrong: Sequence[Prediction]
    segments: Mapping[str, Any] | None = None


def write_page(page: Page, path: pathlib.Path) -> None:
    """Writes the page: self-contained, and the same bytes for the same `page`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count_text,
        "flat": _flat,
        "level": _level,
        "metric": lambda value, name: metric_text(name, value),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "percent": percent,
        "rate": rate_text,
        "short": plots.shortened,
        "thumbnail": plots.thumbnail,
        "time": time_text,
    }
    text = environment.get_template("page.html.jinja").render(
        page=page,
        tiles=_tiles(page),
        results=_results(page),
        curves=_curves(page),
        confusion=_confusion(page),
        stages=_stages(page),
        command=_command(page.manifest.get("command") or []),
    )
    # References instead of letters: readable whatever the encoding of files here, and
    # of names in them.
    text = text.encode("utf-8", "replace").decode("utf-8")
    write_text(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))


def percent(share: float) -> str:
    """Returns a share in percent; only what is 1 is shown as 100.

    >>> percent(0.9220).replace(SPACE, " "), percent(0.99996).replace(SPACE, " ")
    ('92.2 %', '99.996 %')
    """
    digits = 0 if share == 1 else 1
    while share < 1 and digits < 6 and float(f"{100 * share:.{digits}f}") >= 100:
        digits += 1
    return f"{100 * share:.{digits}f}{SPACE}%"


def metric_text(name: str, value: float | None) -> str:
    """Returns the value of a metric; a dash where it is not finite.

    >>> metric_text("test/loss", 0.28732), metric_text("test/loss", None)
    ('0.2873', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if name.endswith("accuracy"):
        return percent(value)
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if size < 10 else f"{value:,.{2 if size < 1e3 else 0}f}"


def count_text(count: int) -> str:
    """Returns a number of parameters, in millions where it is large.

    >>> count_text(64_650), count_text(25_557_032).replace(SPACE, " ")
    ('64,650', '25.6 M')
    """
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f}{SPACE}M"


def rate_text(rate: float) -> str:
    """Returns a learning rate.

    >>> rate_text(0.003), rate_text(1e-05)
    ('0.003', '1e-5')
    """
    return f"{rate:.3g}".replace("e-0", "e-")


def time_text(seconds: float) -> str:
    """Returns a duration.

    >>> [time_text(s).replace(SPACE, " ") for s in (4.21, 27.4, 725, 12_060)]
    ['4.2 s', '27 s', '12 min', '3 h 21 min']
    """
    if seconds < 99.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f}{SPACE}s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes}{SPACE}min"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def _tiles(page: Page) -> list[dict[str, str]]:
    """Returns the headline metrics: what was chosen by, and the loss."""
    final, best = page.result.get("final", {}), page.result.get("best", {})
    best_step, last = page.result.get("best_step"), page.result.get("steps")
    chosen = page.config.get("evaluate", {}).get("best") or "validation/accuracy"
    names = dict.fromkeys((chosen.rpartition("/")[2], "accuracy", "loss"))
    names |= dict.fromkeys(key.rpartition("/")[2] for key in final)
    keys = [f"{s}/{n}" for n in names for s in SPLITS if f"{s}/{n}" in final]
    tiles = []
    for key in keys[:4]:
        value, note = final[key], "after the last update"
        if best_step is not None and best_step == last:
            note = f"best and final, step{SPACE}{best_step:,}"
        elif best_step is not None:
            value, end = best.get(key), metric_text(key, value)
            note = f"best, step{SPACE}{best_step:,}; final {end}"
        split, _, name = key.partition("/")
        label = f"{split.capitalize()} {name.replace('_', ' ')}"
        tiles.append({"label": label, "value": metric_text(key, value), "note": note})
    return tiles


def _results(page: Page) -> dict[str, Any] | None:
    """Returns the table of metrics by split: before, best and final."""
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
        splits.setdefault(key.partition("/")[0], []).append(key)
    if not splits:
        return None
    chosen = page.config.get("evaluate", {}).get("best")
    way = "highest " if chosen and higher_is_better(chosen) else "lowest "
    by = way + chosen.replace("/", " ") if best_step is not None and chosen else None
    return {"columns": columns, "splits": splits, "chosen_by": by}


def _curves(page: Page) -> dict[str, Any] | None:
    names = plots.curve_names(page.lines)
    if not names:
        return None
    spans = [plots.Span(p.name, p.first_step, p.end_step) for p in page.phases]
    spans = spans or plots.spans_of(page.lines)
    wide = len(spans) > NARROW_PHASES
    size_in = WIDE_IN if wide else NARROW_IN
    best_step, panels = page.result.get("best_step"), []
    for name in names:
        figure = plots.curve_figure(
            page.lines, name, spans=spans, size_in=size_in, best_step=best_step
        )
        address = plots.address(plots.svg(figure), "svg+xml")
        title = name.replace("_", " ")
        splits = [s for s in plots.COLOURS if _was_measured(page, f"{s}/{name}")]
        alt = f"{title} after each update on {', '.join(splits)}"
        panels.append({"title": title, "src": address, "alt": alt})
    phases = [span.name for span in spans]
    labels = plots.phase_labels(spans, plots.panel_width_in(size_in))
    return {
        "panels": panels,
        "wide": wide,
        "numbered": phases if labels != phases else [],
        "colours": {
            s: c for s, c in plots.COLOURS.items() if _was_measured(page, f"{s}/")
        },
        "best": best_step is not None and _was_measured(page, "validation/"),
    }


def _was_measured(page: Page, prefix: str) -> bool:
    return any(key.startswith(prefix) for line in page.lines for key in line)


def _confusion(page: Page) -> dict[str, Any] | None:
    if page.confusion is None:
        return None
    counts, names, caption = page.confusion
    classes, right, total = len(names), int(np.trace(counts)), int(counts.sum())
    wrong = counts * (1 - np.eye(classes, dtype=counts.dtype))
    most = 20 if classes > plots.MOST_NAMED else 10
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = [divmod(int(index), classes) for index in order if wrong.flat[index]]
    of = counts.sum(axis=1)
    figure = plots.confusion_figure(counts, names, "")
    return {
        "src": plots.address(plots.png(figure), "png"),
        "width_px": round(96 * figure.get_figwidth()),
        "alt": f"{classes} x {classes} classes; {right:,} of {total:,} on the diagonal",
        "caption": caption,
        "right": right,
        "total": total,
        "pairs": [
            (names[row], names[column], int(wrong[row, column]), int(of[row]))
            for row, column in cells
        ],
    }


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


def _command(words: Sequence[str]) -> str:
    """Returns the command of a run for a shell; without its workdir it starts anew.

    >>> _command(["/bin/python", "/x/finetune_jax/main.py", "--config=a", "--workdir=b"])
    'python -m finetune_jax.main --config=a'
    """
    if words[1:] and words[1].endswith("finetune_jax/main.py"):
        words = [pathlib.Path(words[0]).name, "-m", "finetune_jax.main", *words[2:]]
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--workdir":
            next(rest, None)
        elif not word.startswith("--workdir="):
            kept.append(word)
    return shlex.join(kept)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested dicts by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            yield f"{prefix}{key}", "–" if value in (None, "") else str(value)
