"""Plateaus: a metric that no longer improves lowers the rate or ends the phase."""

from collections.abc import Mapping

from finetune_jax.core.metric_names import is_better
from finetune_jax.optim import PhaseOptimizer
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.objectives.metrics import loss_beside, replaces
from finetune_jax.training.progress import Progress


def lower_rate(
    optimizer: PhaseOptimizer, progress: Progress, measured: Mapping[str, float]
) -> None:
    """Updates the state of a 'plateau' schedule after a measurement.

    Args:
        optimizer: Optimizer of the phase.
        progress: Progress of the run, which is changed.
        measured: Latest value of each metric.
    """
    plateau = optimizer.plateau
    if plateau is not None and plateau.metric in measured:
        before = progress.rate_best, progress.rate_bad, progress.rate_drops
        after = plateau.after(measured[plateau.metric], *before)
        progress.rate_best, progress.rate_bad, progress.rate_drops = after


def is_reached(
    phase: Phase, progress: Progress, measured: Mapping[str, float], step: int
) -> bool:
    """Returns whether the metric of a phase has stopped improving, which ends it.

    Args:
        phase: The phase.
        progress: Progress of the run, in which the best value is noted.
        measured: Latest value of each metric.
        step: Step of the measurement.
    """
    name = phase.plateau_metric
    if name is None or name not in measured:
        return False
    value, loss = measured[name], measured.get(loss_beside(name))
    change, best = phase.plateau_min_change, progress.plateau_best
    progress.plateau_bad += 1
    if is_better(name, value, best, change):
        progress.plateau_best, progress.plateau_bad = value, 0
    elif value != best or not replaces(
        name, value, best, loss, progress.plateau_best_loss
    ):
        return progress.plateau_bad >= phase.plateau_patience
    # A tie with a lower loss is the state to restore, but no improvement.
    progress.plateau_best_step, progress.plateau_best_loss = step, loss
    return progress.plateau_bad >= phase.plateau_patience
