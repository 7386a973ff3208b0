"""`--mode=evaluate`: measures the best checkpoint of a run on its held-out splits."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.config import Config
from finetune_jax.core.files import write_json
from finetune_jax.core.paths import printable
from finetune_jax.data.splits import CUTS
from finetune_jax.evaluation.diagnostics import open_domains
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.modes.options import Options
from finetune_jax.report.tables import aligned, checkpoint_line
from finetune_jax.report.workdir import read_manifest
from finetune_jax.tasks.components.decision import describe_threshold
from finetune_jax.training.restore import best_state, with_threshold_of_run
from finetune_jax.training.run import data_of_run, data_warnings
from finetune_jax.training.setup import Setup, make_setup


def main(config: Config, options: Options) -> int:
    """Prints the metrics and writes them to `evaluation.json`; returns the status."""
    workdir = options.workdir
    assert workdir is not None
    setup = make_setup(config, data_of_run(config, workdir))
    setup = with_threshold_of_run(setup, workdir)
    domains = open_domains(setup.config, setup.data)
    state, step = best_state(setup, workdir, domains)
    warnings = _new_warnings(workdir, setup, domains)
    for line in warnings:
        print(f"warning: {printable(line)}")
    measured, splits = state.measure(setup.data.held_out), splits_named(config)
    found = {renamed(name, splits): value for name, value in measured.items()}
    print(checkpoint_line(step))
    if note := describe_threshold(setup.task):
        print(printable(note))
    print("\n".join(aligned([(name, f"{value:.4f}") for name, value in found.items()])))
    told: dict[str, Any] = {"warnings": warnings} if warnings else {}
    for name, text in splits.items():
        if text != name and not text.isidentifier():
            print(f"{name} is config.data.{name}={text!r}")
            told |= {"splits": {**told.get("splits", {}), name: text}}
    write_json(workdir / "evaluation.json", {"step": step, **found, **told})
    print(f"written to {workdir / 'evaluation.json'}")
    return 0


def splits_named(config: Config) -> dict[str, str]:
    """Returns the split of the data that each held-out split is."""
    if config.data.domains:
        return {}
    given = {"validation": config.data.validation, "test": config.data.test}
    return {name: text for name, text in given.items() if text is not None}


def renamed(metric: str, splits: Mapping[str, str]) -> str:
    """Returns the name of a metric with the split that was measured.

    >>> renamed("test/loss", {"test": "train"}), renamed("test/loss", {"test": "a[:9]"})
    ('train/loss', 'test/loss')
    """
    split, slash, rest = metric.partition("/")
    text = splits.get(split, split)
    return f"{text if text in CUTS else split}{slash}{rest}"


def _new_warnings(
    workdir: pathlib.Path, setup: Setup, domains: Sequence[Domain]
) -> list[str]:
    """Returns lines about data that have changed since the run, and their new warnings.

    Args:
        workdir: Workdir of the run.
        setup: Setup of the run, with the data as they are today.
        domains: Other domains that the run is measured on.
    """
    then = read_manifest(workdir) or {}
    told = then.get("warnings")
    lines = []
    own = then.get("data_fingerprint")
    if own is not None and own != setup.data.fingerprint():
        lines.append(
            "config.data: the data are not those of the run: their fingerprint differs "
            "from that in manifest.json; splits may mix training and test examples"
        )
    theirs = then.get("also_fingerprint") or {}
    lines += [
        f"config.evaluate.also, {domain.label}: the data are not those of the run: their "
        "fingerprint differs from that in manifest.json"
        for domain in domains
        if domain.label in theirs and theirs[domain.label] != domain.fingerprint()
    ]
    if isinstance(told, list):
        lines += [x for x in data_warnings(setup, domains) if x not in told]
    return lines
