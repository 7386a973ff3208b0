"""Writes the page of a sweep from its folder."""

import json
import math
import pathlib
import shlex
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from finetune_jax.config import flat
from finetune_jax.config.fields import plain
from finetune_jax.config.loading import entry_dict
from finetune_jax.plans.phase import Phase
from finetune_jax.report import plots
from finetune_jax.report.html import formats
from finetune_jax.report.html.formats import SPACE, metric_text
from finetune_jax.report.html.sweep import (
    ArmRow,
    Parameter,
    RunRow,
    SweepPage,
    TrialPoint,
    write_sweep_page,
)
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.tables import short_labels
from finetune_jax.report.workdir import read_manifest
from finetune_jax.sweeps import statistics
from finetune_jax.sweeps.comparison import costs
from finetune_jax.sweeps.definition import Seed
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import Member, as_plain
from finetune_jax.sweeps.schedule import Wanted
from finetune_jax.sweeps.search.space import Choice, Float, Int
from finetune_jax.sweeps.table import Row, Table
from finetune_jax.sweeps.table_files import (
    COSTS,
    answer,
    chosen_text,
    cost_text,
    difference_text,
    mean_text,
    remarks,
)

# A learning curve needs so many evaluations; a test split is measured twice in a run.
_FEWEST_POINTS = 3
_STATES = {"complete": "finished", "failed": "failed", "pruned": "ended early"}


def write_sweep_report(
    folder: SweepFolder, name: str, wanted: Wanted, table: Table, address: str
) -> pathlib.Path:
    """Writes `report/index.html` of a sweep and returns its path.

    Args:
        folder: Folder of the sweep.
        name: Name of the sweep.
        wanted: Members that are known by now.
        table: Their table.
        address: Address of the file of the sweep, as on the command line.
    """
    flags = [f"--sweep={address}", f"--dir={folder.root}"]
    command = shlex.join(["python", "-m", "finetune_jax.sweep", *flags, "run"])
    curves = _curve_metrics(folder, table)
    curve_metric = next(iter(curves.values()), table.metric)
    search = folder.sweep.search
    page = SweepPage(
        title=f"Sweep {name}",
        identity=_identity(folder, table, wanted, address),
        facts=_facts(folder, table, wanted),
        metric=table.metric,
        curve_metric=curve_metric,
        curve_note=_curve_note(curve_metric),
        baseline="" if table.baseline is None else table.baseline,
        rows=[_arm_row(folder, table, row, curves, command) for row in table.rows],
        arms=[] if search else list(folder.sweep.all_arms),
        remarks=remarks(table),
        warnings=folder.changes(wanted),
        failures=_failures(folder, wanted.members),
        spreads=_spreads(table),
        command=command,
        partial=_partial(folder, wanted),
        definition=_definition(folder),
        tuning=table.tuning,
        tuning_note=_tuning_note(folder),
        trials=[
            TrialPoint(
                number=trial.number,
                params=trial.params,
                value=_value(trial.value, trial.by_seed),
                is_early=trial.state == "pruned",
            )
            for trial in wanted.trials.values()
        ],
        parameters=_parameters(search.space) if search else [],
    )
    path = folder.root / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    write_sweep_page(page, path)
    return path


def _value(value: float | None, by_seed: Mapping[int, float]) -> float | None:
    """Returns the value of a trial, of one that ended early the mean of its last ones."""
    known = [v for v in by_seed.values() if math.isfinite(v)]
    if value is not None:
        return value if math.isfinite(value) else None
    return math.fsum(known) / len(known) if known else None


def _identity(
    folder: SweepFolder, table: Table, wanted: Wanted, address: str
) -> list[tuple[str, str, str]]:
    sweep = folder.sweep
    found = [
        ("Sweep", address, ""),
        ("Folder", str(folder.root), ""),
        ("Metric", table.metric, ""),
    ]
    if table.baseline is not None:
        found.append(("Baseline", table.baseline, ""))
    if sweep.search is not None:
        search = sweep.search
        pruner = f", {type(search.pruner).__name__} pruner" if search.pruner else ""
        found.append(("Search", f"{search.count} trials", f"{search.sampler}{pruner}"))
    elif any(row.chosen for row in table.rows):
        names = ", ".join(dict.fromkeys(one.metric for one in wanted.tuning))
        found.append(("Tuned by", names, ""))
    return found


def _facts(
    folder: SweepFolder, table: Table, wanted: Wanted
) -> list[tuple[str, str, str]]:
    """Returns numbers about all members."""
    ended = [folder.outcome(member.key) for member in wanted.members]
    states = [None if one is None else one.state for one in ended]
    complete = [one.result for one in ended if one and one.state == "complete"]
    told = [f"{states.count('complete')} finished"]
    for state, text in (
        ("pruned", "ended early"),
        ("failed", "failed"),
        (None, "missing"),
    ):
        told += [f"{states.count(state)} {text}"] if states.count(state) else []
    found = [("Runs", str(len(wanted.members)), ", ".join(told))]
    if table.baseline is not None:
        seeds = len(folder.sweep.all_seeds)
        cases = len(folder.sweep.cases)
        of = f" in each of {cases} cases" if cases > 1 else ""
        arms = len(folder.sweep.all_arms)
        found.append(("Arms", str(arms), f"{seeds} seed{'s' * (seeds > 1)}{of}"))
    seconds = sum(result.get("wall_s") or 0.0 for result in complete)
    if complete:
        each = (
            f"{formats.time_text(seconds / len(complete))} a run, all workers together"
        )
        found.append(("Time", formats.time_text(seconds), each))
    for member in wanted.members:
        manifest = read_manifest(folder.workdir(member.key)) or {}
        if device := manifest.get("device_kind"):
            count = manifest.get("device_count") or 1
            each = f"{count} device{'' if count == 1 else 's'} a run"
            found.append(("Device", device, each))
            break
    return found


def _curve_metrics(folder: SweepFolder, table: Table) -> dict[str, str]:
    """Returns the metric of each arm's learning curves: the one that decides, if it can."""
    own = {row.arm: _metric_of(folder, table, row.arm) for row in table.rows}
    lines, of = next(
        (
            (lines, own[row.arm])
            for row in table.rows
            for member in row.members
            if (lines := read_metrics(folder.workdir(member.key) / "metrics.jsonl"))
        ),
        ([], table.metric),
    )
    known = [
        place
        for place, metric in enumerate(_curve_candidates(of))
        if len(plots.points(lines, metric)[0]) >= _FEWEST_POINTS
    ]
    place = known[0] if known else 0
    return {arm: _curve_candidates(metric)[place] for arm, metric in own.items()}


def _curve_note(metric: str) -> str:
    """Returns a sentence about the split of the learning curves."""
    if not metric.startswith("train/"):
        return ""
    return (
        "No held-out split was measured at more than two steps, so this is the training "
        "split; evaluate.every_steps in the base config measures more often."
    )


def _curve_candidates(metric: str) -> list[str]:
    """Returns metrics that may show how runs learn, in order of preference."""
    name = metric.partition("/")[2]
    return [
        metric,
        f"validation/{name}",
        f"train/{name}",
        "validation/loss",
        "train/loss",
    ]


def _metric_of(folder: SweepFolder, table: Table, arm: str) -> str:
    """Returns the name that the metric of a table has in the runs of an arm."""
    return table.metric if folder.sweep.search else folder.sweep.metric_of(arm)


def _arm_row(
    folder: SweepFolder, table: Table, row: Row, curves: Mapping[str, str], command: str
) -> ArmRow:
    known, own = costs(row.results), _metric_of(folder, table, row.arm)
    estimate, found = row.estimate, row.comparison
    return ArmRow(
        case=row.case,
        arm=row.arm,
        chosen=chosen_text(row),
        changes=_changes(row),
        runs=[
            _run_row(folder, own, member, curves[row.arm], command)
            for member in row.members
        ],
        mean=estimate and (estimate.mean, estimate.low, estimate.high),
        mean_text="" if estimate is None else mean_text(table.metric, estimate),
        difference=found and (found.difference, found.low, found.high),
        difference_text=difference_text(found),
        verdict=found.verdict if found else "",
        answer=answer(table, row),
        problem="" if row.runs else row.problem,
        costs={
            text: (value, cost_text(key, value))
            for key, text in COSTS.items()
            if (value := known[key]) is not None
        },
        is_early=row.pruned,
    )


def _changes(row: Row) -> list[str]:
    """Returns what the runs of a row change in the base config."""
    return _settings(row.members[0].overrides) if row.members else []


def _settings(overrides: Mapping[str, Any]) -> list[str]:
    """Returns overrides as lines KEY=VALUE; of phases, values that are no defaults."""
    default = plain(entry_dict(Phase, {})) if "plan" in overrides else {}
    return [
        f"{key}={json.dumps(value)}"
        for key, value in flat(as_plain(overrides)).items()
        if key in overrides
        or not key.startswith("plan[")
        or default.get(key.partition("].")[2], ...) != value
    ]


def _definition(folder: SweepFolder) -> list[tuple[str, list[str]]]:
    """Returns the names of arms and cases, and the values that each sets."""
    sweep = folder.sweep
    if sweep.search is not None:
        return []
    found = [(name, _settings(arm.overrides)) for name, arm in sweep.all_arms.items()]
    found += [(name, _settings(of)) for name, of in sweep.cases.items() if name]
    return found


def _partial(folder: SweepFolder, wanted: Wanted) -> str:
    """Returns a line that says how many runs have ended; '' if all have."""
    ended = sum(folder.outcome(member.key) is not None for member in wanted.members)
    count = len(wanted.members) + wanted.more
    if wanted.is_all and ended == count:
        return ""
    most = "at most " if wanted.more else ""
    return f"The sweep is not finished: {ended} of {most}{count} runs have ended."


def _tuning_note(folder: SweepFolder) -> str:
    """Returns a sentence about the seeds that choose values."""
    seeds = folder.sweep.all_seeds[: folder.sweep.tune_seeds]
    chosen_by = "; ".join(map(_seed_text, seeds))
    return f"Values are chosen with {chosen_by}, also among the seeds of the results."


def _run_row(
    folder: SweepFolder, metric: str, member: Member, curve: str, command: str
) -> RunRow:
    workdir = folder.workdir(member.key)
    outcome = folder.outcome(member.key)
    state = "missing" if outcome is None else _STATES[outcome.state]
    steps = [
        "python",
        "-m",
        "finetune_jax.main",
        "--mode=reproduce",
        f"--workdir={workdir}",
    ]
    has_page = (workdir / "report" / "index.html").is_file()
    is_finished = state == "finished"
    lines = read_metrics(workdir / "metrics.jsonl") if workdir.is_dir() else []
    return RunRow(
        seed=_seed_text(member.seed),
        state=state,
        value=outcome.value(metric) if outcome else None,
        page=f"../{member.key}/report/index.html" if has_page else "",
        workdir=str(workdir),
        command=shlex.join(steps) if is_finished else command,
        curve=plots.points(lines, curve) if lines else None,
    )


def _seed_text(seed: Seed) -> str:
    numbers = set(dict(seed).values())
    if len(numbers) == 1:
        return f"seed {numbers.pop()}"
    return ", ".join(f"{source} {number}" for source, number in seed)


def _failures(
    folder: SweepFolder, members: Sequence[Member]
) -> list[tuple[str, str, str]]:
    """Returns the last failure of each member that has not finished since."""
    found = []
    for member in members:
        outcome = folder.outcome(member.key)
        failures = folder.failures(member.key)
        if failures and (outcome is None or outcome.state == "failed"):
            last = failures[-1]
            again = "" if outcome else "; it will be tried again"
            lines = last.error.splitlines() or [""]
            found.append((member.label, f"{lines[-1]}{again}", last.log))
    return found


def _spreads(table: Table) -> list[tuple[str, str, str, str, str, int]]:
    """Returns the deviation by source of randomness, for arms whose seeds tell it."""
    found = []
    for row in table.rows:
        values: dict[tuple[tuple[str, Hashable], ...], float] = {
            run.seed: value
            for run in row.runs
            if (value := run.value(table.metric)) is not None and math.isfinite(value)
        }
        if len(values) < 2:
            continue
        spreads = statistics.spread_by_source(values)
        if set(spreads) <= {"all"}:
            continue
        label = ", ".join(filter(None, (row.case, row.arm)))
        for source, spread in spreads.items():
            texts = [_deviation(table, v) for v in (spread.sd, spread.low, spread.high)]
            # The unit follows the upper end.
            numbers = texts[0], texts[1].partition(SPACE)[0], texts[2]
            found.append((label, source, *numbers, spread.groups))
    return found


def _deviation(table: Table, value: float) -> str:
    if formats.is_share(table.metric):
        return f"{100 * value:.2f}{SPACE}points"
    return metric_text(table.metric, value)


def _parameters(space: Mapping[str, Any], prefix: str = "") -> list[Parameter]:
    """Returns the parameters of a search space, those of named sets too."""
    found = []
    for key, entry in space.items():
        name = prefix + key
        label = short_labels([key])[0].replace("_", " ")
        if prefix:
            label = f"{label} of {prefix.rstrip('/').rpartition('/')[2]}"
        if isinstance(entry, Choice):
            found.append(Parameter(name=name, label=label, options=entry.labels))
            for option, inner in (entry.branches or {}).items():
                found += _parameters(inner, f"{name}/{option}/")
        elif isinstance(entry, Float | Int):
            found.append(Parameter(name=name, label=label, is_log=entry.log))
    return found
