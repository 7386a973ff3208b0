"""Regularisers against numpy, scikit-learn and weight decay; L1 gives real zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sklearn.linear_model import Lasso

from finetune_jax.core.pytrees import named
from finetune_jax.optim import compile_phase
from finetune_jax.optim.regularisers import entry_problems, match_problems, penalty
from finetune_jax.plans.phase import Group, Phase

SGD = dict(name="all", steps=9, optimizer="sgd", schedule="constant")


def trainer(**fields):
    task = small.task("mlp", hidden=(8,))
    return small.Trainer(task, Phase(**(SGD | fields)))


def after(trainer, updates=3, micro_batches=1):
    for index in range(updates):
        batch = small.batch(seed=index, micro_batches=micro_batches)
        metrics = trainer.update(batch, rate=0.05)
    return named(jax.tree.map(np.asarray, trainer.state.params)), metrics


@pytest.mark.slow
def test_l2_moves_weights_as_coupled_weight_decay_does():
    one, metrics = after(trainer(regularise=(("l2", 0.3, ".*kernel"),)))
    other, _ = after(trainer(weight_decay=0.3))
    plain, _ = after(trainer())
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert np.abs(one["head/logits/kernel"] - plain["head/logits/kernel"]).max() > 1e-3
    assert metrics["penalty"] > 0


@pytest.mark.slow
def test_a_penalty_counts_once_however_many_micro_batches_there_are():
    entries = (("l2", 0.3, ".*kernel"), ("l2_sp", 0.2, ".*"))
    one, whole = after(trainer(regularise=entries))
    other, parts = after(
        trainer(regularise=entries, accumulate_steps=4), micro_batches=4
    )
    np.testing.assert_allclose(whole["penalty"], parts["penalty"], rtol=1e-5)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_penalties_are_their_formulas():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        w, start, fisher = (
            {n: rng.normal(size=(3, 2)) for n in ("a/kernel", "a/bias", "b/kernel")}
            for _ in range(3)
        )
        entries = (
            ("l2", 0.5, "a/.*"), ("l2_sp", 0.25, ".*kernel"), ("ewc", 2.0, "b/.*"),
            ("l1", 9.0, ".*"),
        )  # fmt: skip
        tree = {"a": {"kernel": w["a/kernel"], "bias": w["a/bias"]}}
        tree["b"] = {"kernel": w["b/kernel"]}
        tree = jax.tree.map(jnp.asarray, tree)
        found = penalty(entries, tree, {"start": start, "fisher": fisher}, set(w))
    moved = {name: w[name] - start[name] for name in w}
    wanted = 0.25 * ((w["a/kernel"] ** 2).sum() + (w["a/bias"] ** 2).sum())
    wanted += 0.125 * sum((moved[n] ** 2).sum() for n in ("a/kernel", "b/kernel"))
    wanted += (fisher["b/kernel"] * moved["b/kernel"] ** 2).sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_l2_sp_pulls_back_to_the_start():
    free, _ = after(trainer(), updates=8)
    tied = trainer(regularise=(("l2_sp", 5.0, ".*"),))
    start = {name: np.asarray(leaf) for name, leaf in tied.fixed["start"].items()}
    tied, _ = after(tied, updates=8)

    def distance(params):
        return sum(np.sum((params[n] - start[n]) ** 2) for n in start)

    assert 0 < distance(tied) < 0.5 * distance(free)


def test_l1_reaches_the_zeros_and_values_of_scikit_learn_s_lasso():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 12))
    y = x[:, :4] @ np.array([2.0, -1.5, 1.0, 0.05]) + 0.1 * rng.normal(size=60)
    lasso = Lasso(alpha=0.2, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y)
    phase = Phase(steps=1, optimizer="sgd", regularise=(("l1", 0.2, "w"),))
    optimizer = compile_phase(phase).transformation({"w": Group(1.0, 0)})
    with jax.enable_x64(True):

        def update(carry, _):
            params, state = carry
            gradient = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2) / 2)(params)
            change, state = optimizer.update(gradient, state, params, learning_rate=0.2)
            return (jax.tree.map(jnp.add, params, change), state), None

        params = {"w": jnp.ones(12)}
        start = (params, optimizer.init(params))
        (params, _), _ = jax.jit(lambda s: jax.lax.scan(update, s, length=3_000))(start)
    found = np.asarray(params["w"])
    np.testing.assert_allclose(found, lasso.coef_, rtol=1e-6, atol=1e-12)
    assert ((found == 0) == (lasso.coef_ == 0)).all() and (found == 0).any()


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "sam_adamw", "muon"])
@pytest.mark.fast_runs("sgd")
def test_l1_gives_zeros_behind_any_optimizer_and_leaves_the_frozen(optimizer):
    found = trainer(
        optimizer=optimizer, regularise=(("l1", 1.0, "head/.*kernel"),),
        rules=small.HEAD, batch_stats="hold",
    )  # fmt: skip
    before = {n: np.array(x) for n, x in named(found.state.params).items()}
    params, _ = after(found, updates=6)
    zeros = params["head/logits/kernel"] == 0
    assert 0.05 < zeros.mean() < 1
    for name in params:
        if not name.startswith("head/"):
            assert params[name].tobytes() == before[name].tobytes()


def test_wrong_entries_are_told_all_at_once():
    entries = (("l2sp", 1.0, ".*"), ("l2", -1.0, ".*"), ("l2", 1.0, "("), ("l2", 1.0))
    found = [*map(str, entry_problems(entries))]
    assert len(found) == 4 and found[3].startswith("regularise[3]: ")
    assert "did you mean" in found[0] and "from 0" in found[1] and "regular" in found[2]
    found = match_problems((("l2", 1.0, "heed/.*"),), ["head/bias"])
    assert "matches no trained parameter" in str(found[0])
