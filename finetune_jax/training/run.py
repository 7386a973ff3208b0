"""Trains a run from its config to `result.json`."""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.config import Config, plugins
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.files import bytes_below, write_json, write_text
from finetune_jax.core.pytrees import digest, text_digest
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.class_order import in_order_of_run
from finetune_jax.data.dataset import Data
from finetune_jax.data.kind import kind_named, restored, weight_keys
from finetune_jax.data.spec import check_reads_alike
from finetune_jax.evaluation import per_example
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.parallel import processes
from finetune_jax.parallel.compiling import Tally, tally
from finetune_jax.parallel.executor import DeviceExecutor
from finetune_jax.plans.phase import optimizer_state_moves
from finetune_jax.report.manifest import code_digest, make_manifest, package_versions
from finetune_jax.report.terminal import Terminal
from finetune_jax.report.workdir import (
    check_same_inputs,
    check_same_run,
    locked,
    make_folder,
    origin,
    read_json,
    read_manifest,
)
from finetune_jax.tasks.components.decision import threshold_entry
from finetune_jax.training.assembly import (
    Shared,
    make_evaluator,
    make_fixed,
    make_loop,
)
from finetune_jax.training.checkpoints.checkpoint import delete_all_but
from finetune_jax.training.checkpoints.held import DeferredCheckpoints, flush
from finetune_jax.training.extension import begin as begin_from
from finetune_jax.training.extension import parent_of
from finetune_jax.training.extension import write as write_beginning
from finetune_jax.training.initial.starting_state import Loaded, run_data
from finetune_jax.training.loop import Loop, Preempted
from finetune_jax.training.overview import overview, plan_warnings
from finetune_jax.training.preemption import Stop
from finetune_jax.training.progress import Progress
from finetune_jax.training.restore import last_prefix, open_checkpoints, restore
from finetune_jax.training.setup import Setup, check_before_data
from finetune_jax.training.summary import run_costs, write_report
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """How a run is made that is one of many.

    Attributes:
        labels: Entry `sweep` of `result.json`.
        shared: Parts that the run shares with others.
        hold_s: Seconds in which checkpoints stay in memory.
        keeps_states: Whether the checkpoints of a finished run stay, from its result.
        has_page: Whether the run gets a report.
    """

    labels: Mapping[str, Any]
    shared: Shared
    hold_s: float = 20.0
    keeps_states: Callable[[Mapping[str, Any]], bool] = lambda result: True
    has_page: bool = True


def run(
    config: Config,
    workdir: pathlib.Path,
    stop: Stop | None = None,
    member: Membership | None = None,
) -> dict[str, Any]:
    """Trains or resumes a run, and returns the content of `result.json`.

    Args:
        config: Resolved config.
        workdir: Workdir, made if need be; a run in it is resumed.
        stop: Whether to stop, asked after every call; None never stops.
        member: How it is made as one of many; None for a run of its own.

    Raises:
        UserError: The config cannot be run, or the workdir holds another run.
        TrainingError: The run cannot go on.
        Preempted: The run was asked to stop, and has saved.
    """
    begin, terminal, before = time.perf_counter(), Terminal(), tally()
    plugins.ready(config.plugins, workdir)
    check_before_data(config)
    config, notes = with_weight_defaults(config, weight_keys(config.data))
    check_same_run(workdir, config)
    parent = parent_of(config, workdir)
    place = origin(config, workdir) or workdir
    shared = member.shared if member else Shared()
    if (place / "manifest.json").is_file():
        shared = Shared()  # The data is encoded as it was when the run began.
    setup = shared.setup(config, functools.partial(data_of_run, config, place))
    beginning = begin_from(setup, parent) if parent else None
    begun = beginning is not None or _has_begun(workdir)
    if member is None:
        start, loaded = setup.start(measure=not begun)
    else:
        start, loaded = shared.start(setup, measure=not begun)
    told: dict[str, Any] = tell(setup, shared.domains, loaded, notes, terminal)
    if beginning is not None:
        terminal.say(beginning.line)
        told["lineage"] = beginning.lineage
    if member is None:
        setup.random_states.forget()
    setup = shared.in_memory(setup)
    inputs = inputs_of(setup, shared.domains, loaded)
    check_processes(setup, inputs, start)
    processes.agreed("the workdir", lambda: make_folder(workdir))
    with locked(workdir):
        record(workdir, setup, inputs, told)
        if beginning is not None:
            write_beginning(beginning, setup, workdir, loaded)
            del beginning
        hold_s = member.hold_s if member else 0.0
        loop = _resumed(
            workdir, setup, start, loaded,
            shared=shared, terminal=terminal, stop=stop or Stop(), hold_s=hold_s,
        )  # fmt: skip
        del start
        try:
            result = _finished(loop, workdir, member, begin, before)
        except Preempted:
            flush(loop.checkpoints)
            raise
        finally:
            terminal.end_phase()
            loop.log.close()
            loop.checkpoints.close()
        _tell_unreadable(workdir, setup, terminal)
        if processes.is_first():
            write_json(workdir / "result.json", result)
        if processes.is_first() and setup.config.checkpoint.best_only:
            delete_all_but(workdir / "checkpoints", _best_steps(result))
    return result


def _finished(
    loop: Loop,
    workdir: pathlib.Path,
    member: Membership | None,
    begin: float,
    before: Tally,
) -> dict[str, Any]:
    """Returns the result of a run, after its last update.

    Args:
        loop: Loop of the run.
        workdir: Workdir of the run.
        member: How it is made as one of many.
        begin: Time at which the run began.
        before: Programs that were compiled before.
    """
    state = loop.run()
    executor = loop.evaluator.executor
    if member is None and isinstance(executor, DeviceExecutor):
        executor.end_training()
    result, best, scores = make_result(loop, state, begin)
    del state
    if processes.is_first():
        per_example.write(workdir, scores)
    result["programs"] = dataclasses.asdict(tally() - before)
    if member is not None:
        result["sweep"] = dict(member.labels)
    _keep(loop, result, workdir, member)
    if member is None or member.has_page:
        write_report(loop.setup, best, loop.progress, result, workdir)
    return result


def _keep(
    loop: Loop, result: dict[str, Any], workdir: pathlib.Path, member: Membership | None
) -> None:
    """Has the checkpoints of a finished run on the disk, if they stay."""
    if member is not None and not member.keeps_states(result):
        return
    flush(loop.checkpoints)
    if processes.is_first():
        result["disk_bytes"] = _disk_bytes(loop, result, workdir)


def _has_begun(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has the first checkpoint."""
    first = workdir / "checkpoints" / "0"
    return processes.agreed("whether the run has begun", first.is_dir)


def check_processes(setup: Setup, inputs: dict[str, Any], start: TrainState) -> None:
    """Checks that all processes have the same config, code, data and weights.

    Args:
        setup: Setup of the run.
        inputs: Fingerprints from `inputs_of`.
        start: State before the first update, on the host.

    Raises:
        UserError: Lists what differs, and in which processes.
    """
    if processes.count() == 1:
        return
    values = {
        "config": text_digest(configs.to_json(setup.config)),
        "code": code_digest(),
        "packages": text_digest(json.dumps(package_versions())),
        "XLA flags": os.environ.get("XLA_FLAGS", ""),
        "NPROC": os.environ.get("NPROC", ""),
        **{key: text_digest(json.dumps(inputs[key])) for key in inputs},
        "initial state": digest(start),
    }
    raise_if(
        processes.differing("inputs of the run", values),
        "The processes of the run differ:",
        "Start all of them with the same command, code, environment and files.",
    )


def _best_steps(result: dict[str, Any]) -> list[int]:
    """Returns the step of the best checkpoint, or of the last one if none is best."""
    best = result["best_step"]
    return [result["steps"] if best is None else best]


def _disk_bytes(
    loop: Loop, result: dict[str, Any], workdir: pathlib.Path
) -> dict[str, int]:
    """Returns the bytes of the checkpoints that stay, and of the cache of all runs."""
    steps = {0, *_best_steps(result)}
    kept = [
        bytes_below(place)
        for place in (workdir / "checkpoints").iterdir()
        if not loop.setup.config.checkpoint.best_only or place.name in map(str, steps)
    ]
    found = {"checkpoints": sum(kept)}
    if loop.evaluator.store is not None:
        found["feature_cache"] = loop.evaluator.store.tables.nbytes()
    return found


def data_of_run(config: Config, workdir: pathlib.Path) -> Data:
    """Returns the data of a run, its classes in the order that the run began with.

    Args:
        config: Config of the run.
        workdir: Workdir of the run, which need not be there yet.

    Raises:
        UserError: The data cannot be read, or not as the run has read them.
    """
    # Inputs are encoded as they were for training, whatever the files hold by now.
    data = run_data(config, restored(config.data, workdir))
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
    warnings = data_warnings(setup, domains, (*loaded.told, *plan_warnings(setup)))
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
    """Returns the manifest's entries about data and weights."""
    return {
        "data_fingerprint": setup.data.fingerprint(),
        "also_fingerprint": {d.label: d.fingerprint() for d in domains},
        "weights_sha256": {
            **loaded.sha256,
            **(setup.task.teachers.sha256() if setup.task.teachers else {}),
        },
        "weights_layout": loaded.layout,
    }


def _tell_unreadable(workdir: pathlib.Path, setup: Setup, terminal: Terminal) -> None:
    """Lists skipped examples, of this attempt and earlier ones."""
    path, found = workdir / "unreadable.json", dict[str, str]()
    for own in processes.gathered("unreadable examples", setup.data.unreadable()):
        found |= own
    found = (read_json(path) or {}) | found
    if found and processes.is_first():
        write_json(path, found)
        terminal.warn(f"{len(found)} examples could not be read; they are in {path}")


def record(
    workdir: pathlib.Path,
    setup: Setup,
    inputs: dict[str, Any],
    told: dict[str, Any],
) -> None:
    """Writes config and manifest of a new run, or checks those of a resumed one.

    Process 0 of several does it.

    Args:
        workdir: Workdir of the run.
        setup: Setup of the run.
        inputs: Fingerprints from `inputs_of`.
        told: Lines from `tell`, and other entries of the manifest.
    """
    config = setup.config

    def write() -> None:
        if check_same_run(workdir, config):
            check_same_inputs(workdir, inputs)
            return
        looks, plain = setup.data.spec.to_json(), json.loads(configs.to_json(config))
        manifest = make_manifest(config=plain, data=looks, **inputs)
        plugins.record(config.plugins, workdir)
        write_json(workdir / "manifest.json", manifest | told)
        write_text(workdir / "config.json", configs.to_json(config))
        for name, text in setup.data.files().items():
            write_text(workdir / name, text)
        kind_named(setup.data.spec.kind).save(workdir, setup.data.fitted)

    processes.agreed("the manifest", write)


def _resumed(
    workdir: pathlib.Path,
    setup: Setup,
    start: TrainState,
    loaded: Loaded,
    *,
    shared: Shared,
    terminal: Terminal,
    stop: Stop,
    hold_s: float,
) -> Loop:
    """Returns the loop of a run, at its newest checkpoint or at its beginning."""
    begun = _has_begun(workdir)
    open_folder = functools.partial(
        open_checkpoints, setup, workdir / "checkpoints", loaded
    )
    if begun or not hold_s:
        checkpoints = open_folder()
    else:
        keep = setup.config.checkpoint.keep
        checkpoints = DeferredCheckpoints(open_folder, keep=keep, hold_s=hold_s)
    found = checkpoints.newest(setup.target, terminal.warn)
    if begun and not found and setup.config.extend is not None:
        raise UserError(
            f"--workdir: every checkpoint in {workdir} was damaged; give another "
            "--workdir to go on from the finished run once more"
        )
    if begun and not found:  # Every checkpoint was damaged.
        start, _ = setup.start()
    begun_at = found or (setup.with_ema(start), Progress())
    if found:
        state, progress = found
        if progress.best_step not in (None, *checkpoints.steps()):
            terminal.warn(f"the best checkpoint, {progress.best_step}, is gone")
            progress.best = progress.best_step = None
        # Fixed arrays come from the original start, not from a new one.
        start = checkpoints.restore(0, setup.target(Progress()))
        terminal.say(f"resumed at step {int(state.step)}")
        began_on = (read_manifest(workdir) or {}).get("device_count")
        if began_on not in (None, jax.device_count()):
            terminal.warn(
                f"the run began on {began_on} devices and goes on with "
                f"{jax.device_count()}: its results will not have the same bits as those "
                "of a run that was left alone"
            )
    store = shared.store_of(setup, terminal)
    evaluator = make_evaluator(
        setup, start, shared.domains, executor=shared.executor, store=store
    )
    return make_loop(
        setup, evaluator, make_fixed(setup, start, shared.domains), checkpoints, begun_at,
        workdir=workdir, terminal=terminal, stop=stop,
    )  # fmt: skip


def make_result(
    loop: Loop, state: TrainState, begin: float
) -> tuple[dict[str, Any], EvaluatedState, dict[str, np.ndarray]]:
    """Returns metrics, digests and costs, the best state, and its scores of examples.

    Args:
        loop: Loop that has ended.
        state: State after the last update, on the host.
        begin: Time at which the run began.
    """
    setup, progress, clock = loop.setup, loop.progress, loop.clock
    evaluator, held_out, steps = loop.evaluator, setup.data.held_out, int(state.step)
    digests = {"params_sha256": digest(state.params), "state_sha256": digest(state)}
    prefix = last_prefix(setup, state)
    placed = setup.devices.place(state)
    del state  # One copy in memory is enough.
    found = EvaluatedState(
        evaluator=evaluator, placed=placed, prefix=prefix, refit=progress.refit
    )
    recorder = per_example.recorder_of(evaluator, held_out)
    final = best = found.measure(held_out, recorder)
    if progress.best_step not in (None, steps):
        del placed, found, recorder
        state = restore(setup, loop.checkpoints, progress.best_step)
        placed = setup.devices.place(state)
        best_prefix = last_prefix(setup, state)
        # Features of another prefix would be cached for this measurement alone.
        prefix = best_prefix and best_prefix.cached_like(prefix)
        del state, best_prefix
        found = EvaluatedState(evaluator=evaluator, placed=placed, prefix=prefix)
        recorder = per_example.recorder_of(evaluator, held_out)
        best = found.measure(held_out, recorder)
    result = {
        **final,
        **threshold_entry(best, ema=evaluator.chosen_ema),
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
        "examples_per_s": clock.examples / clock.train_s if clock.train_s else None,
        "train_s": clock.train_s,
        "cached_phases": clock.cached_phases,
        "fitted_to": ["train", *(["validation"] if progress.refit else [])],
        "compile_s": clock.compile_s + evaluator.compile_s,
        "wall_s": time.perf_counter() - begin,
        "cost": run_costs(setup, progress),
    }
    found = dataclasses.replace(found, known=recorder.outputs)
    return result, found, recorder.arrays
