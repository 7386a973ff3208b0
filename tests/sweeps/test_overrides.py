"""Overrides of arms: keys of every phase, and tuned values with names."""

import pytest

from finetune_jax import plans, sweeps
from finetune_jax.core.errors import UserError
from finetune_jax.sweeps.schedule import Outcome, Schedule, check

STAGES = ("layer1", "head")
MANY = {"steps": 2, "optimizer": "adam"}


def sweep_of(arm, **options):
    given = {"base": "configs/iris_mlp.py", "arms": {"one": arm}, "seeds": 2}
    return sweeps.Sweep(**given | options)


def test_a_star_is_every_phase():
    plan = plans.two_stage(head_lr=0.5, all_lr=0.5, **MANY)
    arm = {"plan": plan, "plan[*].peak_lr": 0.01, "plan[1].steps": 5}
    [member] = check(sweep_of(arm))
    assert [phase.peak_lr for phase in member.config.plan] == [0.01, 0.01]
    assert [phase.steps for phase in member.config.plan] == [2, 5]


@pytest.mark.parametrize(
    "key, text",
    [("data[*].name", "no entry *; config.data has no entries"),
     ("plan[7].steps", "no entry 7; config.plan has 1 entries"),
     ("plan[*]", "names no key")],
)  # fmt: skip
def test_entries_that_are_not_there_are_told(key, text):
    with pytest.raises(UserError) as failure:
        check(sweep_of({key: 1}))
    assert text in str(failure.value)


def test_values_that_are_tuned_may_have_names():
    rates = {"slow": 1e-3, "fast": 1e-1}
    plan_at = {
        k: plans.progressive(STAGES, peak_lr=v, **MANY) for k, v in rates.items()
    }
    arm = sweeps.Arm(tune={"plan": plan_at})
    schedule = Schedule(sweep_of(arm, tune_by="validation/accuracy"))
    first = schedule.wanted(lambda _: None).members
    assert [m.config.plan[-1].peak_lr for m in first] == list(rates.values())
    outcomes = {
        member.key: Outcome(
            state="complete", result={"best": {"validation/accuracy": value}}
        )
        for member, value in zip(first, (0.1, 0.2))
    }
    wanted = schedule.wanted(outcomes.get)
    assert wanted.tuned == {("one", ""): {"plan": "fast"}}
    final = [m for m in wanted.members if m.stage == "final"]
    assert [m.config.plan[-1].peak_lr for m in final] == [0.1, 0.1]
    assert final[0].key == first[1].key
