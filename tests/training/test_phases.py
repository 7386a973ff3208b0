"""The compile key of a phase."""

import dataclasses

import pytest
import small

from finetune_jax.core.pytrees import named
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import shapes_of
from finetune_jax.training.phases import phase_setup

# Another value of each field that no compiled step depends on.
NOT_STATIC = {
    "name": "other",
    "steps": 8,
    "epochs": 2.0,
    "peak_lr": 0.5,
    "schedule": "linear",
    "schedule_args": {"a": 1},
    "warmup_steps": 1,
    "warmup_share": 0.1,
    "end_lr_scale": 0.1,
    "plateau_metric": "validation/loss",
    "plateau_patience": 2,
    "plateau_min_change": 0.1,
    "plateau_restore": True,
}
# Fields that the key has by what they give: the groups of parameters and the mode.
IN_GROUPS_OR_MODE = {
    "rules": (("head/.*", 1.0), (".*", 0.5)),
    "batch_stats": "hold",
}
PHASE = Phase(steps=4, optimizer_args={"b1": 0.9})


@pytest.fixture(scope="module")
def key_of():
    task = small.task("mlp", hidden=(8,))
    names = tuple(named(shapes_of(task, "mlp").params))
    return lambda phase: phase_setup((phase,), 0, task, names).program


def other_value(field):
    values = {float: 0.25, bool: True, int: 3, str: "sgd", tuple: (("l2", 0.1, ".*"),)}
    if field.name == "optimizer_args":
        return {"b1": 0.8}
    return values.get(type(field.default), 0.5)


def test_every_field_but_those_marked_decides_the_compile_key(key_of):
    for field in dataclasses.fields(Phase):
        if field.name == "optimizer_state":
            continue  # Of a phase with one before it: see test_plan.py.
        value = NOT_STATIC.get(field.name) or IN_GROUPS_OR_MODE.get(field.name)
        changed = dataclasses.replace(
            PHASE, **{field.name: value or other_value(field)}
        )
        is_same = key_of(changed) == key_of(PHASE)
        assert is_same == (field.name in NOT_STATIC), field.name
        assert hash(key_of(changed)) is not None


def test_a_new_field_decides_the_compile_key_unless_it_is_marked(key_of):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(Phase):
        sharpness: float = 0.0
        note: str = dataclasses.field(default="", metadata={"static": False})

    key = key_of(More(steps=4))
    assert key_of(More(steps=4, sharpness=1.0)) != key
    assert key_of(More(steps=4, note="here")) == key
