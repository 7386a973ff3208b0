import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.optim import compile_phase
from finetune_jax.optim.optimizer import by_name, carried
from finetune_jax.plans.phase import Group, Phase, carried_cohorts, groups

PARAMS = {
    "stem": {"kernel": np.full((2, 3), 0.5, np.float32)},
    "head": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)},
}
NAMES = tuple(named(PARAMS))
HEAD = (("head/.*", 1.0), (".*", 0.0))


def state_and_updates(phase, plan=None, index=0, gradients=None, state=None):
    optimizer = compile_phase(phase).transformation(
        groups(plan or (phase,), index, NAMES)
    )
    state = optimizer.init(PARAMS) if state is None else state
    gradients = gradients or jax.tree.map(np.ones_like, PARAMS)
    rate = jnp.asarray(0.1, jnp.float32)
    return optimizer.update(gradients, state, PARAMS, learning_rate=rate)[::-1]


def test_each_group_moves_by_minus_its_rate_bit_for_bit():
    rules = (("head/bias", 0.3), ("head/.*", 1.0), (".*", 0.1))
    phase = Phase(steps=1, optimizer="sgd", rules=rules)
    _, updates = state_and_updates(phase)
    for name, scale in zip(("stem/kernel", "head/kernel", "head/bias"), (0.1, 1, 0.3)):
        rate = np.float32(0.1) * np.float32(scale)
        assert (np.asarray(named(updates)[name]) == -rate).all(), name


def test_clipping_bounds_the_norm_over_all_groups_and_no_frozen_leaf():
    rules = (("head/bias", 0.3), ("head/.*", 1.0), (".*", 0.0))
    phase = Phase(steps=1, optimizer="sgd", rules=rules, clip_norm=1.0)
    gradients = jax.tree.map(np.ones_like, PARAMS)
    gradients["stem"]["kernel"] *= 1e6
    _, updates = state_and_updates(phase, gradients=gradients)
    factor = 1 / np.sqrt(8)  # Eight trained values of gradient 1.
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * factor, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["bias"], -0.03 * factor, rtol=1e-6)
    assert not np.asarray(updates["stem"]["kernel"]).any()


@pytest.mark.parametrize(
    ("name", "arguments", "oracle"),
    [
        ("sgd", {}, optax.sgd(0.1)),
        ("sgd", {"momentum": 0.9}, optax.sgd(0.1, 0.9)),
        ("sgd", {"momentum": 0.9, "nesterov": True}, optax.sgd(0.1, 0.9, True)),
        ("adam", {"b1": 0.8}, optax.adam(0.1, 0.8)),
        ("adamw", {}, optax.adamw(0.1, weight_decay=0.0)),
    ],
)
def test_an_optimizer_is_the_one_of_optax(name, arguments, oracle):
    phase = Phase(steps=1, optimizer=name, optimizer_args=arguments)
    state, theirs_state = None, oracle.init(PARAMS)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        gradients = jax.tree.map(
            lambda p, r=rng: r.normal(size=p.shape).astype(np.float32), PARAMS
        )
        state, ours = state_and_updates(phase, gradients=gradients, state=state)
        theirs, theirs_state = oracle.update(gradients, theirs_state, PARAMS)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs
        )


def test_decay_spares_biases_and_is_decoupled_for_adamw_only():
    zero = jax.tree.map(np.zeros_like, PARAMS)
    adamw = Phase(steps=1, optimizer="adamw", weight_decay=0.5)
    _, updates = state_and_updates(adamw, gradients=zero)
    np.testing.assert_allclose(updates["stem"]["kernel"], -0.1 * 0.5 * 0.5, rtol=1e-6)
    assert not np.asarray(updates["head"]["bias"]).any()
    adam = Phase(steps=1, optimizer="adam", weight_decay=0.5)
    _, updates = state_and_updates(adam, gradients=zero)
    np.testing.assert_allclose(updates["stem"]["kernel"], -0.1, rtol=1e-4)


@pytest.mark.slow
def test_a_state_of_names_works_with_a_line_search():
    """L-BFGS wants the value of the whole function, and fails beside masked leaves."""
    target = jax.tree.map(lambda p: np.full_like(p, 2.0), PARAMS)

    def value(params):
        # What is frozen is hidden by nodes without leaves; it is known all the same.
        params = {**PARAMS, "head": params["head"]}
        squares = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return sum(jax.tree.leaves(squares))

    labels = {"stem": {"kernel": "frozen"}, "head": {"kernel": "t", "bias": "t"}}
    optimizer = optax.multi_transform(
        {"frozen": optax.set_to_zero(), "t": by_name(optax.lbfgs())}, labels
    )

    @jax.jit
    def update(params, state):
        loss, gradient = jax.value_and_grad(value)(params)
        updates, state = optimizer.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = update(params, state)
    np.testing.assert_allclose(params["head"]["kernel"], 2.0, rtol=1e-5)
    assert (np.asarray(params["stem"]["kernel"]) == 0.5).all()


PLAN = (
    Phase(name="head", steps=1, rules=HEAD),
    Phase(name="slow", steps=1, rules=(("head/.*", 0.5), (".*", 0.1))),
    Phase(name="stem", steps=1, rules=(("stem/.*", 1.0), (".*", 0.0))),
    Phase(name="two", steps=1, rules=HEAD, accumulate_steps=2),
)


def test_the_states_of_different_phases_have_no_name_sets_in_common():
    states = [state_and_updates(phase)[0] for phase in PLAN]
    for one, other in itertools.combinations(states, 2):
        assert set(named(one)) != set(named(other))


def test_a_carried_group_keeps_state_and_count_and_a_joining_one_starts_fresh():
    plan = (
        Phase(name="head", steps=1, rules=HEAD, optimizer="adam"),
        Phase(
            name="all", steps=1, rules=(("head/.*", 0.5), (".*", 0.1)),
            optimizer="adam", optimizer_state="carry", weight_decay=0.1,
        ),
    )  # fmt: skip
    old = None
    for _ in range(5):
        old, _ = state_and_updates(plan[0], state=old)
    fresh = compile_phase(plan[1]).transformation(groups(plan, 1, NAMES)).init(PARAMS)
    new = carried(old, fresh, carried_cohorts(plan, 1, NAMES))
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    leaves = named(new)
    counts = {name: int(leaf) for name, leaf in leaves.items() if "count" in name}
    assert sorted(counts.values()) == [0, 5]
    for name, leaf in leaves.items():
        if name.endswith("mu/head/kernel"):
            np.testing.assert_allclose(leaf, 1 - 0.9**5, rtol=1e-6)
        if name.endswith("stem/kernel"):
            assert not np.asarray(leaf).any()
    _, updates = state_and_updates(plan[1], plan, 1, state=new)
    _, first = state_and_updates(plan[1], plan, 1)
    # The joining group's first update is that of a fresh optimizer.
    np.testing.assert_array_equal(updates["stem"]["kernel"], first["stem"]["kernel"])


def test_unknown_optimizers_and_arguments_are_refused_with_close_matches():
    with pytest.raises(UserError, match="optimizer: no 'adamm'; did you mean"):
        compile_phase(Phase(steps=1, optimizer="adamm"))
    with pytest.raises(UserError, match="optimizer_args.beta1: unknown"):
        compile_phase(Phase(steps=1, optimizer_args={"beta1": 0.9}))


def test_groups_are_labelled_by_scale_and_cohort():
    assert Group(0.1, 2).label == "scale=0.1,cohort=2"


def clipped(gradients, **fields):
    phase = Phase(steps=1, optimizer="sgd", **fields)
    _, updates = state_and_updates(phase, gradients=gradients)
    return named(jax.tree.map(lambda u: -10 * np.asarray(u), updates))  # Rate 0.1.


def test_clip_value_bounds_each_value():
    gradients = jax.tree.map(lambda p: 3 * p, PARAMS)
    for name, found in clipped(gradients, clip_value=2.0).items():
        wanted = np.minimum(named(gradients)[name], 2.0)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_adaptive_clipping_bounds_a_unit_by_the_norm_of_its_weights():
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS
    )
    found = clipped(gradients, clip_adaptive=0.5)
    for name, gradient in named(gradients).items():
        weights = named(PARAMS)[name]
        # A unit is a column of a kernel; a bias is one unit (Brock et al. 2021).
        axis = 0 if weights.ndim > 1 else None
        norm = np.sqrt(np.sum(gradient**2, axis=axis, keepdims=True))
        most = 0.5 * np.maximum(
            np.sqrt(np.sum(weights**2, axis=axis, keepdims=True)), 1e-3
        )
        wanted = np.where(norm > most, gradient * most / norm, gradient)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)
    assert any(np.abs(found[n] - g).max() > 0.1 for n, g in named(gradients).items())


def test_at_most_one_clipping_is_taken():
    phase = Phase(steps=1, clip_norm=1.0, clip_value=1.0)
    assert any("at most one" in str(problem) for problem in phase.problems())
