"""Writes the report of a finished run: plots and page, in `report/`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.core.pytrees import named, stage_of
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.kind import kind_named
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.plans.phase import scales
from finetune_jax.report import plots
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.page import (
    Page,
    ParameterRow,
    PhaseRow,
    Prediction,
    write_page,
)
from finetune_jax.report.segments import for_page, segments_figure
from finetune_jax.report.workdir import read_json, read_manifest
from finetune_jax.tasks.objectives.metrics import confusion_matrix
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup

# Most predictions and most masks that the page shows.
SHOWN, SHOWN_MASKS = 10, 8


def write_report(
    setup: Setup,
    best: EvaluatedState,
    progress: Progress,
    result: Mapping[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes `report/`: learning curves, confusion matrix or predictions, and the page.

    Args:
        setup: Setup of the run.
        best: Best state.
        progress: Progress at the end of the run.
        result: Content of `result.json`.
        workdir: Workdir of the run, with all other files.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    lines = read_metrics(workdir / "metrics.jsonl")
    plots.learning_curves(lines, folder / "learning_curves.png")
    figures: dict[str, Any] = {"confusion": None, "right": [], "wrong": []}
    setup_of, domain = _shown_domain(setup)
    held_out = setup_of.data.held_out
    split = next((name for name in ("test", "validation") if name in held_out), None)
    if split is not None:
        dataset, spec = held_out[split], setup_of.data.spec
        outputs, dataset = best.outputs(dataset, domain), dataset.kept()
        which = split if domain is None else f"{split} of {domain}"
        caption = f"{which}, {len(dataset):,} examples"
        if draw := FIGURES.get(spec.labels):
            figures |= draw(_Shown(setup_of, outputs, dataset, folder, caption))
    config = read_json(workdir / "config.json") or {}
    page = Page(
        title=_title(config),
        result=result,
        manifest=read_manifest(workdir) or {},
        config=config,
        lines=lines,
        phases=_phases(setup, progress),
        parameters=_parameters(setup),
        **figures,
    )
    write_page(page, folder / "index.html")


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A held-out split with the outputs of the best state.

    Attributes:
        setup: Setup of the run, or of one domain.
        outputs: Outputs, a row an example.
        dataset: The split.
        folder: Folder that gets the figures.
        caption: Caption of the figures.
    """

    setup: Setup
    outputs: dict[str, np.ndarray]
    dataset: Dataset
    folder: pathlib.Path
    caption: str

    def name(self, position: int) -> str:
        """Returns the name of an example, with the innermost folder at most."""
        return "/".join(pathlib.PurePath(self.dataset.name(position)).parts[-2:])


def _draw_predicted(shown: _Shown) -> dict[str, Any]:
    """Writes a plot of predicted and true numbers; the page shows the file."""
    plots.predicted(
        shown.outputs["prediction"],
        shown.dataset.label,
        shown.setup.data.spec.targets,
        shown.folder / "predicted.png",
        shown.caption,
    )
    return {}


def _draw_segments(shown: _Shown) -> dict[str, Any]:
    """Writes predicted masks of a sample of the examples, and returns them for the page."""
    positions = _spread(len(shown.dataset), SHOWN_MASKS)
    taken = shown.dataset.take(positions)
    images = kind_named(shown.setup.data.spec.kind).thumbnails(taken["inputs"])
    assert images is not None
    figure = segments_figure(
        images,
        taken["mask"],
        shown.outputs["prediction"][positions],
        [shown.name(position) for position in positions],
        shown.setup.data.spec.pixel_classes,
    )
    (shown.folder / "segments.png").write_bytes(plots.png(figure))
    return {"segments": for_page(figure, f"Of {shown.caption}")}


def _draw_confusion(shown: _Shown) -> dict[str, Any]:
    """Writes the confusion matrix, and returns it and a sample of predictions."""
    if "logits" not in shown.outputs:
        return {}
    names = shown.setup.data.spec.class_names
    # A model may have more logits than the data has classes.
    shown.outputs["logits"] = shown.outputs["logits"][:, : len(names)]
    counts = confusion_matrix(shown.outputs["logits"], shown.dataset.label)
    path = shown.folder / "confusion_matrix.png"
    plots.confusion_matrix(counts, names, path, shown.caption)
    right, wrong = _predictions(shown)
    return {
        "confusion": (counts, names, shown.caption), "right": right, "wrong": wrong
    }  # fmt: skip


# By the kind of labels; predictions of all others have no figure.
FIGURES = {
    "classes": _draw_confusion,
    "numbers": _draw_predicted,
    "masks": _draw_segments,
}


def _shown_domain(setup: Setup) -> tuple[Setup, str | None]:
    """Returns the setup of the last domain and its name; None if there is one data set."""
    if not setup.data.spec.domains:
        return setup, None
    domain = list(setup.data.spec.domains)[-1]
    data = dataclasses.replace(
        setup.data,
        spec=setup.data.spec.domains[domain],
        held_out={s: m.parts[domain] for s, m in setup.data.held_out.items()},
    )
    assert setup.task.domains is not None
    task = setup.task.domains.tasks[domain]
    return dataclasses.replace(setup, task=task, data=data), domain


def _title(config: Mapping[str, Any]) -> str:
    data = config["data"]
    place = pathlib.PurePath(data["dir"] or "").name
    return f"{config['model']['name']} on {place or data['name']}"


def _phases(setup: Setup, progress: Progress) -> list[PhaseRow]:
    starts = [0, *progress.ends]
    names = {field.name for field in dataclasses.fields(PhaseRow)}
    return [
        PhaseRow(
            first_step=start,
            end_step=end,
            **{name: phase[name] for name in phase if name in names},
        )
        for phase, start, end in zip(setup.plan, starts, progress.ends)
    ]


def _parameters(setup: Setup) -> list[ParameterRow]:
    params = named(setup.shapes.params)
    by_phase = [scales(phase, params) for phase in setup.plan]
    rows = [
        ParameterRow(
            name=name,
            stage=stage_of(name, setup.task.models.prefixes),
            shape=tuple(leaf.shape),
            scales=tuple(found[name] for found in by_phase),
        )
        for name, leaf in params.items()
    ]
    return sorted(rows, key=lambda row: setup.task.models.stages.index(row.stage))


def _spread(count: int, most: int) -> np.ndarray:
    """Returns at most so many positions, evenly spread over `count` examples."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _predictions(shown: _Shown) -> tuple[list[Prediction], list[Prediction]]:
    """Returns a sample of the correct predictions, and the most certain wrong ones."""
    setup, dataset = shown.setup, shown.dataset
    pictures = kind_named(setup.data.spec.kind).thumbnails
    if pictures(dataset.take(np.arange(1))["inputs"]) is None:
        return [], []
    records = setup.task.records(shown.outputs, {})
    certain = np.array([record["top"][0]["probability"] for record in records])
    is_right = np.argmax(shown.outputs["logits"], axis=-1) == dataset.label
    right, wrong = np.flatnonzero(is_right), np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-certain[wrong], kind="stable")][:SHOWN]

    def listed(positions: np.ndarray) -> list[Prediction]:
        if not len(positions):
            return []
        images = pictures(dataset.take(positions)["inputs"])
        assert images is not None
        return [
            Prediction(
                image=image,
                truth=setup.data.spec.class_names[dataset.label[position]],
                top=tuple(
                    (entry["class"], entry["probability"])
                    for entry in records[position]["top"][:3]
                ),
                name=shown.name(position),
            )
            for position, image in zip(positions, images)
        ]

    return listed(right[_spread(len(right), SHOWN)]), listed(worst)
