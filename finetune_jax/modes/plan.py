"""`--mode=plan`: trained parameters and cost of each phase, by shapes only.

Phases that share a program are traced once. Nothing is compiled for one device, unless the
config says how much memory it has; for several, the update of each phase is compiled, which
tells its memory and communication, but no array is made. If the data is missing,
`data.image_size`, `data.channels` and `model.classes` describe it, and lengths stay in
epochs. The last lines say whether data and weights are there and fit the model.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from finetune_jax.config import Config
from finetune_jax.config.members import labels_of
from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.core.flops import count_flops
from finetune_jax.core.machine import uncollected
from finetune_jax.core.paths import printable
from finetune_jax.core.pytrees import count, named, nbytes, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, no_data
from finetune_jax.data.kind import kind_named, kind_of, weight_keys
from finetune_jax.data.spec import DataSpec
from finetune_jax.evaluation.diagnostics import open_domains
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.modes.memory import planned_devices, print_memory
from finetune_jax.modes.options import Options
from finetune_jax.plans.phase import Phase
from finetune_jax.sweeps.populations.population import member_configs, member_setups
from finetune_jax.tasks.task import Task
from finetune_jax.training.extension import begin, parent_of
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.training.initial.weights_check import weights_lines
from finetune_jax.training.overview import data_lines, plan_warnings
from finetune_jax.training.phases import PhaseSetup
from finetune_jax.training.setup import Setup, check_before_data, make_setup
from finetune_jax.training.step import train_step
from finetune_jax.training.updates.memory import batch_shapes
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults


def main(config: Config, options: Options) -> int:
    """Prints a table of the phases; returns the exit status."""
    with planned_devices(config.parallel):
        return _planned(config, options)


def _planned(config: Config, options: Options) -> int:
    check_before_data(config)
    config, lines = with_weight_defaults(config, weight_keys(config.data))
    parent = parent_of(config, options.workdir or pathlib.Path("runs"))
    print("".join(f"{line}\n" for line in lines), end="")
    data, missing = data_of(config)
    is_there = missing is None
    setup = make_setup(config, data)
    if parent is not None:
        print(begin(setup, parent).line)
    # Other domains and members can only be checked with the data.
    if is_there:
        open_domains(setup.config, setup.data)
    if config.population:
        members = member_configs(config)
        if is_there:
            member_setups(setup, members, decode=False)
        print(f"{len(members)} members; this is the plan without their overrides")
    task, state, spec = setup.task, setup.shapes, data.spec
    for text in kind_named(spec.kind).lines(spec):
        print(text)
    forward = forward_flops(task, state, config.data.batch_size)
    inputs, outputs = "x".join(map(str, spec.shape)), spec.outputs
    if spec.domains:
        inputs, outputs = _domains(spec), f"{len(spec.domains)} domains"
    console = Console(soft_wrap=True)
    console.print(
        f"{_learners(config, task)}: {count(state.params):,} parameters in "
        f"{len(task.models.stages)} stages ({', '.join(task.models.stages)}); input "
        f"{inputs}, {outputs}; "
        f"forward pass of {config.data.batch_size}: {forward / 1e9:.3f} GFLOP",
        highlight=False,
    )
    _print_phases(setup, forward)
    print_memory(setup)
    for text in plan_warnings(setup):
        print(f"warning: {text}")
    known = data_lines(config, data)
    if missing is not None:
        known = [f"not there: {'; '.join(map(str, missing.problems))}"]
    _print_section("data", known)
    # Last, so that a plan is printed even if its weights are not there.
    weights = weights_lines(task, config, state, data if is_there else None)
    _print_section("weights", weights)
    return 0


def _print_phases(setup: Setup, forward: float) -> None:
    """Prints a table of the phases.

    Args:
        setup: Setup of the run.
        forward: Operations of a forward pass.
    """
    config, task, state = setup.config, setup.task, setup.shapes
    table = Table(show_lines=True)
    for title in (
        "phase", "steps", "learning stages", "trained", "frozen", "optimizer state",
        "FLOPs a step", "learning rate", "batch_stats",
    ):  # fmt: skip
        table.add_column(title, overflow="fold")
    costs: dict[Any, tuple[float, int]] = {}
    for index in range(len(setup.plan)):
        phase = setup.phase(index)
        if phase.program not in costs:
            opt_state = jax.eval_shape(phase.optimizer().init, state.params)
            flops = math.nan  # A fit has no batch.
            if phase.compiled.probe is None:
                flops = step_flops(phase, task, state, config.data.batch_size)
            costs[phase.program] = flops, nbytes(opt_state)
        table.add_row(*_row(phase, task, state, *costs[phase.program], forward))
    console = Console(soft_wrap=True)
    Console(width=None if console.is_terminal else 160).print(table)


def _print_section(title: str, lines: Sequence[str]) -> None:
    for first, line in enumerate(lines):
        print(f"{'' if first else title:9}{printable(line)}")


def _learners(config: Config, task: Task) -> str:
    """Returns the names of the trained models, and of their teachers."""
    prefixes = task.models.prefixes
    names = config.model.name if "" in prefixes else ", ".join(prefixes)
    teachers = ", ".join(labels_of(config.model))
    return f"{names}, taught by {teachers}" if task.teachers is not None else names


def _domains(spec: DataSpec) -> str:
    """Returns input shape, classes and share of an update of each domain."""
    found = [
        f"{name} {'x'.join(map(str, of.shape))} ({len(of.class_names)} classes, "
        f"{of.share} an update{'' if of.labelled else ', without labels'})"
        for name, of in spec.domains.items()
    ]
    return "; ".join(found)


def data_of(config: Config) -> tuple[Data, DataMissing | None]:
    """Returns the data, or data without examples and why it is missing.

    Raises:
        UserError: The data is missing and the config does not describe it, or the data
            does not fit the config.
    """
    try:
        return run_data(config), None
    except DataMissing as missing:
        kind = kind_named(kind_of(config.data))
        try:
            spec = kind.without_data(config.data, config.model.classes)
        except UserError as error:
            raise UserError(*missing.problems, *error.problems) from missing
        if spec is None:
            raise
        return no_data(spec), missing


def forward_flops(task: Task, state: TrainState, batch_size: int) -> float:
    """Returns the operations of one evaluation step, by shapes only."""
    step = functools.partial(eval_step, task=task)
    batch = batch_shapes(task, task.batch_spec, batch_size)
    return _flops(step, state.params, state.batch_stats, batch)


def _flops(function: Callable, *arguments: Any) -> float:
    """Returns the operations of a function of arrays of these shapes."""
    with uncollected():
        traced = jax.jit(function).trace(*arguments)
    return count_flops(traced.jaxpr.jaxpr)


def step_flops(
    phase: PhaseSetup, task: Task, state: TrainState, batch_size: int
) -> float:
    """Returns the operations of one update of a phase, by shapes only."""
    optimizer = phase.optimizer()
    # Of one device: under pmap the sums over devices would have no axis here.
    mode = dataclasses.replace(phase.mode, axis_name=None)
    phase = dataclasses.replace(phase, mode=mode)
    step = functools.partial(train_step, static=phase.update(task))
    micro = phase.phase.accumulate_steps
    number = jax.ShapeDtypeStruct((), np.float32)
    return _flops(
        step,
        state.replace(opt_state=jax.eval_shape(optimizer.init, state.params)),
        {
            "task": {} if task.teachers is None else task.teachers.shapes(),
            **dict.fromkeys(("start", "fisher"), named(state.params)),
        },
        batch_shapes(task, task.train_batch_spec, batch_size, micro),
        number,
        number,
    )


def _row(
    phase: PhaseSetup,
    task: Task,
    state: TrainState,
    flops: float,
    opt_state_bytes: int,
    forward: float,
) -> list[str]:
    parts, params, models = phase.phase, named(state.params), task.models
    trained = {name: params[name] for name in phase.groups}
    by_rate: dict[float, set[str]] = {}
    for name, group in phase.groups.items():
        by_rate.setdefault(group.scale, set()).add(stage_of(name, models.prefixes))
    lines = [", ".join(s for s in models.stages if s in phase.mode.learning) or "none"]
    if len(by_rate) > 1:
        lines = [
            f"{', '.join(sorted(by_rate[rate], key=models.stages.index))} (x{rate:g})"
            for rate in sorted(by_rate, reverse=True)
        ]
    return [
        parts.name,
        _length(parts),
        "\n".join(lines),
        f"{count(trained):,}",
        f"{count(state.params) - count(trained):,}",
        f"{opt_state_bytes:,} bytes",
        "features once"
        if math.isnan(flops)
        else f"{flops / 1e9:.3f} G = {flops / forward:.2f} forward",
        phase.compiled.rates,
        parts.batch_stats,
    ]


def _length(phase: Phase) -> str:
    if phase.steps is None:
        return f"{phase.epochs:g} epochs"
    most = "at most " if phase.plateau_metric else ""
    return f"{most}{math.floor(phase.steps):,}"
