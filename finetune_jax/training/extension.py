"""Runs that go on from a finished run: `config.extend`.

The new run begins as if it had been resumed at a checkpoint of the finished one, its
parent, under a longer plan: its workdir gets the checkpoints and the metrics of that step.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.core.pytrees import digest
from finetune_jax.core.train_state import TrainState
from finetune_jax.parallel import processes
from finetune_jax.plans.phase import durations, plan_from_config
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.workdir import read_config, read_json, read_manifest
from finetune_jax.training.initial.starting_state import Loaded
from finetune_jax.training.progress import Progress
from finetune_jax.training.restore import check_is_one_run, open_checkpoints
from finetune_jax.training.setup import Setup

_KEY = "config.extend"
_LENGTH = ("steps", "epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """A finished run that another one goes on from.

    Attributes:
        workdir: Its workdir.
        config: Its config.
        result: Its `result.json`.
    """

    workdir: pathlib.Path
    config: Config
    result: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """The first state of a run that goes on from another one.

    Attributes:
        parent: The finished run.
        state: State at the checkpoint, on the host.
        progress: Progress of the new run at this state.
        lineage: Entry `lineage` of its manifest: its parent, then the parent's parents.
    """

    parent: Parent
    state: TrainState
    progress: Progress
    lineage: list[dict[str, Any]]

    @property
    def line(self) -> str:
        """A line about the finished run."""
        return f"goes on from step {int(self.state.step)} of {self.parent.workdir}"


def parent_of(config: Config, workdir: pathlib.Path) -> Parent | None:
    """Returns the run that a new run goes on from; None if it has begun, or has no parent.

    Args:
        config: Config of the new run.
        workdir: Workdir of the new run.

    Raises:
        UserError: The parent is not there, is not finished, or is a population.
    """
    if config.extend is None or (workdir / "checkpoints" / "0").is_dir():
        return None
    place = user_path(config.extend, _KEY)
    if not (place / "config.json").is_file():
        text = (
            f"no run in {str(place)!r}; it begins at a checkpoint of that run, so give "
            "its new place if it was moved"
        )
        raise UserError(Problem(_KEY, text))
    theirs = read_config(place)
    for one, where in ((theirs, place), (config, workdir)):
        check_is_one_run(one, where)
    result = read_json(place / "result.json")
    if result is None:
        command = " ".join((read_manifest(place) or {}).get("command", [])[1:])
        text = f"the run in {str(place)!r} is not finished; resume it first"
        raise UserError(Problem(_KEY, f"{text}: {command}" if command else text))
    return Parent(workdir=place, config=theirs, result=result)


def begin(setup: Setup, parent: Parent) -> Beginning:
    """Returns the first state of a run that goes on from a finished one.

    Args:
        setup: Setup of the new run.
        parent: The finished run.

    Raises:
        UserError: The plan does not go on from that of the parent, the model is another
            one, or the parent was fitted to its validation split.
    """
    before = _setup_of(parent, setup)
    checkpoints = open_checkpoints(before, parent.workdir / "checkpoints")
    try:
        step = _step(setup.config, parent, checkpoints.steps())
        progress = checkpoints.progress(step)
        if progress.refit is not None:
            text = (
                f"the run in {str(parent.workdir)!r} was fitted to its validation split, "
                "too, which could not choose among later states; start a new run with all "
                "phases, in which only the last one fits again"
            )
            raise UserError(Problem(_KEY, text))
        _go_on(progress, step, before, setup)
        then = checkpoints.progress(step)
        state = checkpoints.restore(step, before.target(then))
        _forget_lost(progress, setup.config, parent.config, checkpoints.steps())
    finally:
        checkpoints.close()
    sha256 = {"params_sha256": digest(state.params), "state_sha256": digest(state)}
    lines = configs.differences(setup.config, parent.config)
    lineage = {
        "workdir": str(parent.workdir),
        "step": step,
        **sha256,
        "differences": [f"{x} there" for x in lines if not x.startswith(_KEY)],
    }
    averages = setup.with_ema(state).ema
    kept = {name: mean for name, mean in state.ema.items() if name in averages}
    older = (read_manifest(parent.workdir) or {}).get("lineage", [])
    return Beginning(
        parent=parent,
        state=state.replace(ema=averages | kept),
        progress=progress,
        lineage=[lineage, *older],
    )


def _setup_of(parent: Parent, setup: Setup) -> Setup:
    """Returns the setup of a finished run, with model and data of the one that goes on."""
    plan = plan_from_config(parent.config.plan)
    if setup.data.spec.train_examples:
        examples, batch_size = (
            setup.data.spec.train_examples,
            parent.config.data.batch_size,
        )
        plan = durations(plan, examples, batch_size)
    return dataclasses.replace(setup, config=parent.config, plan=plan)


def _step(config: Config, parent: Parent, steps: list[int]) -> int:
    """Returns the step of the checkpoint that a run goes on from.

    Raises:
        UserError: The parent has not kept it.
    """
    best, last = parent.result["best_step"], parent.result["steps"]
    step = last if best is None or config.extend_from == "final" else best
    if step in steps:
        return step
    other = "best" if step == last and best in steps else "final"
    text = (
        f"{config.extend_from!r}, but {parent.workdir} has not kept that checkpoint "
        f"(steps {steps}); {other!r} may be there"
    )
    raise UserError(Problem("config.extend_from", text))


def _go_on(progress: Progress, step: int, before: Setup, setup: Setup) -> None:
    """Changes the progress of a finished run to that of a run with a longer plan.

    Raises:
        UserError: Phases that have begun differ in more than the length of the last one,
            or nothing is left to be trained.
    """
    index, problems = progress.phase, list[Problem]()
    ours, theirs = setup.config.plan, before.config.plan
    for number in range(index + 1):
        if number >= len(ours):
            text = f"missing; {theirs[number].name!r} was trained there"
            problems.append(Problem(f"config.plan[{number}]", text))
            continue
        free = _LENGTH if number == index else ()
        problems += [
            Problem(
                f"config.plan[{number}].{key}",
                f"{ours[number][key]!r}, but {theirs[number][key]!r} in the run that "
                "goes on; a phase that has begun can only become longer, so add a phase",
            )
            for key in theirs[number]
            if key not in free and ours[number][key] != theirs[number][key]
        ]
    raise_if(
        problems, f"{_KEY}: the plan does not go on from that of the finished run:"
    )
    first, over = progress.ends[index - 1] if index else 0, progress.phase_is_over()
    as_long = all(ours[index][key] == theirs[index][key] for key in _LENGTH)
    end = step if over and as_long else first + (setup.plan[index].steps or 0)
    if end < step or (end == step and index == len(ours) - 1):
        text = (
            f"{end - first} updates, but {step - first} are made, so nothing is left to be "
            "trained; give more, or add a phase"
        )
        raise UserError(Problem(f"config.plan[{index}]", text))
    if over and end > step:
        if first + (before.plan[index].steps or 0) > step:  # A plateau has ended it.
            progress.plateau_bad = 0
        progress.ends = progress.ends[:index]
    progress.anchor = step


def _forget_lost(
    progress: Progress, config: Config, theirs: Config, steps: list[int]
) -> None:
    """Forgets best values that are measured otherwise or whose checkpoint is gone."""
    same = config.evaluate.best == theirs.evaluate.best and config.data == theirs.data
    if not same or progress.best_step not in steps:
        progress.best = progress.best_step = progress.best_loss = None
    if not same or progress.plateau_best_step not in steps:
        progress.plateau_best = progress.plateau_best_step = None
        progress.plateau_best_loss, progress.plateau_bad = None, 0


def write(
    beginning: Beginning, setup: Setup, workdir: pathlib.Path, loaded: Loaded
) -> None:
    """Writes the first checkpoints and metrics of a run that goes on from another one.

    Args:
        beginning: First state of the run.
        setup: Setup of the run.
        workdir: Its workdir.
        loaded: Origin of its weights.
    """
    part = workdir / "checkpoints.part"
    progress = beginning.progress
    progress.log_lines = processes.agreed(
        "the begin of the run", lambda: _copied(beginning, workdir, part)
    )
    checkpoints = open_checkpoints(setup, part, loaded)
    try:
        checkpoints.save(beginning.state, progress)
    finally:
        checkpoints.close()

    processes.wait_for_all("the first checkpoints")

    def move() -> None:
        # A kill before this leaves a run that has not begun.
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        part.rename(workdir / "checkpoints")

    processes.agreed("the first checkpoints", move)


def _copied(beginning: Beginning, workdir: pathlib.Path, part: pathlib.Path) -> int:
    """Copies metrics and checkpoints; returns the number of lines of the metrics.

    Args:
        beginning: First state of the run.
        workdir: Workdir of the run.
        part: Folder that gets the checkpoints.
    """
    progress, step = beginning.progress, int(beginning.state.step)
    theirs = beginning.parent.workdir
    lines = [
        line for line in read_metrics(theirs / "metrics.jsonl") if line["step"] == step
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    shutil.rmtree(part, ignore_errors=True)
    for other in {0, progress.best_step, progress.plateau_best_step} - {None, step}:
        place = theirs / "checkpoints" / str(other)
        shutil.copytree(place, part / str(other), copy_function=_linked)
    return len(lines)


def _linked(source: str, target: str) -> str:
    """Links a file of a checkpoint, which never changes, or copies it."""
    try:
        os.link(source, target)
    except OSError:
        return shutil.copy2(source, target)
    return target
