"""What optimizers do within an update: SAM, L-BFGS, schedule-free, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from sklearn.linear_model import LogisticRegression

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.core.train_state import eval_params
from finetune_jax.optim import compile_phase
from finetune_jax.optim.algorithms import OPTIMIZERS
from finetune_jax.plans.phase import Group, Phase
from finetune_jax.tasks.task import StepContext

LINE = dict(optimizer="lbfgs", schedule="constant", peak_lr=1.0, fixed_batch=True)


def trainer(model="mlp", ema_decay=None, **fields):
    arguments = {"hidden": (8,)} if model == "mlp" else {"convolutions": (4, 4)}
    task = small.task(model, **arguments)
    phase = Phase(**(dict(name="all", steps=9, schedule="constant") | fields))
    return small.Trainer(task, phase, ema_decay=ema_decay)


def params_of(trainer):
    return {n: np.asarray(x) for n, x in named(trainer.state.params).items()}


# A linear probe makes a fit instead of updates: tests/training/test_probe.py.
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "linear_probe"])
@pytest.mark.fast_runs("sgd", "adamw", "lbfgs")
def test_every_optimizer_lowers_the_loss_and_leaves_the_frozen_to_the_bit(name):
    line = LINE if OPTIMIZERS[name].evaluates == "value" else {}
    found = trainer(
        rules=small.HEAD, batch_stats="hold", clip_norm=None if line else 1.0,
        weight_decay=0.0 if line else 1e-3, **({"optimizer": name} | line),
    )  # fmt: skip
    before, batch = params_of(found), small.batch()
    losses = [float(found.update(batch, rate=0.02)["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    for key, value in params_of(found).items():
        assert key.startswith("head/") or value.tobytes() == before[key].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "lbfgs"])
def test_micro_batches_are_the_whole_batch_for_what_looks_at_other_points(name):
    line = LINE if name == "lbfgs" else {"optimizer": name}
    one, other = trainer(**line), trainer(**line, accumulate_steps=4)
    for _ in range(3):
        whole = one.update(small.batch())
        parts = other.update(small.batch(micro_batches=4))
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-5)
    for key, value in params_of(one).items():
        np.testing.assert_allclose(value, params_of(other)[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_sam_takes_the_gradient_at_the_neighbour():
    with jax.enable_x64(True):
        task = small.task("mlp", hidden=(8,), overrides=[("precision", "float64")])
        phase = Phase(name="all", steps=9, optimizer="sam", optimizer_args={"rho": 0.1})
        found, batch = small.Trainer(task, phase), small.batch()
        start = jax.tree.map(jnp.array, found.state.params)
        found.update(batch, rate=0.5)

        def loss(params):
            micro = {k: v[0] for k, v in batch.items()}
            micro = task.prepare(micro, jax.random.key(0), found.phase.mode)
            context = StepContext(rng=jax.random.key(0), mode=found.phase.mode)
            loss = task.loss(small.variables(params), micro, context)
            return loss.total / loss.weight

        gradient = jax.grad(loss)(start)
        norm = optax.tree.norm(gradient)
        near = jax.tree.map(lambda p, g: p + 0.1 * g / norm, start, gradient)
        there = jax.grad(loss)(near)
        wanted = named(jax.tree.map(lambda p, g: p - 0.5 * g, start, there))
        for name, value in params_of(found).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_schedule_free_evaluates_the_average_that_optax_defines():
    found = trainer(optimizer="schedule_free_adamw")
    start = params_of(found)
    tx = optax.contrib.schedule_free_adamw(0.1, b1=0.9, weight_decay=0.0)
    params, batch = jax.tree.map(jnp.array, found.state.params), small.batch()
    state = tx.init(params)
    for _ in range(4):
        probe = trainer(optimizer="sgd")
        probe.state = probe.state.replace(params=jax.tree.map(jnp.array, params))
        probe.update(batch, rate=1.0)
        gradient = jax.tree.map(jnp.subtract, params, probe.state.params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.update(batch, rate=0.1)
    wanted = named(optax.contrib.schedule_free_eval_params(state, params))
    for name, value in named(eval_params(found.state)).items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-3, atol=2e-4)
        assert np.abs(value - params_of(found)[name]).max() > 0
        assert np.abs(value - start[name]).max() > 0


def test_averaged_weights_are_a_warmed_up_running_mean():
    found = trainer(ema_decay=0.7, optimizer="sgd")
    leaves = named(found.state.params)
    found.state = found.state.replace(ema={n: jnp.array(x) for n, x in leaves.items()})
    mean = {n: np.array(x, np.float64) for n, x in leaves.items()}
    for step in range(1, 6):
        found.update(small.batch(seed=step))
        decay = min(0.7, (1 + step) / (10 + step))
        now = params_of(found)
        mean = {n: decay * mean[n] + (1 - decay) * now[n] for n in mean}
    shown = named(eval_params(found.state, ema=True))
    for name, value in shown.items():
        np.testing.assert_allclose(value, mean[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision, rtol", [("float64", 1e-6), ("float32", 1e-6)])
@pytest.mark.ci_runs("float32-1e-06")
def test_lbfgs_reaches_the_optimum_of_logistic_regression(precision, rtol):
    strength, batch = 1e-2, small.batch(examples=256)
    labels = np.random.default_rng(5).integers(0, 10, 256)
    # Classes that features tell apart in part.
    batch["inputs"][0, :, 0] = (labels[:, None, None] * 20).astype(np.uint8)
    batch["label"] = labels[None].astype(np.int32)
    with jax.enable_x64(precision == "float64"):
        task = small.task(
            "cnn", convolutions=(4, 4), overrides=[("precision", precision)]
        )
        phase = Phase(
            name="head", steps=300, rules=small.HEAD, batch_stats="hold",
            regularise=(("l2", strength, "head/.*kernel"),), **LINE,
        )  # fmt: skip
        found = small.Trainer(task, phase)
        features = found.features({k: v[0] for k, v in batch.items()})
        for _ in range(300):
            metrics = found.update(batch)
    # In single precision the oracle stops above the optimum.
    features = features.astype(np.float64)
    oracle = LogisticRegression(C=1 / (strength * 256), tol=1e-9, max_iter=10_000)
    oracle.fit(features, labels)
    probability = oracle.predict_proba(features)[np.arange(256), labels]
    wanted = -np.log(probability).mean() + strength / 2 * (oracle.coef_**2).sum()
    reached = float(metrics["loss"]) + float(metrics["penalty"])
    np.testing.assert_allclose(reached, wanted, rtol=rtol)


def test_a_line_search_refuses_what_would_change_its_function():
    phase = Phase(
        steps=9, optimizer="lbfgs", clip_norm=1.0, weight_decay=0.1,
        regularise=(("l1", 1.0, ".*"),),
    )  # fmt: skip
    with pytest.raises(UserError) as found:
        compile_phase(phase)
    keys = {problem.key for problem in found.value.problems}
    assert keys == {
        "peak_lr", "schedule", "clip_norm", "weight_decay", "regularise", "fixed_batch"
    }  # fmt: skip
    compiled = compile_phase(Phase(steps=9, **LINE))
    groups = {"a": Group(1.0, 0), "b": Group(0.1, 0)}
    assert "one line" in str(compiled.group_problems(groups)[0])
    assert not compiled.group_problems({"a": Group(1.0, 0)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "optimizer_args.rho: 0.0; above 0 is needed"),
        ({"rhoo": 0.1}, "optimizer_args.rhoo: unknown"),
        ({"momentum": 1.0}, "optimizer_args.momentum: 1.0; 0 or more and less than 1"),
        ({"nesterov": True}, "optimizer_args: nesterov=True: a momentum above 0"),
    ],
)
def test_arguments_of_an_optimizer_and_of_what_is_around_it_are_checked(
    arguments, message
):
    with pytest.raises(UserError) as found:
        compile_phase(Phase(steps=1, optimizer="sam", optimizer_args=arguments))
    assert str(found.value).startswith(message)
