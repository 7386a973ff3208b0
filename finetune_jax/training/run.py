"""The story of a training run."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.array_store import Tables
from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json, write_text
from finetune_jax.core.machine import cache_folder
from finetune_jax.core.paths import user_path
from finetune_jax.core.pytrees import digest, named
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.class_order import in_order_of_run
from finetune_jax.data.dataset import Data
from finetune_jax.data.spec import check_reads_alike
from finetune_jax.data.tables.encoding import VOCABULARY, read_fitted, write_fitted
from finetune_jax.evaluation.diagnostics import (
    domain_fisher,
    domain_named,
    make_extras,
    open_domains,
)
from finetune_jax.evaluation.evaluator import Evaluator
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.features.cache import FeatureStore
from finetune_jax.optim.regularisers import READS_FISHER
from finetune_jax.plans.phase import optimizer_state_moves
from finetune_jax.report.manifest import make_manifest
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import Terminal
from finetune_jax.report.trackers import Tracker, make_trackers
from finetune_jax.report.workdir import (
    check_same_inputs,
    check_same_run,
    locked,
    make_folder,
    read_json,
    read_manifest,
)
from finetune_jax.training.checkpoint import Checkpoints, HeldCheckpoints
from finetune_jax.training.initial.starting_state import Loaded, run_data, tokenizer_of
from finetune_jax.training.loop import Loop
from finetune_jax.training.nonfinite import Guard
from finetune_jax.training.overview import overview
from finetune_jax.training.preemption import Stop
from finetune_jax.training.programs import Updates
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup, make_setup
from finetune_jax.training.summary import write_report
from finetune_jax.weights.metadata.preprocessing import filled


def run(
    config: Config, workdir: pathlib.Path, stop: Stop | None = None
) -> dict[str, Any]:
    """Trains, or goes on training, and returns what `result.json` holds.

    Args:
        config: Resolved.
        workdir: Made if need be; a run in it is taken up where it stopped.
        stop: Asked after every update; None is never.

    Raises:
        UserError: The config cannot be run, or the workdir holds another run.
        TrainingError: The run cannot go on.
        Preempted: The run was asked to stop, and has saved.
    """
    begin, terminal = time.perf_counter(), Terminal()
    config, notes = filled(config)
    check_same_run(workdir, config)
    setup = make_setup(config, data_of_run(config, workdir))
    domains = open_domains(setup.config, setup.data)
    begun = (workdir / "checkpoints" / "0").is_dir()
    start, loaded = setup.start(measure=not begun)
    told = tell(setup, domains, loaded, notes, terminal)
    setup.random_states.forget()
    setup = setup.in_memory()
    inputs = inputs_of(setup, domains, loaded)
    make_folder(workdir)
    with locked(workdir):
        record(workdir, setup, inputs, told)
        loop = _taken_up(workdir, setup, domains, start, terminal, stop or Stop())
        del start
        try:
            loop.run()
            loop.updates.forget()
            result, best = make_result(loop, begin)
            write_report(setup, loop.evaluator, best, loop.progress, result, workdir)
        finally:
            terminal.end_phase()
            loop.log.close()
            loop.checkpoints.close()
        _tell_unreadable(workdir, setup, terminal)
        write_json(workdir / "result.json", result)
    return result


def data_of_run(config: Config, workdir: pathlib.Path) -> Data:
    """Returns the data of a run, its classes in the order that the run began with.

    Args:
        config: Config of the run.
        workdir: Workdir of the run, which need not be there yet.

    Raises:
        UserError: The data cannot be read, or not as the run has read them.
    """
    # Columns are encoded as they were for training, whatever the files hold by now.
    is_table = (workdir / VOCABULARY).is_file()
    fitted = read_fitted(workdir, "--workdir") if is_table else None
    data = run_data(config, fitted)
    looks = (read_manifest(workdir) or {}).get("data")
    if not isinstance(looks, dict):
        return data
    data = in_order_of_run(data, looks)
    check_reads_alike(data.spec, looks, f"--workdir: {workdir}")
    return data


def tell(
    setup: Setup,
    domains: Sequence[Domain],
    loaded: Loaded,
    notes: Sequence[str],
    terminal: Terminal,
) -> dict[str, list[str]]:
    """Prints the overview of a run and its warnings, and returns both for the manifest.

    Args:
        setup: Setup of the run.
        domains: Other domains that states are measured on.
        loaded: Weights that the run starts from.
        notes: Lines about config keys that files beside the weights decided.
        terminal: Terminal that a person reads.
    """
    lines = overview(setup, loaded, notes)
    warnings = data_warnings(setup, domains, loaded.told)
    terminal.tell(lines, warnings)
    return {"overview": lines, "warnings": warnings}


def data_warnings(
    setup: Setup, domains: Sequence[Domain], more: Sequence[str] = ()
) -> list[str]:
    """Returns the warnings of the data of a run and of other domains, in this order.

    Args:
        setup: Setup of the run.
        domains: Other domains that states are measured on.
        more: Warnings that stand between the two.
    """
    warnings = [*setup.data.warnings, *more]
    for domain in domains:
        own = (*domain.warnings, *domain.not_used)
        warnings += [f"config.evaluate.also, {domain.label}: {line}" for line in own]
    return warnings


def inputs_of(setup: Setup, domains: tuple, loaded: Loaded) -> dict[str, Any]:
    """Returns what the manifest says of data and weights."""
    return {
        "data_fingerprint": setup.data.fingerprint(),
        "also_fingerprint": {d.label: d.fingerprint() for d in domains},
        "weights_sha256": {**loaded.sha256, **setup.task.fixed_sha256()},
        "weights_layout": loaded.layout,
    }


def _tell_unreadable(workdir: pathlib.Path, setup: Setup, terminal: Terminal) -> None:
    """Lists what was passed over, in this attempt and those before it."""
    path = workdir / "unreadable.json"
    found = (read_json(path) or {}) | setup.data.unreadable()
    if found:
        write_json(path, found)
        terminal.warn(f"{len(found)} examples could not be read; they are in {path}")


def record(
    workdir: pathlib.Path,
    setup: Setup,
    inputs: dict[str, Any],
    told: dict[str, list[str]],
) -> None:
    """Writes what the run is and reads, or checks that it still is what it was.

    Args:
        workdir: Workdir of the run.
        setup: Setup of the run.
        inputs: Fingerprints from `inputs_of`.
        told: Lines from `tell`.
    """
    config = setup.config
    if check_same_run(workdir, config):
        check_same_inputs(workdir, inputs)
        return
    looks, plain = setup.data.spec.to_json(), json.loads(configs.to_json(config))
    manifest = make_manifest(config=plain, data=looks, **inputs)
    write_json(workdir / "manifest.json", manifest | told)
    write_text(workdir / "config.json", configs.to_json(config))
    for name, text in tokenizer_of(setup.data, config).items():
        write_text(workdir / name, text)
    write_fitted(workdir, setup.data.fitted)


def _taken_up(
    workdir: pathlib.Path,
    setup: Setup,
    domains: tuple[Domain, ...],
    start: TrainState,
    terminal: Terminal,
    stop: Stop,
) -> Loop:
    """Returns the loop, at the newest checkpoint or at the beginning."""
    config, begun = setup.config, (workdir / "checkpoints" / "0").is_dir()
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    found = checkpoints.newest(setup.target, terminal.warn)
    if begun and not found:  # Every checkpoint was damaged.
        start, _ = setup.start()
    state, progress = found or (setup.with_ema(start), Progress())
    if found:
        if progress.best_step is not None and (
            progress.best_step not in checkpoints.steps()
        ):
            terminal.warn(f"the best checkpoint, {progress.best_step}, is gone")
            progress.best = progress.best_step = None
        # Later updates read what `fixed` takes from the start, not from a new one.
        start = checkpoints.restore(0, setup.target(Progress()))
        terminal.say(f"resumed at step {int(state.step)}")
    trackers = make_trackers(
        config.report,
        lambda: json.loads(configs.to_json(config)),
        workdir=workdir,
        first_step=int(state.step) + 1 if found else 0,
    )
    evaluator = make_evaluator(setup, start, domains)
    evaluator.store = make_store(setup, terminal)
    loop = make_loop(
        setup,
        evaluator,
        checkpoints,
        state,
        progress,
        workdir=workdir,
        trackers=trackers,
        terminal=terminal,
        stop=stop,
    )
    add_fisher(loop, start, domains)
    return loop


def make_loop(
    setup: Setup,
    evaluator: Evaluator,
    checkpoints: Checkpoints | HeldCheckpoints,
    state: TrainState,
    progress: Progress,
    *,
    workdir: pathlib.Path,
    trackers: Sequence[Tracker],
    terminal: Terminal,
    stop: Stop,
    updates: Updates | None = None,
) -> Loop:
    """Returns the loop of a run.

    Args:
        setup: Of the run.
        evaluator: Measures its states.
        checkpoints: Where these are saved.
        state: The one to begin with or to go on from, on the host.
        progress: Where the run stands with it.
        workdir: Gets its metrics.
        trackers: Are told these, too.
        terminal: Where a person is told.
        stop: Tells whether it shall stop.
        updates: Those of another run of the same model; their programs are shared.
    """
    config = setup.config
    log = MetricsLog(
        workdir / "metrics.jsonl", keep_lines=progress.log_lines, trackers=trackers
    )
    updates = updates or Updates(setup=setup, fixed=None, say=terminal.say)
    updates = dataclasses.replace(updates, setup=setup, fixed=evaluator.fixed)
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
        updates=updates,
        state=state,
    )


def add_fisher(loop: Loop, start: TrainState, domains: tuple[Domain, ...]) -> None:
    """Adds the Fisher information to what updates read, where a regulariser does."""
    setup = loop.setup
    examples = setup.config.init.fisher_examples
    if not setup.regularisers & set(READS_FISHER):
        return
    fisher = domain_fisher(
        domain_named(domains, setup.config.init.fisher),
        start,
        examples=examples,
        seed=configs.seeds(setup.config)["order"],
    )
    loop.evaluator.fixed["fisher"] = setup.devices.place(dict(named(fisher)))


def make_store(setup: Setup, terminal: Terminal) -> FeatureStore | None:
    """Returns where what frozen stages make of the examples is kept, if it may be."""
    data = setup.config.data
    if data.cache == "off":
        return None
    if data.on_error == "skip":
        terminal.say("inputs of later stages are not kept: config.data.on_error=skip")
        return None
    if setup.task.prefixes != ("",):
        terminal.say("inputs of later stages are not kept: there are several models")
    if setup.task.prefixes != ("",) and not setup.task.is_taught:
        return None
    return FeatureStore(
        task=setup.task,
        devices=setup.devices,
        tables=Tables(
            folder=user_path(
                data.cache_dir or cache_folder() / "features", "config.data.cache_dir"
            ),
            limit=data.cache_gb * 1e9,
            memory=data.memory_gb * 1e9,
            say=terminal.say,
        ),
        batch_size=setup.config.evaluate.batch_size,
    )


def make_result(loop: Loop, begin: float) -> tuple[dict[str, Any], Any]:
    """Returns final and best metrics, digests and costs, and the best state, placed."""
    state = loop.taken()
    setup, progress, clock = loop.setup, loop.progress, loop.clock
    evaluator, held_out, steps = loop.evaluator, setup.data.held_out, int(state.step)
    digests = {"params_sha256": digest(state.params), "state_sha256": digest(state)}
    placed = setup.devices.place(state)
    evaluator.freeze(evaluator.first, state)
    del state  # One copy in memory is enough.
    final = best = evaluator.measure(placed, held_out)
    if progress.best_step not in (None, steps):
        del placed
        state = restore(setup, loop.checkpoints, progress.best_step)
        placed = setup.devices.place(state)
        evaluator.thaw(state)
        del state
        best = evaluator.measure(placed, held_out)
    trained = clock.updates * setup.config.data.batch_size
    result = {
        **final,
        "final": final,
        "best": best,
        "best_step": progress.best_step,
        "steps": steps,
        **digests,
        "frozen_sha256": progress.frozen_sha256,
        "optimizer_state": {
            phase.name: optimizer_state_moves(setup.plan, index, setup.names)
            for index, phase in enumerate(setup.plan)
            if index
        },
        "examples_per_s": trained / clock.train_s if clock.train_s else None,
        "compile_s": clock.compile_s + evaluator.all_compile_s,
        "wall_s": time.perf_counter() - begin,
    }
    return result, placed


def make_evaluator(
    setup: Setup, start: TrainState, domains: tuple = (), *, training: bool = True
) -> Evaluator:
    """Returns what measures states of a run that began with `start`.

    Args:
        setup: Of the run.
        start: The state before the first update, on the host.
        domains: Others, on which states are measured too.
        training: Whether there will be updates.
    """
    evaluate = setup.config.evaluate
    return Evaluator(
        task=setup.task,
        devices=setup.devices,
        fixed=setup.devices.place(setup.fixed(start, training=training)),
        batch_size=evaluate.batch_size,
        training=training,
        ema=evaluate.ema_decay is not None,
        chosen_ema="/ema_" in (evaluate.best or ""),
        first=setup.task.first_learning(setup.phase(len(setup.plan) - 1).mode),
        extras=make_extras(setup.config, setup.data, start, domains),
        text=setup.data.spec.text and setup.data.spec.text.options,
    )


def check_is_one_run(config: Config, workdir: pathlib.Path) -> None:
    """Checks that a workdir is that of a run.

    Raises:
        UserError: It is that of a population.
    """
    if config.population:
        raise UserError(
            f"--workdir: {workdir} holds a population. Each of {workdir}/members is the "
            "workdir of a run; `member` in result.json numbers the best, with checkpoints."
        )


def restore(
    setup: Setup, checkpoints: Checkpoints | HeldCheckpoints, step: int
) -> TrainState:
    """Returns the state of a checkpoint of a run, on the host."""
    return checkpoints.restore(step, setup.target(checkpoints.progress(step)))


def best_state(
    setup: Setup, workdir: pathlib.Path, domains: tuple[Domain, ...] = ()
) -> tuple[Evaluator, TrainState, int]:
    """Returns an evaluator, the state of the run's best checkpoint, placed, and its step.

    Where the config chooses none, it is the newest one.

    Args:
        setup: Of the run.
        workdir: The run's.
        domains: Others, on which the evaluator measures too.

    Raises:
        UserError: There is no checkpoint yet.
    """
    folder = workdir / "checkpoints"
    check_is_one_run(setup.config, workdir)
    if not folder.is_dir() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(f"--workdir: {workdir} has no checkpoint yet")
    # The run may still be going on, and saving.
    checkpoints = Checkpoints(folder, keep=setup.config.checkpoint.keep, read_only=True)
    try:
        steps = checkpoints.steps()
        best = checkpoints.progress(steps[-1]).best_step
        step = steps[-1] if best is None else best
        state = restore(setup, checkpoints, step)
        start = checkpoints.restore(0, setup.target(Progress()))
    finally:
        checkpoints.close()
    evaluator = make_evaluator(setup, start, domains, training=False)
    return evaluator, setup.devices.place(state), step
