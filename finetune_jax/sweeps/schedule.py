"""The members that a sweep wants next: a pure function of the results so far.

All workers compute it for themselves from the folder, so they agree without a server.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import Problem, collected, raise_if
from finetune_jax.core.metric_names import is_better
from finetune_jax.sweeps.definition import (
    Seed,
    Sweep,
    definition_problems,
    form_problems,
)
from finetune_jax.sweeps.members import REFERENCE, Member, Members, tune_of
from finetune_jax.sweeps.search.proposals import is_pruned, proposal
from finetune_jax.sweeps.search.pruning import Trial
from finetune_jax.sweeps.search.space import Proposal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a member ended.

    Attributes:
        state: 'complete', 'pruned', or 'failed' after its last attempt.
        result: Content of `result.json`; {} if it is not complete.
        curve: Metric of a search by step.
    """

    state: str
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curve: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """Returns a metric of the best state; None if it has no finite value."""
        value = self.result.get("best", {}).get(metric)
        return value if value is not None and math.isfinite(value) else None


# Returns how a member ended, by its key; None if it has not.
OutcomeOf = Callable[[str], Outcome | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """A combination of values that tuning tries for an arm.

    Attributes:
        arm: Name of the arm.
        case: Name of the case.
        values: Values, or their names, by config key.
        metric: Metric that chooses.
        mean: Its mean over the tuning seeds; None before they have all finished.
        has_failed: Whether a run failed.
    """

    arm: str
    case: str
    values: Mapping[str, Any]
    metric: str
    mean: float | None
    has_failed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """Members that are known by now.

    Attributes:
        members: Each run once, in order of urgency.
        labelled: Each run under each of its names: two arms can come to the same config,
            as by tuning.
        is_all: Whether there will be no more.
        sources: Keys of the runs that others start from.
        tuned: Chosen values of each (arm, case) that has been tuned.
        trials: Trials of a search by number, as far as they have ended.
        tuning: Combinations that tuning tries.
        more: Largest number of members that will follow from results.
    """

    members: tuple[Member, ...]
    labelled: tuple[Member, ...]
    is_all: bool
    sources: frozenset[str] = frozenset()
    tuned: Mapping[tuple[str, str], Mapping[str, Any]]
    trials: Mapping[int, Trial] = dataclasses.field(default_factory=dict)
    tuning: Sequence[Tuning] = ()
    more: int = 0


class Schedule:
    """Says which members a sweep wants."""

    def __init__(self, sweep: Sweep):
        """Takes the sweep."""
        self.sweep = sweep
        self.members = Members(sweep)
        self._proposals: dict[int, Proposal] = {}
        self._pruned: dict[Any, bool] = {}

    def wanted(self, outcome_of: OutcomeOf) -> Wanted:
        """Returns the members that are known by the results of others.

        Args:
            outcome_of: Returns how a member ended, by its key; None if it has not.

        Raises:
            UserError: A config cannot be resolved.
        """
        if self.sweep.search is not None:
            return self._trials(outcome_of)
        tuning, tuned, tried, more = list[Member](), {}, dict[Any, list[Tuning]](), 0
        pairs = list(itertools.product(self.sweep.cases, self.sweep.all_arms))
        for case, arm in pairs:
            where = self.sweep.tune_case if self.sweep.tune_case is not None else case
            own, tried[arm, where], chosen = self._tuned(arm, where, outcome_of)
            tuning += own
            if chosen is None:
                # Those with a tuning seed have run already.
                ran = self.sweep.tune_seeds if where == case else 0
                more += len(self.sweep.all_seeds) - ran
            else:
                tuned[arm, case] = chosen
        final = [
            self.members.final(arm, case, seed, tuned[arm, case], "final")
            for seed in self.sweep.all_seeds
            for case, arm in pairs
            if (arm, case) in tuned and tuned[arm, case] != _NOTHING
        ]
        return self._wanted(
            [*tuning, *final], is_all=len(tuned) == len(pairs), tuned=tuned,
            tuning=[one for ones in tried.values() for one in ones], more=more,
        )  # fmt: skip

    def _wanted(self, members: Sequence[Member], **known: Any) -> Wanted:
        """Returns members after the sources that they need.

        Args:
            members: Members, some of which may be the same run.
            known: Other attributes of `Wanted`.
        """
        sources = {
            member.key: member
            for name in self.sweep.sources
            for seed in self.sweep.all_seeds
            for member in [self.members.source(name, seed)]
        }
        found: dict[str, Member] = {}
        labelled: list[Member] = []
        needed: set[str] = set()

        def add(member: Member) -> None:
            for key in member.needs:
                if key not in needed:
                    needed.add(key)
                    add(sources[key])
            labelled.append(member)
            # A tuning run that is also the run of the arm counts as that.
            if member.key not in found or found[member.key].stage == "tune":
                found[member.key] = member

        for member in members:
            add(member)
        return Wanted(
            members=tuple(found.values()),
            labelled=tuple(labelled),
            sources=frozenset(sources),
            **known,
        )

    def _tuned(
        self, arm: str, case: str, outcome_of: OutcomeOf
    ) -> tuple[list[Member], list[Tuning], Mapping[str, Any] | None]:
        """Returns the tuning runs of an arm, and its values once they have ended.

        The values are `_NOTHING` if no choice has a value for all seeds.
        """
        grid = tune_of(self.sweep, arm)
        if not grid:
            return [], [], {}
        seeds = self.sweep.all_seeds[: self.sweep.tune_seeds]
        best, highest, is_over = _NOTHING, None, True
        found, tried = list[Member](), list[Tuning]()
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            runs = [self.members.final(arm, case, s, chosen, "tune") for s in seeds]
            found += runs
            ended = [outcome_of(run.key) for run in runs]
            metric = tune_metric(self.sweep, runs[0])
            is_over = is_over and None not in ended
            numbers = [o.value(metric) for o in ended if o is not None]
            mean = None
            if numbers and None not in numbers:
                mean = math.fsum(v for v in numbers if v is not None) / len(numbers)
                if is_better(metric, mean, highest):
                    best, highest = chosen, mean
            has_failed = any(o is not None and o.state == "failed" for o in ended)
            mean = mean if len(numbers) == len(runs) else None
            tried.append(
                Tuning(
                    arm=arm, case=case, values=chosen, metric=metric, mean=mean,
                    has_failed=has_failed,
                )
            )  # fmt: skip
        return found, tried, best if is_over else None

    def _trials(self, outcome_of: OutcomeOf) -> Wanted:
        """Returns the members of the trials that may be proposed by now.

        A trial is proposed once the trials that it needs have ended.
        """
        search = self.sweep.search
        assert search is not None
        members, ended = list[Member](), dict[int, Trial]()
        for number in range(search.count):
            if not all(other in ended for other in search.needs(number)):
                break
            before = {other: ended[other] for other in search.needs(number)}
            own, trial = self._trial(number, before, outcome_of)
            members += own
            if trial is not None:
                ended[number] = trial
        is_all = len(ended) == search.count
        # A trial that ended early has fewer.
        all_runs = search.count * len(self.sweep.all_seeds)
        more = 0 if is_all else all_runs - len(members)
        return self._wanted(members, is_all=is_all, tuned={}, trials=ended, more=more)

    def _trial(
        self, number: int, before: Mapping[int, Trial], outcome_of: OutcomeOf
    ) -> tuple[list[Member], Trial | None]:
        """Returns the members of a trial that may run, and the trial if it has ended."""
        search = self.sweep.search
        assert search is not None
        proposed = self._proposal(number, before)
        found: list[Member] = []
        curves: dict[int, Mapping[int, float]] = {}
        values: dict[int, float] = {}
        state = "complete"
        over_seeds = search.pruner is not None and search.pruner.over_seeds
        seeds = self.sweep.all_seeds
        for index, seed in enumerate(seeds):
            found.append(self.members.trial(number, seed, proposed.overrides))
            outcome = outcome_of(found[-1].key)
            if outcome is None:
                state = "running"
                if over_seeds:  # They decide whether the next one runs.
                    break
                continue
            curves[index] = outcome.curve
            value = outcome.value(search.metric)
            if value is not None:
                values[index] = value
            elif outcome.state == "complete":  # The metric has no value.
                state = state if state == "running" else "failed"
                break
            if outcome.state != "complete":
                # Which seed ends first must not decide: an earlier one may be pruned yet.
                state = state if state == "running" else outcome.state
                break
            more = over_seeds and index + 1 < len(seeds)
            if more and self._is_pruned(number, before, values):
                state = "pruned"
                break
        if state == "running":
            return found, None
        # Curves of a search over seeds end with the value of the best state.
        if over_seeds:
            curves = {index: {0: value} for index, value in values.items()}
        return found, Trial(
            number=number, overrides=dict(proposed.overrides),
            params=dict(proposed.params),
            value=_mean(values.values()) if state != "failed" else None,
            curves=curves, state=state,
        )  # fmt: skip

    def _is_pruned(
        self, number: int, before: Mapping[int, Trial], values: Mapping[int, float]
    ) -> bool:
        """Returns whether a trial ends after some of its seeds, computed once."""
        judged = number, tuple(values.items())
        if judged not in self._pruned:
            assert self.sweep.search is not None
            ends = is_pruned(self.sweep.search, before, number, values)
            self._pruned[judged] = ends
        return self._pruned[judged]

    def _proposal(self, number: int, before: Mapping[int, Trial]) -> Proposal:
        """Returns the values of a trial, computed once."""
        if number not in self._proposals:
            assert self.sweep.search is not None
            self._proposals[number] = proposal(self.sweep.search, before, number)
        return self._proposals[number]


def is_pruned_at(
    sweep: Sweep, wanted: Wanted, member: Member
) -> Callable[[Mapping[int, float]], bool]:
    """Returns the function that says whether a running trial ends early.

    Args:
        sweep: A sweep with a search.
        wanted: Members that are known by now, with the trials that have ended.
        member: Member of the trial.
    """
    search, number = sweep.search, member.trial
    assert search is not None and number is not None
    before = {other: wanted.trials[other] for other in search.needs(number)}
    index = sweep.all_seeds.index(member.seed)
    return lambda curve: is_pruned(search, before, number, curve, seed=index)


def _mean(values: Collection[float]) -> float | None:
    """Returns the mean; None if there are no values."""
    return math.fsum(values) / len(values) if values else None


# Values of an arm if no choice has a value of the metric for all tuning seeds.
_NOTHING: Mapping[str, Any] = {"": None}


def tune_metric(sweep: Sweep, member: Member) -> str:
    """Returns the metric that chooses the values of tuned keys."""
    name = sweep.metric.rpartition("/")[2]
    default = member.config.evaluate.best or f"validation/{name}"
    return sweep.tune_by or default


def check(sweep: Sweep) -> list[Member]:
    """Returns the members that every sweep has, each arm with its first seed.

    Raises:
        UserError: Lists what `resolved` finds.
    """
    members, problems = resolved(sweep)
    raise_if(problems)
    return members


def resolved(sweep: Sweep) -> tuple[list[Member], list[Problem]]:
    """Returns the members that every sweep has, each arm with its first seed.

    Returns:
        Those whose configs can be resolved; and all problems: of the definition, of
        configs, arms with the same config, and sources that no run starts from.
    """
    if problems := form_problems(sweep):
        return [], problems
    problems = definition_problems(sweep)
    schedule = Schedule(sweep)
    members: list[Member] = []
    for seed in sweep.all_seeds[:1]:
        sources = list[Member]()
        for name in sweep.sources:
            with collected(problems):
                sources.append(schedule.members.source(name, seed))
        if sweep.search is None:
            found = _of_arms(schedule, seed, problems)
        else:
            found = _of_search(schedule, seed, problems)
        members += [*sources, *found]
        needed = {key for member in members for key in member.needs}
        if not problems:
            text = "no run starts from it; leave it out, or set init.pretrained="
            problems += [
                Problem("Sweep.sources", f"{one.arm!r}: {text}'{REFERENCE}{one.arm}'")
                for one in sources
                if one.key not in needed
            ]
    return members, list(dict.fromkeys(problems))


def _of_search(schedule: Schedule, seed: Seed, problems: list[Problem]) -> list[Member]:
    """Returns first members of a search, with examples of its space."""
    assert schedule.sweep.search is not None
    if any(problem.key.startswith("search") for problem in problems):
        return []
    # Later proposals may choose any option, and any value of a range.
    examples = list[Member]()
    before = len(problems)
    for overrides in schedule.sweep.search.examples():
        with collected(problems):
            examples.append(schedule.members.example(seed, overrides))
    if len(problems) > before:
        return examples
    return [*schedule.wanted(lambda _: None).members, *examples]


def _of_arms(schedule: Schedule, seed: Seed, problems: list[Problem]) -> list[Member]:
    """Returns the members of all arms with a seed; each combination of tuned values."""
    sweep, members, same = schedule.sweep, list[Member](), dict[tuple, str]()
    for case, arm in itertools.product(sweep.cases, sweep.all_arms):
        keys = []
        grid = tune_of(sweep, arm)
        for values in itertools.product(*grid.values()):
            tuned = dict(zip(grid, values, strict=True))
            with collected(problems):
                stage = "tune" if tuned else "final"
                member = schedule.members.final(arm, case, seed, tuned, stage)
                members.append(member)
                keys.append(member.key)
        name = f"{arm!r}{case and f', case {case!r}'}"
        # The order of tuned values decides nothing but ties.
        other = same.setdefault(tuple(sorted(keys)), name)
        if keys and other != name:
            text = f"{arm!r} has the same config as {other}; leave one of them out"
            problems.append(Problem("Sweep.arms", text))
    return members
