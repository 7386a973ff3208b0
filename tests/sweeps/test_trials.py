"""A search over members is the same whichever of them end first, and checked before."""

import math
import random

import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.sweeps import Choice, Float, Halving, Median, Search, Sweep, Wilcoxon
from finetune_jax.sweeps.schedule import Outcome, Schedule, check, is_pruned_at

STEPS = range(0, 60, 10)
SPACE = {
    "optimizer": Choice(
        {
            "sgd": {
                "plan[0].optimizer": "sgd",
                "plan[0].optimizer_args.momentum": Float(0.0, 0.9),
            },
            "adam": {"plan[0].optimizer": "adam"},
        }
    ),
    "plan[0].peak_lr": Float(1e-4, 1.0, log=True),
}


def sweep(space=None, seeds=1, **changes):
    given = {"space": space or SPACE, "metric": "validation/accuracy", "trials": 20}
    search = Search(**given | changes)
    return Sweep(base=small.editable(small.config()), search=search, seeds=seeds)


def curve(member):
    """Returns the curve of a member, which is better for rates near 0.01."""
    noise, rate = random.Random(member.key), member.config.plan[0].peak_lr
    if rate > 0.5:
        return None
    height = 1 - (math.log10(rate) + 2) ** 2 / 10
    return {
        step: height * (1 - math.exp(-step / 20)) + noise.gauss(0, 0.1)
        for step in STEPS
    }


def ended(wanted_sweep, wanted, member):
    """Returns how a member ends, judged while it runs."""
    values, pruner = curve(member), wanted_sweep.search.pruner
    if values is None:
        return Outcome(state="failed", result={"failed": "a loss is not finite"})
    if pruner is not None and not pruner.over_seeds:
        ends = is_pruned_at(wanted_sweep, wanted, member)
        for step in STEPS[:-1]:
            known = {s: values[s] for s in STEPS if s <= step}
            if ends(known):
                return Outcome(state="pruned", curve=known)
    best = {"best": {"validation/accuracy": max(values.values())}}
    return Outcome(state="complete", result=best, curve=values)


def searched(wanted_sweep, choose=lambda running: running[0], at_once=4):
    """Returns the trials of a search, and the keys of their members.

    Args:
        wanted_sweep: Sweep.
        choose: Returns which of the running members ends next, in order of their starts.
        at_once: Number of members that run at the same time.
    """
    outcomes, running = {}, {}
    schedule = Schedule(wanted_sweep)
    while True:
        if len(outcomes) % 20 == 19:  # By a new worker, which knows the outcomes alone.
            schedule = Schedule(wanted_sweep)
        wanted = schedule.wanted(outcomes.get)
        left = [m for m in wanted.members if m.key not in outcomes]
        for member in left:
            if len(running) < at_once and member.key not in running:
                running[member.key] = wanted, member
        if not running:
            assert wanted.is_all
            return wanted.trials, set(outcomes)
        key = choose([*running])
        outcomes[key] = ended(wanted_sweep, *running.pop(key))


@pytest.mark.parametrize(
    "seeds, pruner",
    [
        (1, None),
        (1, Median(startup=3)),
        (3, Halving(first_steps=10)),
        (4, Wilcoxon(p=0.2)),
    ],
)
def test_a_search_is_the_same_whichever_members_end_first(seeds, pruner):
    wanted = sweep(seeds=seeds, pruner=pruner)
    trials, keys = searched(wanted, at_once=1)
    for choose in (random.Random(0).choice, lambda running: running[-1]):
        others, more = searched(wanted, choose, at_once=5)
        assert others == trials and keys <= more
    states = {trial.state for trial in trials.values()}
    assert states == {"complete", "failed"} | ({"pruned"} if pruner else set())


def test_a_pruned_seed_ends_its_trial():
    wanted = sweep(seeds=3, pruner=Halving(first_steps=10))
    trials, keys = searched(wanted, at_once=1)
    for trial in trials.values():
        if trial.state == "pruned":
            assert all(
                max(trial.curves[seed]) == STEPS[-1] for seed in [*trial.curves][:-1]
            )
            assert max(trial.curves[len(trial.curves) - 1]) < STEPS[-1]
    assert len(keys) == sum(len(t.curves) or 1 for t in trials.values())


def test_a_mistake_in_any_option_is_told_before_anything_runs():
    wrong = dict(SPACE)
    options = dict(SPACE["optimizer"].options)
    options["rare"] = {"plan[0].optimiser": "adam"}
    wrong |= {"optimizer": Choice(options), "plan[0].weight_decay": Float(-1.0, 1.0)}
    with pytest.raises(UserError) as caught:
        check(sweep(wrong))
    text = str(caught.value)
    assert "config.plan[0].optimiser: unknown; did you mean 'optimizer'?" in text
    assert "config.plan[0].weight_decay: -1.0" in text
    # The start-up trials, and examples with both ends of the ranges.
    assert len(check(sweep())) == 12 + 3
