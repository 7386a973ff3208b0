import dataclasses

import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.plans.phase import (
    Phase,
    as_config,
    carried_cohorts,
    check_plan,
    durations,
    groups,
    joined,
    phase_at,
    plan_from_config,
    scales,
)
from finetune_jax.plans.strategies import full, head_only

NAMES = ("stem/kernel", "stage1/kernel", "head/kernel", "head/bias")


def rules(*pairs, **fields):
    return Phase(**{"steps": 1, "rules": pairs, **fields})


def test_the_first_rule_that_matches_wins():
    phase = rules(("head/bias", 0.5), ("head/.*", 1.0), (".*", 0.0))
    assert scales(phase, NAMES) == dict(zip(NAMES, (0.0, 0.0, 1.0, 0.5)))


def test_rules_match_the_full_name():
    with pytest.raises(UserError, match=r"rules\[0\]: 'head' matches nothing"):
        scales(rules(("head", 1.0), (".*", 0.0)), NAMES)


def test_all_misfits_of_rules_are_told_at_once():
    phase = rules(("head/.*", 1.0), ("haed/.*", 0.5), ("head/bias", 0.1))
    with pytest.raises(UserError) as found:
        scales(phase, NAMES)
    for part in (
        "rules: no rule matches stem/kernel, stage1/kernel;",
        "rules[1]: 'haed/.*' matches nothing (no parameter)",
        "rules[2]: 'head/bias' matches nothing (earlier rules take all it matches)",
    ):
        assert part in str(found.value)


def test_epochs_become_updates_rounded_up():
    plan = durations((Phase(epochs=3),), examples=100, batch_size=32)
    assert plan[0].steps == 10


def test_a_warm_up_longer_than_its_phase_is_refused():
    with pytest.raises(UserError, match="warmup_steps: 5 is more than the 4 steps"):
        durations((Phase(epochs=1, warmup_steps=5),), examples=100, batch_size=32)
    (problem,) = Phase(steps=2, warmup_steps=3).problems()
    assert problem.key == "warmup_steps"


def test_the_phase_of_a_step_follows_what_a_plateau_ended():
    plan = (Phase(steps=10), Phase(steps=5))
    assert [phase_at(plan, (), step)[0] for step in (0, 9, 10, 14)] == [0, 0, 1, 1]
    assert phase_at(plan, (), 12) == (1, 10, 15)
    assert phase_at(plan, (4,), 4) == (1, 4, 9)


def test_a_plan_survives_its_config():
    plan = head_only(epochs=2, clip_norm=1.0, optimizer_args={"b1": 0.8})
    plan += full(steps=3, plateau_metric="validation/loss")
    assert plan_from_config(as_config(plan)) == plan


def test_every_field_of_a_phase_has_its_default_in_the_config():
    (entry,) = as_config((Phase(),))
    assert dict(vars(Phase())) == entry.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one"),
        ({"steps": 1, "epochs": 1.0}, "give exactly one"),
        ({"steps": 0}, "at least 1"),
        ({"epochs": 0.0}, "more than 0"),
        ({"steps": 1, "clip_norm": 0.0}, "more than 0"),
        ({"steps": 1, "peak_lr": float("nan")}, "at least 0"),
        ({"steps": 1, "accumulate_steps": 0}, "at least 1"),
        ({"steps": 1, "batch_stats": "holds"}, "did you mean 'hold'"),
        ({"steps": 1, "optimizer_state": "keep"}, "not one of"),
        ({"steps": 1, "rules": ()}, "empty"),
        ({"steps": 1, "rules": (("(", 1.0),)}, "not a regular expression"),
        ({"steps": 1, "rules": ((".*", -1.0),)}, "finite and >= 0"),
        ({"steps": 1, "rules": ((".*", "1"),)}, "not a number"),
        ({"steps": 1, "rules": (".*",)}, "not a pair"),
    ],
)
def test_a_wrong_phase_is_refused(fields, message):
    with pytest.raises(UserError, match=r"^config\.plan\[0\]\.") as found:
        plan_from_config(as_config((Phase(**fields),)))
    assert message in str(found.value)


def test_phases_with_one_name_and_no_phase_are_refused():
    with pytest.raises(UserError, match="2 phases are named 'train'"):
        plan_from_config(as_config((Phase(steps=1), Phase(steps=2))))
    with pytest.raises(UserError, match="no phase"):
        plan_from_config(())


def test_a_plan_that_trains_nothing_is_refused_unless_it_moves_statistics():
    nothing = rules((".*", 0.0))
    with pytest.raises(UserError, match="trains nothing"):
        check_plan((nothing,), NAMES)
    check_plan((dataclasses.replace(nothing, batch_stats="update_all"),), NAMES)


def test_state_is_not_carried_between_different_optimizers():
    first = rules((".*", 1.0), name="first", optimizer="adam")
    second = rules((".*", 1.0), optimizer="sgd", optimizer_state="carry")
    with pytest.raises(UserError, match="takes the state of 'adam' into 'sgd'"):
        check_plan((first, second), NAMES)
    with pytest.raises(UserError, match="no phase before it"):
        check_plan((dataclasses.replace(first, optimizer_state="carry"),), NAMES)


def test_carried_parameters_keep_their_age_and_joining_ones_are_a_cohort():
    head = rules(("head/.*", 1.0), (".*", 0.0))
    more = rules(
        ("head/.*", 1.0), ("stage1/.*", 0.5), (".*", 0.0), optimizer_state="carry"
    )
    everything = rules((".*", 1.0), optimizer_state="carry")
    plan = (head, more, everything)
    assert joined(plan, 2, NAMES) == dict(zip(NAMES, (2, 1, 0, 0)))
    found = groups(plan, 1, NAMES)
    assert found["head/bias"] == (1.0, 0) and found["stage1/kernel"] == (0.5, 1)
    assert carried_cohorts(plan, 1, NAMES) == {0: 0}
    assert carried_cohorts(plan, 2, NAMES) == {0: 0, 1: 1}


def test_alternating_phases_have_equal_groups():
    head = rules(("head/.*", 1.0), (".*", 0.0))
    body = rules(("head/.*", 0.0), (".*", 1.0))
    plan = (head, body) * 3
    assert groups(plan, 0, NAMES) == groups(plan, 4, NAMES)
    assert groups(plan, 1, NAMES) == groups(plan, 5, NAMES)
