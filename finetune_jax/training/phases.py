"""Phases for one model: what is trained in each, and what its compiled step depends on."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from finetune_jax.core.pytrees import named, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.models.modes import Mode
from finetune_jax.optim import PhaseOptimizer, compile_phase
from finetune_jax.plans.phase import Group, Phase, groups
from finetune_jax.tasks.task import Task
from finetune_jax.training.step import Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSetup:
    """A phase for one model: rate groups, modes of the stages, optimizer, compile key.

    Attributes:
        phase: The phase.
        groups: Rate group of each trained parameter.
        mode: Mode in which each stage runs.
        prefixes: Name prefixes of the models.
    """

    phase: Phase
    groups: Mapping[str, Group]
    mode: Mode
    prefixes: tuple[str, ...]

    @functools.cached_property
    def program(self) -> tuple:
        """Compile key of the phase's step; phases with equal keys share a program."""
        return tuple(sorted(self.groups.items())), self.mode, self.phase.static

    @functools.cached_property
    def compiled(self) -> PhaseOptimizer:
        """Optimizer and schedule of the phase."""
        return compile_phase(self.phase)

    def optimizer(self) -> Any:
        """Returns the optax transformation of the phase."""
        return self.compiled.transformation(self.groups)

    def update(
        self, task: Task, ema_decay: float | None = None, **options: Any
    ) -> Update:
        """Returns the static description of the phase's updates.

        Args:
            task: Task of the run.
            ema_decay: Decay of the averaged weights; None keeps no averages.
            **options: Other fields of `Update` that have a default.
        """
        return Update(
            task=task,
            optimizer=self.optimizer(),
            trained=frozenset(self.groups),
            mode=self.mode,
            evaluates=self.compiled.algorithm.evaluates,
            repeats=self.phase.fixed_batch,
            regularise=self.phase.regularise,
            ema_decay=ema_decay,
            **options,
        )

    def frozen(self, state: TrainState) -> dict[str, Any]:
        """Returns the parameters and running averages that the phase must not change."""
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
    """Returns phase `index` of a plan for the models of a task.

    Args:
        plan: Phases, checked against the models.
        index: Index of the phase.
        task: Task of the run.
        names: Names of all parameters.
        axis_name: Name of the device axis under pmap.
    """
    learns = groups(plan, index, names)
    prefixes = task.models.prefixes
    stages = frozenset(stage_of(name, prefixes) for name in learns)
    mode = Mode(
        learning=stages if task.domains is None else task.domains.learning(stages),
        batch_stats=plan[index].batch_stats,
        axis_name=axis_name,
    )
    return PhaseSetup(phase=plan[index], groups=learns, mode=mode, prefixes=prefixes)
