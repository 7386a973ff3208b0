"""Builds a run from its config: devices, data, task, plan, parameter shapes."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.members import weights_addresses
from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError, collected, raise_if, under
from finetune_jax.core.pytrees import named
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data
from finetune_jax.data.kind import kind_of
from finetune_jax.models import constructors
from finetune_jax.optim import PhaseOptimizer, compile_phase
from finetune_jax.optim.regularisers import (
    READS_FISHER,
    READS_START,
    entry_problems,
    match_problems,
)
from finetune_jax.parallel import processes
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.make import for_parameters, make_devices
from finetune_jax.plans.micro_batches import check_batch
from finetune_jax.plans.phase import Phase, check_plan, durations, plan_from_config
from finetune_jax.tasks import check_members, make_task, task_module
from finetune_jax.tasks.components.multi_domain import (
    chosen_by,
    domain_problems,
    split_problems,
)
from finetune_jax.tasks.components.random_state import shapes_of
from finetune_jax.tasks.components.targets import measured_names
from finetune_jax.tasks.objectives import thresholds
from finetune_jax.tasks.task import Task
from finetune_jax.training.initial.random_states import RandomStates
from finetune_jax.training.initial.schemes import check_rules, make_rules
from finetune_jax.training.initial.starting_state import (
    Loaded,
    run_data,
    starting_state,
)
from finetune_jax.training.phases import PhaseSetup, phase_setup
from finetune_jax.training.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A run before its first update.

    Attributes:
        config: Resolved config.
        devices: Devices of the run.
        data: Splits of the data.
        task: Task of the run.
        plan: Phases with their lengths in steps.
        shapes: Shapes of the state before the first phase.
        random_states: Function that draws random initial states.
    """

    config: Config
    devices: Devices
    data: Data
    task: Task
    plan: tuple[Phase, ...]
    shapes: TrainState
    random_states: RandomStates

    @functools.cached_property
    def phases(self) -> tuple[PhaseSetup, ...]:
        """All phases for the models of the run."""
        axis_name = self.devices.axis_name
        return tuple(
            phase_setup(self.plan, index, self.task, self.names, axis_name)
            for index in range(len(self.plan))
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return tuple(named(self.shapes.params))

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that learn in any phase."""
        params = named(self.shapes.params)
        learning = {name for phase in self.phases for name in phase.groups}
        return sum(math.prod(params[name].shape) for name in learning)

    def phase(self, index: int) -> PhaseSetup:
        """Returns phase `index` for the models of the run."""
        return self.phases[index]

    def target(self, progress: Progress) -> TrainState:
        """Returns a state of zeros with the structure of a state at some progress."""
        shapes = self.shapes_at(progress)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def shapes_at(self, progress: Progress) -> TrainState:
        """Returns the shapes of a state at some progress."""
        shapes = self.with_ema(self.shapes)
        if progress.phase >= 0:
            init = self.phase(progress.phase).optimizer().init
            shapes = shapes.replace(opt_state=jax.eval_shape(init, shapes.params))
        return shapes

    def fixed(self, start: TrainState) -> dict[str, Any]:
        """Returns the arrays that updates read and never change.

        Args:
            start: State before the first update.
        """
        teachers = self.task.teachers
        found: dict[str, Any] = {"task": {}}
        if teachers is not None:
            found["task"] = teachers.variables(start)
        if self.regularisers & set(READS_START):
            found["start"] = dict(named(start.params))
        return found

    @property
    def regularisers(self) -> set[str]:
        """Names of the regularisers of all phases."""
        return {name for phase in self.plan for name, *_ in phase.regularise}

    def with_ema(self, state: TrainState) -> TrainState:
        """Returns a state with averaged weights, if the config asks for them."""
        if self.config.evaluate.ema_decay is None:
            return state
        learns = {name for phase in self.phases for name in phase.groups}
        leaves = named(state.params)
        return state.replace(ema={name: leaves[name] for name in sorted(learns)})

    @property
    def views(self) -> int | None:
        """Augmented versions of each example; None augments anew in every update."""
        views = self.config.data.cache_views
        return views if self.data.spec.augment else None

    def in_memory(self) -> "Setup":
        """Returns the run with decoded examples in memory, if `data.memory_gb` allows.

        One of several processes decodes an example when it first needs it.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        limit, lazily = self.config.data.memory_gb * 1e9, processes.count() > 1
        data = self.data.in_memory(limit, lazily=lazily)
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
    """Returns the metrics of each split; the prefix 'ema_' is for averaged weights.

    Raises:
        UserError: Unknown task, labels that it does not take, or `config.task.metrics` is
            no tuple.
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
    names = measured_names(names, arguments)
    if arguments.get("threshold_rule") is not None:
        names += thresholds.METRICS
    if hasattr(module, "measured"):
        names = module.measured(config, names)
    has_ema = config.evaluate.ema_decay is not None
    names += tuple(f"ema_{name}" for name in names if has_ema)
    return chosen_by(config.data.domains, names) if config.data.domains else names


def check_before_data(config: Config) -> None:
    """Checks all sections of a config as far as that needs no data.

    Raises:
        UserError: Lists what is wrong in any of them.
    """
    problems: list[Problem] = []
    with collected(problems):
        registry.choose(constructors(), config.model.name, "config.model.name")
    with collected(problems):
        if not config.data.domains:
            kind_of(config.data)
    with collected(problems):
        make_rules(config.init.schemes, *weights_addresses(config).values())
    with collected(problems):
        task_module(config.task["name"])
        plan = plan_from_config(config.plan)
        check_phases(config, plan, make_devices(config.parallel).batch_shards)
    raise_if(dict.fromkeys(problems))


def make_setup(
    config: Config, data: Data | None = None, like: Setup | None = None
) -> Setup:
    """Returns the setup of a run. Nothing is compiled, and nothing is written.

    Args:
        config: Resolved config.
        data: Data of the run; None opens it.
        like: Setup of another run of the same model, whose shapes are reused.

    Raises:
        UserError: Parts of the config that contradict each other, the data or the model.
    """
    plan = plan_from_config(config.plan)
    rules = make_rules(config.init.schemes, *weights_addresses(config).values())
    devices = make_devices(config.parallel)
    check_phases(config, plan, devices.batch_shards)
    if data is None:
        data = run_data(config)
    task = make_task(config.task, config.model, config.precision, data.spec)
    raise_if([*split_problems(task, data), *domain_problems(config, data)])
    for index, domain in enumerate(data.spec.domains.values()):
        key = f"config.data.domains[{index}].weight"
        check_batch(domain.share, plan, devices.batch_shards, key, mix=domain.mix)
    if task.teachers is not None:
        raise_if(task.teachers.problems())
    if like is None:
        shapes = shapes_of(task, config.model.name)
        random_states = RandomStates(task, shapes, devices)
    else:
        shapes, random_states = like.shapes, like.random_states
    if data.spec.train_examples:  # Else lengths stay in epochs.
        plan = durations(plan, data.spec.train_examples, config.data.batch_size)
    params = named(shapes.params)
    check_plan(plan, params)
    devices = for_parameters(devices, shapes.params, task.models.attention_heads)
    check_rules(rules, params, task=task, spec=data.spec, fresh=config.init.fresh)
    setup = Setup(
        config=config,
        devices=devices,
        data=data,
        task=task,
        plan=plan,
        shapes=shapes,
        random_states=random_states,
    )
    _check_trained(setup)
    return setup


def _check_trained(setup: Setup) -> None:
    """Checks the phases against the parameters that are trained in them.

    Raises:
        UserError: Regularisers of frozen parameters, a line search with several rates, a
            linear probe without features.
    """
    problems: list[Problem] = []
    for index, phase in enumerate(setup.phases):
        with collected(problems), under(f"config.plan[{index}]"):
            raise_if(
                [
                    *match_problems(phase.phase.regularise, phase.groups),
                    *phase.compiled.group_problems(phase.groups),
                ]
            )
        if phase.compiled.probe is not None:
            problems += _probe_problems(setup, phase, f"config.plan[{index}]")
    raise_if(problems)


def _probe_problems(setup: Setup, phase: PhaseSetup, place: str) -> list[Problem]:
    """Returns what keeps a linear probe from fitting features of all examples."""
    config, task, problems = setup.config, setup.task, list[Problem]()
    fits = f"{phase.phase.optimizer} fits the features of each example once"

    def add(key: str, text: str) -> None:
        problems.append(Problem(key, text))

    if setup.data.spec.domains or task.teachers is not None:
        text = f"{fits} to its label, but there are domains or teachers; use head_only"
        add(f"{place}.optimizer", text)
    elif task.models.frozen_prefix_end(phase.mode) is None:
        text = (
            f"no stage before the trained ones is frozen, but {fits}; see head_only()"
        )
        add(f"{place}.rules", text)
    if config.data.sampling != "uniform":
        text = (
            f"{config.data.sampling!r}, but {fits}; "
            "config.task.class_weights='balanced' gives rare classes more weight"
        )
        add("config.data.sampling", text)
    if config.data.mix:
        add("config.data.mix", f"{config.data.mix!r}, but {fits}; leave it out")
    penalties = phase.compiled.probe.penalties if phase.compiled.probe else ()
    if config.data.validation is None and len(penalties) > 1:
        text = (
            "None, but it chooses the penalty; name a split, or give one penalty: "
            f"{place}.optimizer_args.penalties=(1e-3,)"
        )
        add("config.data.validation", text)
    if refits(setup, phase) and dict(config.task).get("threshold_rule") is not None:
        text = (
            "chooses on the validation split, but the linear probe is fitted to it, too; "
            f"set {place}.optimizer_args.refit=False"
        )
        add(thresholds.KEY, text)
    return problems


def refits(setup: Setup, phase: PhaseSetup) -> bool:
    """Returns whether a phase fits a linear probe to the validation split, too.

    Only the last phase does: later ones could not be chosen by a split that is not unseen
    any more. Nor does a run with `data.per_class`, which asks for few labels.
    """
    probe, config = phase.compiled.probe, setup.config
    is_last = phase is setup.phases[-1]
    has_both = config.data.validation is not None and config.data.per_class is None
    return probe is not None and probe.refit and is_last and has_both


def check_phases(config: Config, plan: tuple[Phase, ...], devices: int) -> None:
    """Checks all of a plan that can be checked before the data is opened.

    Raises:
        UserError: Unknown optimizer, schedule or metric; a batch size that is not
            divisible.
    """
    problems = [Problem.of(text) for text in check_members(config)]
    metrics = [("config.evaluate.best", config.evaluate.best)]
    for index, phase in enumerate(plan):
        place = f"config.plan[{index}]"
        metrics.append((f"{place}.plateau_metric", phase.plateau_metric))
        with collected(problems), under(place):
            raise_if(entry_problems(phase.regularise))
            if (plateau := _compiled(phase, config).plateau) is not None:
                metrics.append((f"{place}.schedule_args.metric", plateau.metric))
    known = []  # The test split chooses nothing.
    if config.data.validation is not None:
        known = [f"validation/{name}" for name in metric_names(config)]
    problems += [
        Problem(
            key,
            f"{name!r} cannot choose{registry.closest(name, known) or '.'} "
            f"There are {', '.join(known) or 'none: config.data.validation is None'}.",
        )
        for key, name in metrics
        if name is not None and name not in known
    ]
    rule = dict(config.task).get("threshold_rule")
    if rule is not None and config.data.validation is None:
        text = f"{rule!r} chooses on config.data.validation, which is None"
        problems.append(Problem(thresholds.KEY, text))
    is_measured = config.evaluate.every_steps or config.evaluate.every_epochs
    if len([name for _, name in metrics[1:] if name]) and not is_measured:
        text = "None, but a plateau needs every_steps or every_epochs to be seen"
        problems.append(Problem("config.evaluate.every_steps", text))
    raise_if(problems)
    mix = () if config.data.domains else config.data.mix
    check_batch(config.data.batch_size, plan, devices, mix=mix)


def _compiled(phase: Phase, config: Config) -> PhaseOptimizer:
    """Returns the optimizer of a phase whose regularisers are checked.

    Raises:
        UserError: Keys are relative to the phase.
    """
    problems: list[Problem] = []
    names = {name for name, *_ in phase.regularise}
    if names & set(READS_FISHER) and config.init.fisher is None:
        text = (
            "ewc needs config.init.fisher, the label of a domain in config.evaluate.also "
            "whose `train` split gives the Fisher information"
        )
        problems.append(Problem("regularise", text))
    with collected(problems):
        compiled = compile_phase(phase)
        if not problems:
            return compiled
    raise UserError(*problems)
