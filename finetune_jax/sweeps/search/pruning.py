"""Pruning: rules that end a trial of a search early, from measured values alone.

A rule compares the values of a running trial with trials of earlier batches. No clock and
no order of workers enters, so a search that is interrupted and continued prunes the same
trials at the same steps.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import Problem, UserError
from finetune_jax.report.metrics_log import read_lines

Curve = Mapping[int, float]
STATES = ("complete", "pruned", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that has ended.

    Attributes:
        number: Number of the trial in the search, from 0.
        overrides: Config keys that the trial sets, with their values.
        params: Values of the search space, as in the proposal.
        value: Value of the search's metric, the mean over seeds; None if there is none.
        curves: Metric by step, for each index of a seed that ran; up to the step at which
            the run was pruned.
        state: 'complete', 'pruned' or 'failed' (in every attempt).
    """

    number: int
    overrides: Mapping[str, Any]
    params: Mapping[str, Any]
    value: float | None
    curves: Mapping[int, Curve] = dataclasses.field(default_factory=dict)
    state: str = "complete"

    def __post_init__(self) -> None:
        """Checks the state."""
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r}; possible: {', '.join(STATES)}")

    @property
    def is_complete(self) -> bool:
        """Whether the trial has run to its end and has a finite value."""
        has_value = self.value is not None and math.isfinite(self.value)
        return self.state == "complete" and has_value

    @property
    def by_seed(self) -> dict[int, float]:
        """Last value of each seed."""
        return {seed: _last(curve) for seed, curve in self.curves.items() if curve}

    @property
    def mean_curve(self) -> dict[int, float]:
        """Mean over seeds at each step that any of them has reached."""
        steps = sorted({step for curve in self.curves.values() for step in curve})
        return {
            step: statistics.fmean(c[step] for c in self.curves.values() if step in c)
            for step in steps
        }


def _last(curve: Curve) -> float:
    return curve[max(curve)]


# Each rule has `over_seeds`, whether it compares the values of finished seeds instead of
# the evaluations of a run; `problems`; and `prunes`, which gets the trials of earlier
# batches, the curve so far, the index of its seed and whether higher is better.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Median:
    """Prunes a run whose best value so far is worse than the median at its step.

    Source: `optuna.pruners.MedianPruner`. The median is over complete trials.

    Attributes:
        startup: Number of complete trials before the first one is pruned.
        warmup_steps: Updates of a run before it is judged.
    """

    startup: int = 5
    warmup_steps: int = 1
    over_seeds = False

    def problems(self) -> list[Problem]:
        """Returns invalid attributes."""
        return _too_small(self, startup=1, warmup_steps=1)

    def prunes(
        self, earlier: Sequence[Trial], curve: Curve, seed: int, higher: bool
    ) -> bool:
        """Returns whether the run is pruned at the last step of its curve."""
        complete = [trial for trial in earlier if trial.is_complete]
        arguments = {
            "n_startup_trials": self.startup, "n_warmup_steps": self.warmup_steps
        }  # fmt: skip
        # The state before the first update is the same for all trials.
        known = [(t.value, _trained(t.curves.get(seed, {}))) for t in complete]
        return _judged("MedianPruner", arguments, known, _trained(curve), higher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wilcoxon:
    """Prunes a trial whose finished seeds are probably worse than those of the best.

    Source: `optuna.pruners.WilcoxonPruner`, a signed-rank test of the differences by seed.

    Attributes:
        p: A trial is pruned if the p-value is below.
        startup: Number of seeds before a trial is judged.
    """

    p: float = 0.1
    startup: int = 2
    over_seeds = True

    def problems(self) -> list[Problem]:
        """Returns invalid attributes."""
        wrong = [] if 0 < self.p < 1 else [Problem("p", f"{self.p}; between 0 and 1")]
        return wrong + _too_small(self, startup=2)

    def prunes(
        self, earlier: Sequence[Trial], curve: Curve, seed: int, higher: bool
    ) -> bool:
        """Returns whether the trial is pruned; `curve` is {index of the seed: value}."""
        del seed
        complete = [t for t in earlier if t.is_complete and _are_finite(t.by_seed)]
        if not _are_finite(curve):
            return True
        arguments = {"p_threshold": self.p, "n_startup_steps": self.startup}
        known = [(trial.value, trial.by_seed) for trial in complete]
        return _judged("WilcoxonPruner", arguments, known, curve, higher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Asynchronous successive halving: one run in `factor` goes on at each rung.

    A rung is the first evaluation at or after `first_steps * factor**k` updates. A run goes
    on if its value is among the best `1/factor` of the values at the rung, its own and
    those of earlier batches; it always does if the rung has fewer than `factor` values.

    Source: Li et al. 2020, A system for massively parallel hyperparameter tuning, alg. 2.

    Attributes:
        first_steps: Updates before the first rung.
        factor: Reduction factor.
    """

    first_steps: int
    factor: int = 3
    over_seeds = False

    def problems(self) -> list[Problem]:
        """Returns invalid attributes."""
        return _too_small(self, first_steps=1, factor=2)

    def prunes(
        self, earlier: Sequence[Trial], curve: Curve, seed: int, higher: bool
    ) -> bool:
        """Returns whether the run is pruned at the last step of its curve."""
        steps, rung = sorted(curve), self.first_steps
        while rung <= steps[-1]:
            if len(steps) < 2 or steps[-2] < rung:  # The rung is reached just now.
                others = (_at(trial.curves.get(seed, {}), rung) for trial in earlier)
                own = _loss(curve[steps[-1]], higher)
                losses = [_loss(v, higher) for v in others if v is not None] + [own]
                is_first = len(losses) < self.factor
                best = sorted(losses)[: len(losses) // self.factor]
                if math.isinf(own) or not (is_first or own <= best[-1]):
                    return True
            rung *= self.factor
        return False


Pruner = Median | Wilcoxon | Halving


def _too_small(pruner: Any, **least: int) -> list[Problem]:
    """Returns the attributes that are below their least values."""
    return [
        Problem(name, f"{getattr(pruner, name)}; at least {value} is needed")
        for name, value in least.items()
        if getattr(pruner, name) < value
    ]


def _at(curve: Curve, rung: int) -> float | None:
    """Returns the first value at or after a step."""
    return next((curve[step] for step in sorted(curve) if step >= rung), None)


def _loss(value: float, higher: bool) -> float:
    """Returns a number that is lower if the value is better, infinite for NaN."""
    return math.inf if math.isnan(value) else -value if higher else value


def _trained(curve: Curve) -> dict[int, float]:
    return {step: value for step, value in curve.items() if step > 0}


def _are_finite(values: Curve) -> bool:
    return all(map(math.isfinite, values.values()))


def imported_optuna(key: str) -> Any:
    """Returns the package optuna.

    Args:
        key: Key of the search that needs it, for messages.

    Raises:
        UserError: The package is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"{key}: needs a package that is not installed: "
            "python -m pip install 'finetune_jax[search]'"
        ) from error
    return optuna


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Hides messages of optuna: in-memory studies, experimental parts, values all NaN."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            experimental = optuna.exceptions.ExperimentalWarning
            warnings.simplefilter("ignore", experimental)
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _judged(
    name: str,
    arguments: Mapping[str, Any],
    known: Sequence[tuple[float | None, Curve]],
    curve: Curve,
    higher: bool,
) -> bool:
    """Returns whether a pruner of optuna prunes a trial.

    Args:
        name: Class of the pruner.
        arguments: Arguments of the class.
        known: Value and intermediate values of each complete trial.
        curve: Intermediate values of the trial that is judged.
        higher: Whether higher values are better.
    """
    optuna = imported_optuna("search.pruner")
    with quiet(optuna):
        pruner = getattr(optuna.pruners, name)(**arguments)
        study = optuna.create_study(direction="maximize" if higher else "minimize")
        for value, values in known:
            study.add_trial(
                optuna.trial.create_trial(value=value, intermediate_values=dict(values))
            )
        running = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(curve)
        )
        return bool(pruner.prune(study, running))


def curve_of(
    workdir: pathlib.Path, metric: str, until: int | None = None
) -> dict[int, float]:
    """Returns the values of a metric in a run's `metrics.jsonl`, by step.

    A value that is not finite is NaN. Of two values at one step the last one counts.

    Args:
        workdir: Workdir of the run.
        metric: Name of the metric, such as 'validation/accuracy'.
        until: Last step, such as the one at which the run was pruned; None for all.
    """
    found, quoted = dict[int, float](), json.dumps(metric)
    for line in read_lines(workdir / "metrics.jsonl"):
        if quoted not in line:  # Most lines are of updates.
            continue
        values = json.loads(line)
        if metric in values and (until is None or values["step"] <= until):
            value = values[metric]
            found[values["step"]] = math.nan if value is None else float(value)
    return found


class Judge:
    """Decides whether a run ends early; see `training.preemption.Stop.judge`.

    Each evaluation is judged once, in the order of steps, as if no later one were known.

    Attributes:
        pruned_at: Step of the evaluation that ended the run; None if none did.
    """

    def __init__(
        self, workdir: pathlib.Path, metric: str, is_pruned: Callable[[Curve], bool]
    ):
        """Starts without a judged evaluation.

        Args:
            workdir: Workdir of the run, which need not be there yet.
            metric: Metric of the search.
            is_pruned: Returns whether a run with this curve is pruned at its last step.
        """
        self._curve = functools.partial(curve_of, workdir, metric)
        self._is_pruned, self._judged = is_pruned, -1
        self.pruned_at: int | None = None

    def __call__(self) -> bool:
        """Returns whether the run ends early."""
        curve = self._curve() if self.pruned_at is None else {}
        for step in sorted(step for step in curve if step > self._judged):
            self._judged = step
            if self._is_pruned({s: v for s, v in curve.items() if s <= step}):
                self.pruned_at = step
                break
        return self.pruned_at is not None
