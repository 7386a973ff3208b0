"""Costs of a finished run, and its report: plots and page, in `report/`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.core.pytrees import named, stage_of
from finetune_jax.data.dataset import Dataset
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.evaluation.per_example import recorded_split
from finetune_jax.parallel import processes
from finetune_jax.plans.phase import scales
from finetune_jax.report import plots
from finetune_jax.report.html.page import Page, ParameterRow, PhaseRow, write_page
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.workdir import read_json, read_manifest
from finetune_jax.tasks.components.decision import THRESHOLD
from finetune_jax.training.predictions import SHOW, Predicted
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup


def write_report(
    setup: Setup,
    best: EvaluatedState,
    progress: Progress,
    result: Mapping[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes `report/`: learning curves, figures of predictions, and the page.

    All processes compute the predictions, process 0 writes.

    Args:
        setup: Setup of the run.
        best: Best state.
        progress: Progress at the end of the run.
        result: Content of `result.json`.
        workdir: Workdir of the run, with all other files.
    """
    folder = workdir / "report"
    setup_of, domain = _shown_domain(setup)
    held_out = setup_of.data.held_out
    split = recorded_split(held_out)
    show = SHOW.get(setup_of.data.spec.labels)
    outputs = None
    if split is not None and show is not None:
        outputs = best.outputs(held_out[split], domain)
    if not processes.is_first():
        return
    folder.mkdir(exist_ok=True)
    lines = read_metrics(workdir / "metrics.jsonl")
    plots.learning_curves(lines, folder / "learning_curves.png")
    figures: dict[str, Any] = {}
    if outputs is not None and split is not None and show is not None:
        dataset = held_out[split].kept()
        which = split if domain is None else f"{split} of {domain}"
        caption = f"{which}, {len(dataset):,} examples"
        if best.has_seen(held_out[split]):
            caption += ", to which the model was fitted, too"
        if THRESHOLD in result:
            caption += ", without the decision threshold"
        figures = show(Predicted(setup_of, outputs, dataset, folder, caption))
    config = read_json(workdir / "config.json") or {}
    page = Page(
        title=title_of(config),
        workdir=str(workdir),
        result=result,
        manifest=read_manifest(workdir) or {},
        config=config,
        lines=lines,
        sizes=split_sizes(setup),
        class_counts=_class_counts(setup),
        phases=_phases(setup, progress),
        parameters=_parameters(setup),
        **figures,
    )
    write_page(page, folder / "index.html")


def run_costs(setup: Setup, progress: Progress) -> dict[str, float | int | None]:
    """Returns costs of all updates of a run that do not depend on the time of day.

    Operations are unknown for fits to cached features, and on several devices by pmap or
    where members of a population are updated together.

    Args:
        setup: Setup of the run.
        progress: Progress at its end.
    """
    is_fit = any(phase.compiled.probe is not None for phase in setup.phases)
    flops = None if is_fit else progress.flops
    return {
        "trained_parameters": setup.trained_parameters,
        "gflop": None if flops is None else flops / 1e9,
        "memory_mb": progress.memory_bytes / 1e6 or None,
    }


def title_of(config: Mapping[str, Any]) -> str:
    """Returns the title of a page, such as 'resnet20 on digits'."""
    data = config["data"]
    place = pathlib.PurePath(data["dir"] or "").name
    return f"{config['model']['name']} on {place or data['name']}"


def split_sizes(setup: Setup) -> dict[str, int]:
    """Returns the number of examples of each split."""
    parts = {"train": setup.data.train, **setup.data.held_out}
    return {name: len(part) for name, part in parts.items()}


def _class_counts(setup: Setup) -> dict[str, tuple[int, ...]]:
    """Returns the examples of each class of each split that has one data set.

    For questions it is the number of them; there is none for tags, whose words depend on
    one another, nor for masks.
    """
    found, spec = {}, setup.data.spec
    for split, part in setup.data.held_out.items():
        if not isinstance(part, Dataset):
            continue
        part = part.kept()
        host = part.on_host()
        if "note" in host:
            found[split] = (len({id(note.question) for note in host["note"]}),)
        elif spec.class_names and part.label.ndim == 1:
            counts = np.bincount(part.label, minlength=len(spec.class_names))
            found[split] = tuple(counts.tolist())
    return found


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


def _phases(setup: Setup, progress: Progress) -> list[PhaseRow]:
    starts, compiled = [0, *progress.ends], [p.compiled for p in setup.phases]
    given = {"batch_stats", "schedule"}
    names = {field.name for field in dataclasses.fields(PhaseRow)} - given
    has_statistics = bool(jax.tree.leaves(setup.shapes.batch_stats))
    return [
        PhaseRow(
            first_step=start,
            end_step=end,
            batch_stats=phase.batch_stats if has_statistics else None,
            # A linear probe has penalties instead of learning rates.
            schedule=one.rates if one.probe else phase.schedule,
            rates=np.zeros(0) if one.probe else one.learning_rates(),
            **{name: phase[name] for name in phase if name in names},
        )
        for phase, one, start, end in zip(setup.plan, compiled, starts, progress.ends)
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
