"""Writes the page of a finished population."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.report.html.population import (
    Member,
    PopulationPage,
    write_population_page,
)
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.workdir import read_json, read_manifest
from finetune_jax.training.setup import Setup
from finetune_jax.training.summary import split_sizes, title_of


def write_population_report(
    setup: Setup,
    results: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes `report/index.html` of a population.

    Args:
        setup: Setup of the population.
        results: Result of each member.
        result: Content of `result.json` of the population.
        workdir: Workdir of the population, with the folders of all members.
    """
    config = read_json(workdir / "config.json") or {}
    members = [
        Member(
            number=number,
            settings=dict(setup.config.population[number]),
            result=own,
            lines=read_metrics(workdir / "members" / f"{number:03d}" / "metrics.jsonl"),
        )
        for number, own in enumerate(results)
    ]
    page = PopulationPage(
        title=f"{title_of(config)}, {len(members)} members",
        workdir=str(workdir),
        metric=setup.config.evaluate.best or "",
        result=result,
        manifest=read_manifest(workdir) or {},
        config=config,
        sizes=split_sizes(setup),
        members=members,
    )
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    write_population_page(page, folder / "index.html")
