"""From a config to what every mode starts from: devices, data, task, plan, structures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.members import weights_addresses
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.pytrees import named, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data
from finetune_jax.optim.optimizer import (
    check_groups,
    check_optimizer,
    evaluates,
    make_optimizer,
)
from finetune_jax.optim.regularisers import (
    READS_FISHER,
    READS_START,
    entry_problems,
    match_problems,
)
from finetune_jax.optim.schedules import check_schedule, plateau_metric
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.make import make_devices
from finetune_jax.plans.micro_batches import check_batch, check_pairs
from finetune_jax.plans.phase import (
    Group,
    Phase,
    check_plan,
    durations,
    groups,
    plan_from_config,
)
from finetune_jax.tasks import check_members, make_task, task_module
from finetune_jax.tasks.components.multi_domain import (
    chosen_by,
    domain_problems,
    split_problems,
)
from finetune_jax.tasks.components.random_state import shapes_of
from finetune_jax.tasks.task import Mode, Task
from finetune_jax.training.initial.random_states import RandomStates
from finetune_jax.training.initial.schemes import check_rules, make_rules
from finetune_jax.training.initial.starting_state import (
    Loaded,
    run_data,
    starting_state,
)
from finetune_jax.training.progress import Progress
from finetune_jax.training.step import Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSetup:
    """What is static about a phase once model and plan are known.

    Attributes:
        phase: The phase.
        groups: Rate group of each parameter that learns.
        mode: How the stages run in it.
        prefixes: Of the models.
    """

    phase: Phase
    groups: Mapping[str, Group]
    mode: Mode
    prefixes: tuple[str, ...]

    @property
    def program(self) -> tuple:
        """What a compiled step depends on; phases with equal ones share it."""
        phase = self.phase
        return (
            tuple(sorted(self.groups.items())),
            self.mode,
            phase.optimizer,
            tuple(sorted(phase.optimizer_args.items())),
            phase.clip_norm,
            phase.clip_value,
            phase.clip_adaptive,
            phase.regularise,
            phase.accumulate_steps,
            phase.fixed_batch,
            phase.weight_decay,
            phase.decay,
        )

    def optimizer(self) -> Any:
        """Returns the transformation of the phase."""
        return make_optimizer(self.phase, self.groups)

    def update(
        self,
        task: Task,
        ema_decay: float | None = None,
        *,
        guarded: bool = False,
        views: int | None = None,
        rows: int = 1,
        at_a_time: int | None = None,
    ) -> Update:
        """Returns what is static about an update of the phase."""
        return Update(
            task=task,
            optimizer=self.optimizer(),
            trained=frozenset(self.groups),
            mode=self.mode,
            evaluates=evaluates(self.phase),
            repeats=self.phase.fixed_batch,
            regularise=self.phase.regularise,
            ema_decay=ema_decay,
            guarded=guarded,
            views=views,
            rows=rows,
            at_a_time=at_a_time,
        )

    def frozen(self, state: TrainState) -> dict[str, Any]:
        """Returns what the phase must leave as it is, to the bit."""
        kept = {
            f"params/{name}": leaf
            for name, leaf in named(state.params).items()
            if name not in self.groups
        }
        return kept | {
            f"batch_stats/{name}": leaf
            for name, leaf in named(state.batch_stats).items()
            if not self.mode.moves(stage_of(name, self.prefixes))
        }


def phase_setup(
    plan: tuple[Phase, ...], index: int, task: Task, names: tuple[str, ...],
    axis_name: str | None = None,
) -> PhaseSetup:  # fmt: skip
    """Returns the static part of phase `index`.

    Args:
        plan: Checked against the model.
        index: Of the phase.
        task: Has the models.
        names: Of all parameters.
        axis_name: The device axis under pmap.
    """
    learns = groups(plan, index, names)
    mode = Mode(
        learning=task.learning(
            frozenset(stage_of(name, task.prefixes) for name in learns)
        ),
        batch_stats=plan[index].batch_stats,
        axis_name=axis_name,
    )
    return PhaseSetup(
        phase=plan[index], groups=learns, mode=mode, prefixes=task.prefixes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run is, before its first update.

    Attributes:
        config: Resolved.
        devices: Of the run.
        data: Its splits.
        task: What is learned.
        plan: Phases with their length in steps.
        shapes: The state before the first phase, shapes only.
        random_states: Draws such states.
    """

    config: Config
    devices: Devices
    data: Data
    task: Task
    plan: tuple[Phase, ...]
    shapes: TrainState
    random_states: RandomStates

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return tuple(named(self.shapes.params))

    def phase(self, index: int) -> PhaseSetup:
        """Returns the static part of phase `index`."""
        axis_name = self.devices.axis_name
        return phase_setup(self.plan, index, self.task, self.names, axis_name)

    def target(self, progress: Progress) -> TrainState:
        """Returns a state of zeros with the structure that some progress implies."""
        shapes = self.with_ema(self.shapes)
        if progress.phase >= 0:
            init = self.phase(progress.phase).optimizer().init
            shapes = shapes.replace(opt_state=jax.eval_shape(init, shapes.params))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def fixed(self, start: TrainState, *, training: bool = True) -> dict[str, Any]:
        """Returns what updates read and nobody updates, for their `fixed`.

        Args:
            start: The state before the first update.
            training: Whether there will be updates.
        """
        found = {"task": self.task.fixed(start, training=training)}
        if self.regularisers & set(READS_START):
            found["start"] = dict(named(start.params))
        return found

    @property
    def regularisers(self) -> set[str]:
        """Names of the regularisers of all phases."""
        return {name for phase in self.plan for name, *_ in phase.regularise}

    def with_ema(self, state: TrainState) -> TrainState:
        """Returns a state whose averaged weights, where the config wants any, begin."""
        if self.config.evaluate.ema_decay is None:
            return state
        indices = range(len(self.plan))
        learns = {name for index in indices for name in self.phase(index).groups}
        leaves = named(state.params)
        return state.replace(ema={name: leaves[name] for name in sorted(learns)})

    @property
    def views(self) -> int | None:
        """Augmented versions of each example; None augments anew in every update."""
        views = self.config.data.cache_views
        return views if self.data.spec.augment else None

    def in_memory(self) -> "Setup":
        """Returns the run with its examples decoded, if the config lets them be kept.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        data = self.data.in_memory(self.config.data.memory_gb * 1e9)
        return dataclasses.replace(self, data=data)

    def start(self, *, measure: bool = True) -> tuple[TrainState, Loaded]:
        """Returns the state before the first update, on the host, and its origin.

        Args:
            measure: Whether schemes that run the model on examples do so. A run that
                goes on takes its start from checkpoint 0 and need not.

        Raises:
            UserError: The weights cannot be read or do not fit, or a scheme fails.
        """
        return starting_state(
            self.task, self.data, self.config, self.random_states, measure=measure
        )


def metric_names(config: Config) -> tuple[str, ...]:
    """Returns what is measured on each split, 'ema_' before what averaged weights give.

    Raises:
        UserError: No such task, one of other labels, or `config.task.metrics` is no
            tuple.
    """
    arguments = dict(config.task)
    module = task_module(arguments["name"])
    names = module.METRICS
    if isinstance(names, Mapping):
        where = f"config.data.labels, for the task {arguments['name']!r}"
        names = registry.choose(names, config.data.labels, where)
    names = arguments["metrics"] if "metrics" in arguments else names
    if not isinstance(names, tuple):
        raise UserError(f"config.task.metrics: {names!r} is not a tuple of names")
    names = tuple(dict.fromkeys((*names, "loss")))
    if hasattr(module, "measured"):
        names = module.measured(config, names)
    has_ema = config.evaluate.ema_decay is not None
    names += tuple(f"ema_{name}" for name in names if has_ema)
    return chosen_by(config.data.domains, names) if config.data.domains else names


def make_setup(
    config: Config, data: Data | None = None, like: Setup | None = None
) -> Setup:
    """Returns all that a run is. Nothing is compiled, and nothing written.

    Args:
        config: Resolved.
        data: None reads what the config names.
        like: Of another run of the same model, on data that look the same.

    Raises:
        UserError: Anything in the config that does not fit anything else.
    """
    plan = plan_from_config(config.plan)
    rules = make_rules(config.init.schemes, *weights_addresses(config).values())
    devices = make_devices(config.parallel)
    check_phases(config, plan, devices.count)
    if data is None:
        data = run_data(config)
    task = make_task(config, data.spec)
    if problems := [*split_problems(task, data), *domain_problems(config, data)]:
        raise problems_error("What is to be measured cannot be:", problems)
    for name, domain in data.spec.domains.items():
        whose = f"The share of domain {name!r} in config.data.batch_size"
        check_batch(domain.share, plan, devices.count, whose)
        check_pairs(domain.mix, domain.share, plan, devices.count)
    if problems := task.check_fixed():
        raise problems_error("What is to be learned cannot be:", problems)
    if like is None:
        shapes = shapes_of(task, config.model.name)
        random_states = RandomStates(task, shapes)
    else:
        shapes, random_states = like.shapes, like.random_states
    if data.spec.train_examples:  # Else lengths stay in epochs.
        plan = durations(plan, data.spec.train_examples, config.data.batch_size)
    names = tuple(named(shapes.params))
    check_plan(plan, names)
    check_groups_of(plan, names)
    check_rules(
        rules,
        named(shapes.params),
        task=task,
        spec=data.spec,
        fresh=config.init.fresh,
    )
    return Setup(
        config=config,
        devices=devices,
        data=data,
        task=task,
        plan=plan,
        shapes=shapes,
        random_states=random_states,
    )


def check_groups_of(plan: tuple[Phase, ...], names: tuple[str, ...]) -> None:
    """Checks what the phases do with the parameters that learn in them.

    Raises:
        UserError: Regularisers of what does not learn, a line search along many lines.
    """
    problems = []
    for index, phase in enumerate(plan):
        learns = groups(plan, index, names)
        where = f"phase {phase.name!r}, regularise"
        problems += match_problems(phase.regularise, learns, where)
        problems += check_groups(phase, learns)
    if problems:
        raise problems_error("The plan cannot be run:", problems)


def check_phases(config: Config, plan: tuple[Phase, ...], devices: int) -> None:
    """Checks what can be checked of a plan before the data is opened.

    Raises:
        UserError: Optimizers, schedules or metrics that there are not; a batch that does
            not divide.
    """
    problems = check_members(config)
    problems += [text for phase in plan for text in check_schedule(phase)]
    for phase in plan:
        where = f"phase {phase.name!r}, regularise"
        if wrong := entry_problems(phase.regularise, where):
            problems += wrong
            continue
        problems += check_optimizer(phase)
        asked = {name for name, *_ in phase.regularise if isinstance(name, str)}
        if asked & set(READS_FISHER) and config.init.fisher is None:
            problems.append(
                f"{where}: ewc needs config.init.fisher, the label of a domain in "
                "config.evaluate.also whose `train` split gives the Fisher information"
            )
    metrics = [("config.evaluate.best", config.evaluate.best)]
    for phase in plan:
        where = f"phase {phase.name!r}"
        metrics.append((f"{where}, plateau_metric", phase.plateau_metric))
        if phase.schedule == "plateau" and not check_schedule(phase):
            metrics.append((f"{where}, schedule_args.metric", plateau_metric(phase)))
    known = [
        f"{split}/{name}"
        for split in ("validation",)  # The test split chooses nothing.
        if config.data[split] is not None
        for name in metric_names(config)
    ]
    problems += [
        f"{where}: {name!r} cannot choose{registry.closest(name, known)} "
        f"There are {', '.join(known) or 'none: config.data.validation is None'}."
        for where, name in metrics
        if name is not None and name not in known
    ]
    often = config.evaluate.every_steps or config.evaluate.every_epochs
    plateaus = any(p.plateau_metric or p.schedule == "plateau" for p in plan)
    if plateaus and not often:
        problems.append(
            "config.evaluate: a plateau needs every_steps or every_epochs to be seen"
        )
    if problems:
        raise problems_error("The plan cannot be run:", problems)
    check_batch(config.data.batch_size, plan, devices)
    if not config.data.domains:
        check_pairs(config.data.mix, config.data.batch_size, plan, devices)
