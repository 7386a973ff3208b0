"""Learning-rate schedules by name, and the rate of every update of a phase.

All that optax has is optax's. A factory takes, by keyword, what it needs of `peak` (the
highest rate), `steps` (updates after the warm-up), `end` (the last rate as a share of
the peak) and `warmup`; its other arguments are `schedule_args`. One that takes no `end`
has none, and one that takes `warmup` has its own use for it.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.core.metric_names import is_better
from finetune_jax.plans.phase import Phase


def _need(*rules: tuple[bool, str]) -> None:
    if wrong := [f"{text} is needed" for right, text in rules if not right]:
        raise ValueError("; ".join(wrong))


def _constant(*, peak: float):
    return optax.constant_schedule(peak)


def _linear(*, peak: float, steps: int, end: float):
    return optax.linear_schedule(peak, peak * end, steps)


def _cosine(*, peak: float, steps: int, end: float):
    return optax.cosine_decay_schedule(peak, max(steps, 1), end)


def _step(
    *,
    peak: float,
    steps: int,
    boundaries: tuple[float, ...] = (0.5, 0.75),
    factor: float = 0.1,
):
    """Returns a rate that is multiplied by `factor` at each of the boundaries.

    They are shares of what follows the warm-up. torch's MultiStepLR counts calls.
    """
    _need(
        (all(0 < b < 1 for b in boundaries), f"boundaries {boundaries}; 0 < share < 1"),
        (0 < factor < 1, f"factor {factor}; more than 0 and less than 1"),
    )
    # Boundaries that fall on one update all count.
    at = [round(share * steps) for share in boundaries]
    return optax.piecewise_constant_schedule(
        peak, {step: factor ** at.count(step) for step in at}
    )


def _exponential(
    *, peak: float, steps: int, end: float, gamma: float = 0.01, every_steps: int = 0
):
    """Returns a rate that falls to `gamma` times itself over every so many updates.

    It falls at each update, not in stairs, and never below the end. An `every_steps` of 0
    is all that follows the warm-up. torch's ExponentialLR multiplies at each call, which
    by custom is once an epoch: that is its `every_steps`, with the same gamma.
    """
    _need(
        (0 < gamma < 1, f"gamma {gamma}; more than 0 and less than 1"),
        (every_steps >= 0, f"every_steps {every_steps}; 0 or more"),
    )
    every = every_steps or max(steps, 1)
    return optax.exponential_decay(peak, every, gamma, end_value=peak * end)


def _polynomial(*, peak: float, steps: int, end: float, power: float = 1.0):
    """Returns a rate that falls to the end as (1 - progress) ** power.

    torch's PolynomialLR always ends at 0.
    """
    _need((power > 0, f"power {power}; more than 0"))
    return optax.polynomial_schedule(peak, peak * end, power, steps)


def _one_cycle(
    *,
    peak: float,
    steps: int,
    warmup: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
):
    """Returns a rate that rises and falls along cosines.

    It starts at peak / div_factor and ends at that by final_div_factor. It reaches its
    peak at update floor(pct_start * steps) and would reach its end at update `steps`;
    torch's OneCycleLR has both one update earlier, pct_start counted in fractions, and
    cycles the momentum besides, which stays as it is here.

    Source: Smith & Topin 2018; the cosines are fastai's.
    """
    _need(
        (warmup == 0, f"warmup_steps {warmup}: one_cycle rises by itself; 0"),
        (0 < pct_start < 1, f"pct_start {pct_start}; more than 0 and less than 1"),
        (div_factor >= 1, f"div_factor {div_factor}; 1 or more"),
        (final_div_factor >= 1, f"final_div_factor {final_div_factor}; 1 or more"),
    )
    return optax.cosine_onecycle_schedule(
        steps, peak, pct_start, div_factor, final_div_factor
    )


def _inverse_sqrt(*, peak: float, warmup: int, timescale: int = 0):
    """Returns peak * sqrt(w / (step + w)), steps counted from the end of the warm-up.

    A timescale w of 0 is the length of the warm-up.

    Source: Vaswani et al. 2017, equation 3, whose peak is lr_scale / sqrt(d * warmup).
    """
    wide = timescale or warmup
    _need(
        (wide > 0, f"timescale {timescale} without warmup_steps; one of them above 0")
    )
    return lambda step: peak * jnp.sqrt(wide / (step + wide))


def _warm_restarts(
    *, peak: float, steps: int, end: float, first_steps: int = 0, multiplier: int = 1
):
    """Returns cosines from the peak to the end, each `multiplier` times the one before.

    The same as torch's CosineAnnealingWarmRestarts when that is called once an update.

    Args:
        peak: Where each cycle starts.
        steps: Updates after the warm-up.
        end: Share of the peak that each cycle falls to.
        first_steps: Length of the first cycle in updates; must be given.
        multiplier: Length of a cycle by that of the one before.

    Source: Loshchilov & Hutter 2017 (SGDR).
    """
    _need(
        (first_steps > 0, f"first_steps {first_steps}; 1 or more"),
        (multiplier > 0, f"multiplier {multiplier}; 1 or more"),
    )
    # optax.sgdr_schedule evaluates every cycle at every step; cycles may be many.
    begins, lengths = [0], [first_steps]
    while begins[-1] + lengths[-1] < steps:
        begins.append(begins[-1] + lengths[-1])
        lengths.append(lengths[-1] * multiplier)
    cosine = optax.cosine_decay_schedule(peak, 1, end)

    def schedule(step):
        cycle = jnp.searchsorted(jnp.array(begins[1:], int), step, side="right")
        length = jnp.array(lengths, float)[cycle]
        return cosine((step - jnp.array(begins)[cycle]) / length)

    return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plateau:
    """A rate that falls by `factor` when a metric stops improving.

    torch's ReduceLROnPlateau waits for one evaluation more than its patience; its
    threshold is relative (1e-4), while `min_change` is absolute.

    Attributes:
        peak: The rate before the first drop.
        end: Share of the peak below which it never falls.
        factor: By which each drop multiplies the rate.
        patience: Evaluations in a row without improvement that make a drop.
        min_change: A smaller change is no improvement.
        metric: Such as 'validation/accuracy'; its name says whether more is better.
    """

    peak: float
    end: float
    factor: float = 0.1
    patience: int = 3
    min_change: float = 0.0
    metric: str = "validation/loss"

    def __post_init__(self):
        _need(
            (0 < self.factor < 1, f"factor {self.factor}; more than 0, less than 1"),
            (self.patience > 0, f"patience {self.patience}; 1 or more"),
            (self.min_change >= 0, f"min_change {self.min_change}; 0 or more"),
            (self.end <= 1, f"end_lr_scale {self.end}; at most 1"),
        )

    def __call__(self, step):
        """Returns the rate before any drop: those depend on what a run measures."""
        return self.peak


SCHEDULES: dict[str, Callable] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "step": _step,
    "exponential": _exponential,
    "polynomial": _polynomial,
    "one_cycle": _one_cycle,
    "inverse_sqrt": _inverse_sqrt,
    "warm_restarts": _warm_restarts,
    "plateau": _Plateau,
}


def _after_warmup(phase: Phase, steps: int):
    """Returns the schedule of a phase over its `steps` updates after the warm-up.

    Raises:
        UserError: No such schedule, or arguments that it does not take.
    """
    where = f"config.plan, phase {phase.name!r}"
    factory = registry.choose(SCHEDULES, phase.schedule, f"{where}, schedule")
    given = {
        "peak": phase.peak_lr,
        "steps": steps,
        "end": phase.end_lr_scale,
        "warmup": phase.warmup_steps,
    }
    taken = inspect.signature(factory).parameters
    if phase.end_lr_scale and "end" not in taken:
        raise UserError(
            f"{where}, schedule: {phase.schedule!r} has no end; leave end_lr_scale "
            f"({phase.end_lr_scale}) at 0.0"
        )
    given = {name: value for name, value in given.items() if name in taken}
    args = f"{where}, schedule_args"
    try:
        return registry.call(factory, phase.schedule_args, args, **given)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{args}: {error}") from error


def learning_rates(phase: Phase) -> np.ndarray:
    """Returns the learning rate of every update of a phase, float32 [steps].

    The warm-up rises from `peak_lr / warmup_steps` to `peak_lr`, then the schedule runs
    over the rest. That of a plateau is without its drops.
    """
    assert phase.steps is not None
    warmup = phase.warmup_steps
    rest = _after_warmup(phase, phase.steps - warmup)
    if warmup:
        start = phase.peak_lr / warmup
        rise = optax.linear_schedule(start, phase.peak_lr, warmup - 1)
        rest = optax.join_schedules([rise, rest], [warmup])
    rates = jax.vmap(lambda step: jnp.asarray(rest(step), jnp.float32))
    return np.asarray(rates(jnp.arange(phase.steps)))


def check_schedule(phase: Phase) -> list[str]:
    """Returns what is wrong with a phase's schedule and its arguments, a line each."""
    try:
        # A phase in epochs has no steps yet; no argument is wrong for its length.
        _after_warmup(phase, 1)
    except UserError as error:
        return [str(error)]
    return []


def plateau_metric(phase: Phase) -> str | None:
    """Returns the metric whose plateaus lower the rate, if the schedule has such."""
    return _plateau(phase).metric if phase.schedule == "plateau" else None


def plateau_step(
    phase: Phase, best: float | None, bad: int, drops: int, value: float
) -> tuple[float | None, int, int]:
    """Returns (best, bad, drops) after an evaluation of the metric of a plateau.

    Args:
        phase: Its schedule is 'plateau'.
        best: Best value so far, None before the first.
        bad: Evaluations since without improvement.
        drops: Of the learning rate so far.
        value: What was measured; NaN is no improvement.
    """
    plateau = _plateau(phase)
    change = plateau.min_change
    if not math.isnan(value) and is_better(plateau.metric, value, best, change):
        return value, 0, drops
    if bad + 1 < plateau.patience:
        return best, bad + 1, drops
    return best, 0, drops + 1


def plateau_scale(phase: Phase, drops: int) -> float:
    """Returns what the learning rate is multiplied with after so many drops.

    It is 1 for every schedule but 'plateau'.
    """
    if phase.schedule != "plateau":
        return 1.0
    plateau = _plateau(phase)
    return max(plateau.factor**drops, plateau.end)


def _plateau(phase: Phase) -> _Plateau:
    return _Plateau(
        peak=phase.peak_lr, end=phase.end_lr_scale, **dict(phase.schedule_args)
    )
