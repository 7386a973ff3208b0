"""The members that a sweep wants, from the results so far."""

import random

from finetune_jax import sweeps
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.schedule import Outcome, Schedule
from finetune_jax.sweeps.status import states_of, status_lines

IRIS = "configs/iris_mlp.py"
TUNED = {"plan[0].peak_lr": (0.01, 0.1, 1.0)}


def outcome(value, metric="validation/loss"):
    return Outcome(state="complete", result={"best": {metric: value}})


FAILED = Outcome(state="failed", result={"failed": "x"})


def test_an_arm_runs_with_its_best_tuned_values():
    sweep = sweeps.Sweep(
        base=IRIS, arms={"a": {}, "b": {"model.hidden": (8,)}}, tune=TUNED, seeds=3
    )
    schedule, ended = Schedule(sweep), {}
    first = schedule.wanted(ended.get)
    assert len(first.members) == 6 and not first.is_all
    losses = {0.01: 0.5, 0.1: 0.3, 1.0: 0.4}
    for one in first.members:
        if one.arm == "a":
            ended[one.key] = outcome(losses[one.tuned["plan[0].peak_lr"]])
    second = schedule.wanted(ended.get)
    final = [m for m in second.members if m.stage == "final"]
    assert [m.arm for m in final] == ["a"] * 3 and not second.is_all
    assert {m.config.plan[0].peak_lr for m in final} == {0.1}
    # The tuning run with the chosen rate is the run with the first seed.
    assert final[0].key in ended and len(second.members) == 6 + 2
    for one in first.members:
        ended.setdefault(one.key, FAILED)
    last = schedule.wanted(ended.get)
    assert last.is_all and last.tuned["a", ""] == {"plan[0].peak_lr": 0.1}
    assert not [m for m in last.members if m.arm == "b" and m.stage == "final"]


def test_a_failed_tuning_run_is_passed_over():
    schedule, ended = Schedule(sweeps.Sweep(base=IRIS, tune=TUNED, seeds=1)), {}
    for one in schedule.wanted(ended.get).members:
        rate = one.tuned["plan[0].peak_lr"]
        ended[one.key] = FAILED if rate == 0.01 else outcome(rate)
    assert schedule.wanted(ended.get).tuned["base", ""] == {"plan[0].peak_lr": 0.1}


def test_all_cases_take_the_values_of_one():
    cases = {"few": {"data.train": "train[:30]"}, "all": {}}
    sweep = sweeps.Sweep(base=IRIS, cases=cases, tune=TUNED, tune_case="few", seeds=1)
    schedule, ended = Schedule(sweep), {}
    members = schedule.wanted(ended.get).members
    assert {m.case for m in members} == {"few"} and len(members) == 3
    for one in members:
        ended[one.key] = outcome(one.tuned["plan[0].peak_lr"])
    found = schedule.wanted(ended.get)
    final = [m for m in found.members if m.stage == "final"]
    assert [(m.case, m.config.plan[0].peak_lr) for m in final] == [
        ("few", 0.01), ("all", 0.01)
    ]  # fmt: skip


def test_sources_come_before_the_runs_that_need_them():
    sweep = sweeps.Sweep(
        base=IRIS,
        arms={"tuned": {"init.pretrained": "sweep:long"}},
        sources={"long": sweeps.Source(overrides={"plan[0].epochs": 9}, by_seed=True)},
        seeds=2,
    )
    members = Schedule(sweep).wanted({}.get).members
    assert [m.stage for m in members] == ["source", "final", "source", "final"]
    keys = [m.key for m in members]
    assert all(keys.index(n) < keys.index(m.key) for m in members for n in m.needs)


def value_of(member):
    rate = member.config.plan[0].peak_lr
    seed = dict(member.seed)["init"]
    return abs(rate - 0.03) + 0.001 * seed


def searched(sweep, order):
    """Returns the trials of a search whose members end in a random order."""
    draw, ended = random.Random(order), {}
    while True:
        # A worker that begins anew knows the results alone.
        wanted = Schedule(sweep).wanted(ended.get)
        left = [m for m in wanted.members if m.key not in ended]
        if not left:
            assert wanted.is_all
            return wanted.trials
        one = draw.choice(left)
        ended[one.key] = outcome(value_of(one))


def test_a_search_does_not_depend_on_the_order_of_workers():
    sweep = sweeps.Sweep(
        base=IRIS,
        search=sweeps.Search(
            space={"plan[0].peak_lr": sweeps.Float(1e-3, 1.0, log=True)},
            metric="validation/loss", trials=12, startup=4,
        ),
        seeds=2,
    )  # fmt: skip
    one, two = searched(sweep, 1), searched(sweep, 2)
    assert len(one) == 12 and one == two
    assert min(t.value for t in one.values()) < 0.02


def test_worse_seeds_of_a_trial_are_not_run():
    sweep = sweeps.Sweep(
        base=IRIS,
        search=sweeps.Search(
            space={"plan[0].peak_lr": sweeps.Float(1e-3, 1.0, log=True)},
            metric="validation/loss", trials=12, startup=4, sampler="random",
            pruner=sweeps.Wilcoxon(p=0.2),
        ),
        seeds=8,
    )  # fmt: skip
    trials = searched(sweep, 1)
    pruned = [t for t in trials.values() if t.state == "pruned"]
    assert pruned and all(len(t.curves) < 8 for t in pruned)
    best = min(trials.values(), key=lambda t: t.value)
    assert best.state == "complete" and len(best.curves) == 8
    assert trials == searched(sweep, 2)


def test_the_members_that_will_follow_are_counted_before_they_are_known(tmp_path):
    arms = {"a": {}, "b": {"model.hidden": (8,)}}
    cases = {"x": {}, "y": {"data.batch_size": 15}}
    for tune_case in (None, "x"):
        sweep = sweeps.Sweep(
            base=IRIS, arms=arms, cases=cases, tune=TUNED, seeds=3, tune_case=tune_case
        )
        schedule, ended = Schedule(sweep), {}
        first = schedule.wanted(ended.get)
        folder = SweepFolder(tmp_path / str(tune_case), sweep)
        line = status_lines(folder, first, states_of(folder, first.members))[0]
        assert line.endswith(f"; up to {first.more} more follow from the results")
        while not (wanted := schedule.wanted(ended.get)).is_all:
            assert len(wanted.members) + wanted.more == len(first.members) + first.more
            one = next(m for m in wanted.members if m.key not in ended)
            ended[one.key] = outcome(one.config.plan[0].peak_lr)
        assert len(wanted.members) == len(first.members) + first.more
        assert wanted.more == 0


def test_a_search_counts_the_trials_that_it_has_not_proposed():
    space = {"plan[0].peak_lr": sweeps.Float(0.01, 1.0)}
    search = sweeps.Search(space=space, metric="validation/loss", trials=7)
    sweep = sweeps.Sweep(base=IRIS, search=search, seeds=2)
    wanted = Schedule(sweep).wanted(lambda _: None)
    assert len(wanted.members) + wanted.more == 14
