"""Restores states of a run from its workdir."""

import dataclasses
import pathlib

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.core.train_state import TrainState
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.features.cache import FrozenPrefix, frozen_prefix
from finetune_jax.report.workdir import read_json
from finetune_jax.tasks.components.decision import THRESHOLD, with_threshold
from finetune_jax.training.assembly import make_evaluator
from finetune_jax.training.checkpoints.checkpoint import Checkpoints, Reloaded
from finetune_jax.training.checkpoints.held import AnyCheckpoints
from finetune_jax.training.initial.starting_state import Loaded
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup


def open_checkpoints(
    setup: Setup, folder: pathlib.Path, loaded: Loaded | None = None
) -> Checkpoints:
    """Returns the checkpoints of a run.

    Args:
        setup: Setup of the run.
        folder: `checkpoints/` of its workdir.
        loaded: Origin of the weights of a run that saves; None leaves the folder
            unchanged.

    Raises:
        UserError: Frozen values cannot be left to a weight file.
    """
    config, reloaded = setup.config, None
    if config.checkpoint.params == "trained":
        reloaded = Reloaded(
            names=_left_to_weights(setup, loaded) if loaded else frozenset(),
            load=lambda: setup.with_ema(setup.start(measure=False)[0]),
            where=str(config.init.pretrained),
        )
    keep, read_only = config.checkpoint.keep, loaded is None
    return Checkpoints(folder, keep=keep, read_only=read_only, reloaded=reloaded)


def _left_to_weights(setup: Setup, loaded: Loaded) -> frozenset[str]:
    """Returns the names of loaded leaves that no phase changes.

    Raises:
        UserError: There are none, or their values also depend on the data.
    """
    frozen = [set(phase.frozen(setup.shapes)) for phase in setup.phases]
    names = loaded.names.intersection(*frozen)
    reasons = {
        "the data has embeddings": setup.data.fitted is not None,
        "config.init.embeddings changes weights": bool(setup.config.init.embeddings),
        "config.init.schemes changes weights": bool(setup.config.init.schemes),
        "every loaded parameter is trained, or none is loaded": not names,
    }
    if why := [reason for reason, is_so in reasons.items() if is_so]:
        raise UserError(
            f"config.checkpoint.params: 'trained', but {'; '.join(why)}; choose 'all'"
        )
    return names


def check_is_one_run(config: Config, workdir: pathlib.Path) -> None:
    """Checks that a workdir holds one run.

    Raises:
        UserError: It holds a population.
    """
    if config.population:
        raise UserError(
            f"--workdir: {workdir} holds a population. Each of {workdir}/members is the "
            "workdir of a run; `member` in result.json numbers the best, with checkpoints."
        )


def restore(setup: Setup, checkpoints: AnyCheckpoints, step: int) -> TrainState:
    """Returns the state of a checkpoint of a run, on the host."""
    return checkpoints.restore(step, setup.target(checkpoints.progress(step)))


def best_state(
    setup: Setup, workdir: pathlib.Path, domains: tuple[Domain, ...] = ()
) -> tuple[EvaluatedState, int]:
    """Returns the state of the run's best checkpoint, and its step.

    If the config chooses no best one, it is the newest checkpoint.

    Args:
        setup: Setup of the run.
        workdir: Workdir of the run.
        domains: Other domains, on which the state can be measured too.

    Raises:
        UserError: There is no checkpoint yet.
    """
    folder = workdir / "checkpoints"
    check_is_one_run(setup.config, workdir)
    if not folder.is_dir() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(f"--workdir: {workdir} has no checkpoint yet")
    # The run may still be going on, and saving.
    checkpoints = open_checkpoints(setup, folder)
    try:
        steps = checkpoints.steps()
        best = checkpoints.progress(steps[-1]).best_step
        step = steps[-1] if best is None else best
        state = restore(setup, checkpoints, step)
        refit = checkpoints.progress(step).refit
        start = checkpoints.restore(0, setup.target(Progress()))
    finally:
        checkpoints.close()
    evaluator = make_evaluator(setup, start, domains, training=False)
    prefix = last_prefix(setup, state)
    found = EvaluatedState(
        evaluator=evaluator,
        placed=setup.devices.place(state),
        prefix=prefix and prefix.uncached(),
        refit=refit,
    )
    return found, step


def with_threshold_of_run(setup: Setup, workdir: pathlib.Path) -> Setup:
    """Returns the setup with the decision threshold in `result.json`, if there is one."""
    threshold = (read_json(workdir / "result.json") or {}).get(THRESHOLD)
    return dataclasses.replace(setup, task=with_threshold(setup.task, threshold))


def last_prefix(setup: Setup, state: TrainState) -> FrozenPrefix | None:
    """Returns the prefix of a state, on the host, that the last phase freezes."""
    return frozen_prefix(setup.task, state, setup.phase(len(setup.plan) - 1).mode)
