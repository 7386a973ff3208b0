"""Learning-rate schedules by name.

Schedules of optax where it has them. A factory takes any of the keywords `peak` (the
highest rate), `steps` (updates after the warm-up), `end` (the last rate as a share of the
peak) and `warmup`; its other arguments are `schedule_args`. A schedule without `end`
refuses `end_lr_scale`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax.numpy as jnp
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError
from finetune_jax.core.metric_names import is_better
from finetune_jax.plans.phase import Phase


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
    registry.need(
        (all(0 < b < 1 for b in boundaries), f"boundaries {boundaries}; 0 < share < 1"),
        (0 < factor < 1, f"factor {factor}; more than 0 and less than 1"),
    )
    # If several boundaries fall on one update, each multiplies.
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
    registry.need(
        (0 < gamma < 1, f"gamma {gamma}; more than 0 and less than 1"),
        (every_steps >= 0, f"every_steps {every_steps}; 0 or more"),
    )
    every = every_steps or max(steps, 1)
    return optax.exponential_decay(peak, every, gamma, end_value=peak * end)


def _polynomial(*, peak: float, steps: int, end: float, power: float = 1.0):
    """Returns a rate that falls to the end as (1 - progress) ** power.

    torch's PolynomialLR always ends at 0.
    """
    registry.need((power > 0, f"power {power}; more than 0"))
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
    also cycles the momentum, which is constant here.

    Source: Smith & Topin 2018; the cosines are fastai's.
    """
    registry.need(
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
    registry.need(
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
    registry.need(
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
class Plateau:
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
        registry.need(
            (0 < self.factor < 1, f"factor {self.factor}; more than 0, less than 1"),
            (self.patience > 0, f"patience {self.patience}; 1 or more"),
            (self.min_change >= 0, f"min_change {self.min_change}; 0 or more"),
            (self.end <= 1, f"end_lr_scale {self.end}; at most 1"),
        )

    def __call__(self, step):
        """Returns the rate before any drop: drops depend on the measured metric."""
        return self.peak

    def after(
        self, value: float, best: float | None, bad: int, drops: int
    ) -> tuple[float | None, int, int]:
        """Returns (best, bad, drops) after an evaluation of the metric.

        Args:
            value: Measured value; NaN is no improvement.
            best: Best value so far, None before the first.
            bad: Evaluations without improvement since the best or the last drop.
            drops: Drops of the learning rate so far.
        """
        better = is_better(self.metric, value, best, self.min_change)
        if not math.isnan(value) and better:
            return value, 0, drops
        if bad + 1 < self.patience:
            return best, bad + 1, drops
        return best, 0, drops + 1

    def scale(self, drops: int) -> float:
        """Returns the factor of the learning rate after some drops."""
        return max(self.factor**drops, self.end)


SCHEDULES = registry.Choices(
    "schedule",
    {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "step": _step,
        "exponential": _exponential,
        "polynomial": _polynomial,
        "one_cycle": _one_cycle,
        "inverse_sqrt": _inverse_sqrt,
        "warm_restarts": _warm_restarts,
        "plateau": Plateau,
    },
)


def make_schedule(phase: Phase) -> Callable[[int], Callable]:
    """Returns a function from the updates after the warm-up to the schedule over them.

    Raises:
        UserError: No such schedule, or unsuitable arguments.
    """
    factory = registry.choose(SCHEDULES, phase.schedule, "schedule")
    takes = inspect.signature(factory).parameters
    if phase.end_lr_scale and "end" not in takes:
        raise UserError(
            Problem(
                "end_lr_scale",
                f"{phase.end_lr_scale}, but the schedule {phase.schedule!r} has no end; "
                "leave it at 0.0",
            )
        )
    given = {
        "peak": phase.peak_lr,
        "end": phase.end_lr_scale,
        "warmup": phase.warmup_steps,
    }
    given = {name: value for name, value in given.items() if name in takes}

    def schedule(steps: int) -> Callable:
        own = {"steps": steps} if "steps" in takes else {}
        return registry.call(
            factory, phase.schedule_args, "schedule_args", **given, **own
        )

    schedule(1)  # No argument is wrong only for some number of steps.
    return schedule
