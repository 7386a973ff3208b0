"""Search: trials whose config keys are proposed from the results of earlier trials.

A proposal is a pure function of the search, the finished trials of earlier batches and the
number of the trial. Any number of workers, killed and started again, thus make the same
search, and the folder of results is its only store. The module does not import jax.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import Problem, UserError
from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.core.registry import closest
from finetune_jax.sweeps.search.pruning import (
    Curve,
    Pruner,
    Trial,
    imported_optuna,
    quiet,
)
from finetune_jax.sweeps.search.space import Choice as Choice
from finetune_jax.sweeps.search.space import Float as Float
from finetune_jax.sweeps.search.space import Int as Int
from finetune_jax.sweeps.search.space import (
    Proposal,
    Space,
    drawn,
    examples,
    grid_problems,
    points,
    rounded,
    space_problems,
    walked,
)

SAMPLERS = ("tpe", "random", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the values of config keys that give the best metric.

    Attributes:
        space: Float, Int, Choice or a fixed value by config key; the key of a choice among
            named sets is its name.
        trials: Number of trials; None for a grid, which has a trial at each point.
        metric: Metric that decides, such as 'validation/accuracy'.
        sampler: 'tpe' (of optuna), 'random' or 'grid'.
        batch: Number of trials that are proposed from the same results, and so can run at
            the same time.
        startup: Number of random trials before TPE proposes, in whole batches.
        seed: Seed of the proposals.
        pruner: Rule that ends trials early; None for none.
    """

    space: Space
    metric: str
    trials: int | None = None
    sampler: str = "tpe"
    batch: int = 4
    startup: int = 10
    seed: int = 0
    pruner: Pruner | None = None

    @property
    def count(self) -> int:
        """Number of trials."""
        if self.trials is None:
            return sum(1 for _ in points(self.space))
        return self.trials

    @property
    def higher(self) -> bool:
        """Whether higher values of the metric are better."""
        return higher_is_better(self.metric)

    def is_drawn(self, number: int) -> bool:
        """Returns whether the values of a trial depend on no result.

        Args:
            number: Number of the trial.
        """
        return self.sampler != "tpe" or self._batch_of(number) < self.startup

    def needs(self, number: int) -> range:
        """Returns the numbers of the trials that must have ended before this one starts.

        Args:
            number: Number of the trial.
        """
        is_free = self.is_drawn(number) and self.pruner is None
        return range(0) if is_free else range(self._batch_of(number))

    def _batch_of(self, number: int) -> int:
        """Returns the number of the first trial in the batch of a trial."""
        return number // self.batch * self.batch

    def best(self, finished: Mapping[int, Trial]) -> Trial | None:
        """Returns the complete trial with the best value, the first of equal ones.

        Args:
            finished: Trials by number.
        """
        complete = [finished[n] for n in sorted(finished) if finished[n].is_complete]
        sign = -1 if self.higher else 1
        return min(complete, key=lambda t: sign * (t.value or 0.0), default=None)

    def problems(self) -> list[Problem]:
        """Returns everything that is wrong with the search, with the keys to blame."""
        found = space_problems(self.space, "space")
        if self.sampler not in SAMPLERS:
            near = closest(self.sampler, SAMPLERS)
            text = f"{self.sampler!r}; possible: {', '.join(SAMPLERS)}{near}"
            found.append(Problem("sampler", text))
        if not re.fullmatch(r"validation(/\w+)+", self.metric):
            why = "; trials are chosen on the validation split, as validation/accuracy"
            found.append(Problem("metric", f"{self.metric!r}{why}"))
        if self.sampler == "grid":
            found += grid_problems(self.space, "space")
            if self.trials is not None:
                text = f"{self.trials}; a grid has a trial at each point: give None"
                found.append(Problem("trials", text))
        elif self.trials is None:
            found.append(Problem("trials", "None; give the number of trials"))
        for name in ("trials", "batch", "startup"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(name, f"{value}; at least 1 is needed"))
        if self.pruner is not None:
            found += [problem.under("pruner") for problem in self.pruner.problems()]
        return [problem.under("search") for problem in found]

    def examples(self) -> list[dict[str, Any]]:
        """Returns overrides with every option and both ends of every range, for checks."""
        return examples(self.space)


def proposal(search: Search, finished: Mapping[int, Trial], number: int) -> Proposal:
    """Returns the values of a trial.

    Args:
        search: A search without problems.
        finished: Trials by number, at least `search.needs(number)`; only these count.
        number: Number of the trial.

    Raises:
        UserError: The package of the sampler is missing, or finished trials are not of
            this space.
    """
    if search.sampler == "grid":
        return next(itertools.islice(points(search.space), number, None))
    if search.is_drawn(number):
        random = np.random.default_rng(_seed(search, number))
        return walked(search.space, lambda _, space: drawn(space, random))
    return _proposed(search, _earlier(search, finished, number), number)


def is_pruned(
    search: Search,
    finished: Mapping[int, Trial],
    number: int,
    curve: Curve,
    *,
    seed: int = 0,
) -> bool:
    """Returns whether a trial is pruned at the last step of its curve.

    Args:
        search: A search without problems.
        finished: Trials by number, at least `search.needs(number)`; only these count.
        number: Number of the trial.
        curve: Metric by step of a run; for a pruner with `over_seeds`, {index of the seed:
            value} of the seeds that have finished, which must run one after the other.
        seed: Index of the run's seed, which is compared with the same seed of others.
    """
    if search.pruner is None or not curve:
        return False
    earlier = _earlier(search, finished, number)
    return search.pruner.prunes(earlier, curve, seed, search.higher)


def _earlier(search: Search, finished: Mapping[int, Trial], number: int) -> list[Trial]:
    """Returns the trials of earlier batches, in the order of their numbers."""
    needed = search.needs(number)
    if missing := [n for n in needed if n not in finished]:
        raise ValueError(f"trial {number} needs trials {missing}, which have not ended")
    return [finished[n] for n in needed]


def _seed(search: Search, number: int) -> int:
    """Returns the seed of a proposal, 32 bits."""
    text = f"{search.seed}:{number}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _proposed(search: Search, earlier: Sequence[Trial], number: int) -> Proposal:
    """Returns the values that TPE proposes after some trials.

    The trials before it in its batch are proposed again and count as running, which keeps
    the batch diverse (Bergstra et al. 2011, section 5.3, the constant liar).
    """
    optuna = imported_optuna("search.sampler")
    found = None
    with quiet(optuna):
        study = optuna.create_study(
            direction="maximize" if search.higher else "minimize"
        )
        for trial in earlier:
            study.add_trial(_as_optuna(search, trial, optuna))
        for current in range(len(earlier), number + 1):
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=1,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=_seed(search, current),
            )
            running = study.ask()
            found = walked(search.space, lambda n, s, t=running: _suggested(t, n, s))
    assert found is not None
    return found


def _suggested(trial: Any, name: str, space: Any) -> Any:
    """Returns the value that a trial of optuna suggests for a parameter."""
    if isinstance(space, Choice):
        return trial.suggest_categorical(name, space.labels)
    if isinstance(space, Int):
        return trial.suggest_int(name, space.low, space.high, log=space.log)
    value = trial.suggest_float(name, space.low, space.high, log=space.log)
    return rounded(value, space)


def _as_optuna(search: Search, trial: Trial, optuna: Any) -> Any:
    """Returns a trial as one of optuna's.

    A failed trial, and one without a finite value, counts as pruned before its first
    value, which TPE takes for worse than all others.

    Raises:
        UserError: The trial is not of this space.
    """
    distributions: dict[str, Any] = {}

    def known(name: str, space: Any) -> Any:
        distributions[name] = _distribution(space, optuna)
        return trial.params[name]

    states, is_complete = optuna.trial.TrialState, trial.is_complete
    has_curve = trial.state != "failed" and not is_complete
    try:
        walked(search.space, known)
        return optuna.trial.create_trial(
            state=states.COMPLETE if is_complete else states.PRUNED,
            params=dict(trial.params),
            distributions=distributions,
            value=trial.value if is_complete else None,
            intermediate_values=trial.mean_curve if has_curve else {},
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"search.space: trial {trial.number} has {trial.params}, which is not in this "
            f"space ({error}); a search that has changed needs another folder"
        ) from error


def _distribution(space: Any, optuna: Any) -> Any:
    """Returns the distribution of a parameter, as `_suggested` has it."""
    kinds = optuna.distributions
    if isinstance(space, Choice):
        return kinds.CategoricalDistribution(space.labels)
    is_int = isinstance(space, Int)
    kind = kinds.IntDistribution if is_int else kinds.FloatDistribution
    return kind(space.low, space.high, log=space.log)
