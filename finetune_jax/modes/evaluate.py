"""`--mode=evaluate`: measures the best checkpoint of a run on its held-out splits."""

import pathlib
from collections.abc import Sequence

from finetune_jax.config import Config
from finetune_jax.core.files import write_json
from finetune_jax.core.paths import printable
from finetune_jax.evaluation.diagnostics import open_domains
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.modes.options import Options
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
    found = state.measure(setup.data.held_out)
    print(f"checkpoint of step {step}")
    if note := describe_threshold(setup.task):
        print(printable(note))
    for name, value in found.items():
        print(f"{name:24}{value:10.4f}")
    told = {"warnings": warnings} if warnings else {}
    write_json(workdir / "evaluation.json", {"step": step, **found, **told})
    print(f"written to {workdir / 'evaluation.json'}")
    return 0


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
