"""Assembles evaluator, executor, cache and loop of a run from its setup."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.array_store import Tables
from finetune_jax.core.machine import cache_folder
from finetune_jax.core.paths import user_path
from finetune_jax.core.pytrees import named
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, Dataset
from finetune_jax.evaluation.diagnostics import (
    domain_named,
    make_extras,
    open_domains,
)
from finetune_jax.evaluation.evaluator import Evaluator
from finetune_jax.evaluation.fisher import domain_fisher
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.features import folders
from finetune_jax.features.cache import FeatureStore
from finetune_jax.optim.regularisers import READS_FISHER
from finetune_jax.parallel import processes
from finetune_jax.parallel.executor import DeviceExecutor, Executor
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import Terminal
from finetune_jax.report.trackers import make_trackers
from finetune_jax.training.checkpoints.held import AnyCheckpoints
from finetune_jax.training.initial.starting_state import Loaded
from finetune_jax.training.loop import Loop
from finetune_jax.training.preemption import Stop
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup, make_setup
from finetune_jax.training.updates.nonfinite import Guard
from finetune_jax.training.updates.programs import Updates


@dataclasses.dataclass(kw_only=True)
class Shared:
    """Parts that runs of one model and one data set share, one run after another.

    The runs may differ in seeds, plans, initialisation schemes and label smoothing.

    Attributes:
        like: Setup of the first run.
        domains: Other domains, on which states are measured too.
        executor: Compiled programs.
        store: Cache of features.
        data: Data in memory, by the seed that chooses examples.
    """

    like: Setup | None = None
    domains: tuple[Domain, ...] = ()
    executor: DeviceExecutor | None = None
    store: FeatureStore | None = None
    data: dict[int | None, Data] = dataclasses.field(default_factory=dict)
    _start: tuple[str, tuple[TrainState, Loaded]] | None = None
    _decoded: set[int | None] = dataclasses.field(default_factory=set)

    def setup(self, config: Config, data: Callable[[], Data]) -> Setup:
        """Returns the setup of a run.

        Args:
            config: Config of the run.
            data: Opens its data.

        Raises:
            UserError: The config does not fit the model or the data.
        """
        seed = _seed_of_data(config)
        if seed not in self.data:
            self.data[seed] = data()
        setup = make_setup(config, self.data[seed], like=self.like)
        if self.like is None:
            self.like = setup
            self.domains = open_domains(config, setup.data)
            self.executor = DeviceExecutor(devices=setup.devices)
        return setup

    def start(self, setup: Setup, *, measure: bool) -> tuple[TrainState, Loaded]:
        """Returns the state before the first update, and its origin; see `Setup.start`.

        The last one is kept: the runs of a grid start alike.
        """
        config = setup.config
        drawn = configs.seeds(config)
        if not config.init.schemes:  # Which may measure examples.
            drawn["order"] = _seed_of_data(config) or 0
        init = config.init.to_dict()
        key = repr((drawn, init, measure))
        if self._start is None or self._start[0] != key:
            self._start = None
            self._start = key, setup.start(measure=measure)
        return self._start[1]

    def in_memory(self, setup: Setup) -> Setup:
        """Returns the setup of a run with its examples in memory, as far as they fit."""
        seed = _seed_of_data(setup.config)
        if seed not in self._decoded:
            self.data[seed] = setup.in_memory().data
            self._decoded.add(seed)
        return dataclasses.replace(setup, data=self.data[seed])

    def store_of(self, setup: Setup, terminal: Terminal) -> FeatureStore | None:
        """Returns the cache of features; its messages go to the terminal of the run."""
        if self.store is None:
            self.store = make_store(setup, terminal)
        if self.store is not None:
            tables = dataclasses.replace(self.store.tables, say=terminal.say)
            self.store.tables = tables
        return self.store


def _seed_of_data(config: Config) -> int | None:
    """Returns the seed that draws the examples of a run; None if it takes all."""
    few = config.data.per_class is not None
    return configs.seeds(config)["order"] if few else None


def make_fixed(
    setup: Setup, start: TrainState, domains: tuple[Domain, ...] = ()
) -> dict[str, Any]:
    """Returns the placed arrays that updates read and nobody updates.

    Args:
        setup: Setup of the run.
        start: State before the first update, on the host.
        domains: Other domains, one of which may give the Fisher information.
    """
    fixed = setup.fixed(start)
    if setup.regularisers & set(READS_FISHER):
        fisher = domain_fisher(
            domain_named(domains, setup.config.init.fisher or ""),
            start,
            examples=setup.config.init.fisher_examples,
            seed=configs.seeds(setup.config)["order"],
        )
        fixed["fisher"] = dict(named(fisher))
    return setup.devices.place(fixed)


def make_evaluator(
    setup: Setup,
    start: TrainState,
    domains: tuple[Domain, ...] = (),
    *,
    executor: Executor | None = None,
    store: FeatureStore | None = None,
    training: bool = True,
) -> Evaluator:
    """Returns the evaluator of a run that began with `start`.

    Args:
        setup: Setup of the run.
        start: State before the first update, on the host.
        domains: Other domains, on which states are measured too.
        executor: Executor of the run; None makes one.
        store: Cache of features; None computes them again.
        training: Whether there will be updates.
    """
    evaluate = setup.config.evaluate
    executor = executor or DeviceExecutor(devices=setup.devices)
    return Evaluator(
        task=setup.task,
        executor=executor,
        batch_size=evaluate.batch_size,
        training=training,
        ema=evaluate.ema_decay is not None,
        chosen_ema="/ema_" in (evaluate.best or ""),
        extras=make_extras(setup.config, setup.data, start, domains),
        store=store,
        compiled_before=executor.compile_s + (store.compile_s if store else 0.0),
    )


def make_loop(
    setup: Setup,
    evaluator: Evaluator,
    fixed: dict[str, Any],
    checkpoints: AnyCheckpoints,
    begun: tuple[TrainState, Progress],
    *,
    workdir: pathlib.Path,
    terminal: Terminal,
    stop: Stop,
) -> Loop:
    """Returns the loop of a run.

    Args:
        setup: Setup of the run.
        evaluator: Evaluator of its states, whose executor makes the updates too.
        fixed: Arrays from `make_fixed`.
        checkpoints: Checkpoints of the run.
        begun: State to begin with or to continue from, on the host, and the progress of
            the run at this state.
        workdir: Folder that gets the metrics.
        terminal: Terminal that a person reads.
        stop: Whether the run was asked to stop.
    """
    config, (state, progress) = setup.config, begun
    trackers = make_trackers(
        config.report,
        lambda: json.loads(configs.to_json(config)),
        workdir=workdir,
        first_step=int(state.step) + 1 if progress.log_lines else 0,
    )
    log = MetricsLog(
        workdir / "metrics.jsonl", keep_lines=progress.log_lines, trackers=trackers
    )
    return Loop(
        setup=setup,
        evaluator=evaluator,
        checkpoints=checkpoints,
        log=log,
        terminal=terminal,
        guard=Guard(
            **config.nonfinite,
            config=config,
            dataset=setup.data.train,
            log=log,
            terminal=terminal,
            folder=workdir / "nonfinite",
        ),
        progress=progress,
        stop=stop,
        updates=Updates(
            setup=setup,
            executor=evaluator.executor,
            fixed=fixed,
            say=terminal.say,
        ),
        state=state,
    )


def make_store(setup: Setup, terminal: Terminal) -> FeatureStore | None:
    """Returns the cache of features; None if the config or the task allows none."""
    data = setup.config.data
    if data.cache == "off":
        return None
    if data.on_error == "skip":
        terminal.say(
            "outputs of frozen stages are not cached: config.data.on_error=skip"
        )
        return None
    has_several = setup.task.models.prefixes != ("",)
    if has_several:
        terminal.say(
            "outputs of frozen stages are not cached: the task has several models"
        )
    if has_several and setup.task.teachers is None:
        return None
    folder = user_path(
        data.cache_dir or cache_folder() / "features", "config.data.cache_dir"
    )
    return FeatureStore(
        task=setup.task,
        devices=setup.devices,
        tables=Tables(
            folder=folder,
            limit=data.cache_gb * 1e9,
            memory=data.memory_gb * 1e9,
            say=terminal.say,
            writes=folders.writes(folder),
            wait=functools.partial(processes.wait_for_all, "a table of features"),
        ),
        batch_size=setup.config.evaluate.batch_size,
        splits={
            part.key: name
            for name, part in {"train": setup.data.train, **setup.data.held_out}.items()
            if isinstance(part, Dataset)
        },
    )
