"""Stochastic depth: what is dropped, how often, and where it is not."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.models import efficientnet_lite, make_model, resnet, resnet_cifar
from finetune_jax.models.modes import EVALUATION, Mode

RATE = 0.25
BLOCKS = {
    "basic": resnet.Block(resnet.Shape((2, 2, 2, 2), bottleneck=False), 4, 1, RATE),
    "bottleneck, projected": resnet.Block(resnet.Shape((3, 4, 6, 3)), 4, 2, RATE),
    "cifar": resnet_cifar.Block(4, 1, RATE),
    "inverted": efficientnet_lite.Block(
        efficientnet_lite.Row(1, 3, 1, 2, 4), 1, RATE
    ),
}  # fmt: skip


def made(name, **arguments):
    kinds = dict(dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"))
    return make_model(name, {"head": {}, **arguments}, classes=10, **kinds)


def hold(next_call, args, kwargs, context):
    """Has BatchNorm run as in evaluation, and nothing else."""
    if "use_running_average" in kwargs:
        kwargs = {**kwargs, "use_running_average": True}
    return next_call(*args, **kwargs)


def outputs(module, keys, examples):
    """Returns outputs [key, example, ...], the whole block's, and the shortcut's.

    All values are positive and small, so that no ReLU bends them.
    """
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if path[-1].key == "mean":
            return np.zeros(leaf.shape, np.float32)
        return rng.uniform(0.05, 0.1, leaf.shape).astype(np.float32)

    x = rng.uniform(0.1, 1, (examples, 4, 4, 4)).astype(np.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    variables = jax.tree_util.tree_map_with_path(value, shapes)
    norms = {"bn2", "bn3", "project_bn"} & set(variables["params"])
    silent = {**variables, "params": dict(variables["params"])}
    silent["params"][max(norms)] = jax.tree.map(
        np.zeros_like, variables["params"][max(norms)]
    )
    whole, shortcut = (
        np.asarray(jax.jit(functools.partial(module.apply, train=False))(v, x))
        for v in (variables, silent)
    )

    @jax.jit
    @jax.vmap
    def run(key):
        with nn.intercept_methods(hold):
            return module.apply(variables, x, train=True, rngs={"dropout": key})

    return np.asarray(run(jax.random.split(jax.random.key(1), keys))), whole, shortcut


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.fast_runs("basic")
def test_an_example_has_the_shortcut_alone_or_with_the_residual_scaled(name):
    found, whole, shortcut = outputs(BLOCKS[name], keys=256, examples=8)
    residual = whole - shortcut
    assert (residual > 1e-3).all()
    tolerance = 1e-5 * np.abs(whole).max()
    kept = np.any(np.abs(found - shortcut[None]) > tolerance, axis=(2, 3, 4))
    mask = kept[:, :, None, None, None]
    wanted = shortcut[None] + mask * residual[None] / (1 - RATE)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
    # Four standard deviations of 2,048 draws, and of 256 for each example.
    assert kept.mean() == pytest.approx(1 - RATE, abs=4 * 0.433 / 2048**0.5)
    assert np.abs(kept.mean(axis=0) - (1 - RATE)).max() < 4 * 0.433 / 256**0.5
    assert (kept.any(axis=1) & ~kept.all(axis=1)).mean() > 0.5  # Not batch by batch.
    # The mean over keys is what evaluation computes.
    error = np.abs(found.mean(axis=0) - whole) / residual
    assert error.max() < 4 * (RATE / (1 - RATE) / 256) ** 0.5


def rates(name, shape=(32, 32, 3), **arguments):
    """Returns the rate of every block that drops, by name, as the model runs."""
    model, found = made(name, **arguments), {}

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            found["/".join(context.module.path[:2])] = context.module.rate
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
        )
    return found


@pytest.mark.parametrize(
    ("name", "counts"), [("resnet20", (3,) * 3), ("resnet18", (2,) * 4)]
)
def test_rates_rise_linearly_from_0_to_that_of_the_last_block(name, counts):
    names = [
        f"stage{stage}/block{block}"
        for stage, count in enumerate(counts, start=1)
        for block in range(1, count + 1)
    ]
    wanted = dict(zip(names, np.linspace(0, 0.4, len(names))))
    del wanted["stage1/block1"]  # Nothing is dropped at a rate of 0.
    assert rates(name, stochastic_depth=0.4) == pytest.approx(wanted)


def test_an_efficientnet_drops_only_where_there_is_a_shortcut():
    table = efficientnet_lite.scaled(1.0, 1.0)
    names = [
        f"stage{stage}/block{block}"
        for stage, row in enumerate(table, start=1)
        for block in range(1, row.repeats + 1)
    ]
    by_place = dict(zip(names, np.linspace(0, 0.3, len(names))))
    wanted = {n: r for n, r in by_place.items() if not n.endswith("block1")}
    assert len(wanted) == 9
    assert rates("efficientnet_lite0", stochastic_depth=0.3) == pytest.approx(wanted)


@pytest.mark.slow
def test_rates_are_those_of_timm():
    timm = oracles.import_timm()
    theirs = timm.create_model("resnet50", drop_path_rate=0.3)
    theirs = [m.drop_prob for m in theirs.modules() if type(m).__name__ == "DropPath"]
    ours = rates("resnet50", stochastic_depth=0.3)
    assert list(ours.values()) == pytest.approx(theirs)
    theirs = timm.create_model("tf_efficientnet_lite0", drop_path_rate=0.3)
    theirs = [
        f"stage{stage + 1}/block{index + 1}"
        for stage, blocks in enumerate(theirs.blocks)
        for index, block in enumerate(blocks)
        if block.has_skip and type(block.drop_path).__name__ == "DropPath"
    ]
    assert list(rates("efficientnet_lite0", stochastic_depth=0.3)) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "efficientnet_lite0"])
@pytest.mark.ci_runs("resnet18")
def test_rate_0_draws_nothing_and_any_rate_has_the_same_parameters(name):
    x = jnp.zeros((2, 16, 16, 3))
    plain, none, some = (
        made(name, **arguments)
        for arguments in ({}, {"stochastic_depth": 0.0}, {"stochastic_depth": 0.2})
    )
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), x, train=False))
        for m in (plain, some)
    ]
    assert shapes[0] == shapes[1] and plain == none and rates(name) == {}

    def draws(model):
        program = jax.make_jaxpr(
            lambda v, key: model.apply(
                v, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
        )(shapes[0], jax.random.key(0))
        return len(re.findall("random_bits", str(program)))

    assert draws(plain) == 0 < draws(some)


@pytest.mark.slow
def test_a_stage_drops_where_something_learns_in_training_and_only_there():
    task = small.task("resnet20", stochastic_depth=0.9)
    x = np.random.default_rng(0).normal(size=(16, 6, 6, 1)).astype(np.float32)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params, batch_stats = jax.tree.map(
        lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32), shapes
    )
    variables = {"params": params, "batch_stats": batch_stats}

    def run(mode, seed):
        @jax.jit
        def stage1(variables, rng):
            models = task.models
            return models.apply(variables, x, mode=mode, last="stage1", rng=rng)[0]

        return np.asarray(stage1(variables, jax.random.key(seed)))

    evaluated = run(EVALUATION, 0)
    assert (evaluated == run(EVALUATION, 1)).all()
    assert (evaluated == run(Mode(frozenset({"stage2", "head"})), 0)).all()
    learning = Mode(frozenset({"stage1"}))
    assert (run(learning, 0) != evaluated).any()
    assert (run(learning, 0) != run(learning, 1)).any()
    assert (run(learning, 0) == run(learning, 0)).all()
    assert (run(Mode(frozenset(), "update_all"), 0) != evaluated).any()


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "efficientnet_lite0"])
@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_that_is_none_is_refused_when_the_model_is_made(name, rate):
    with pytest.raises(
        UserError, match=f"config.model.stochastic_depth: {rate} is not"
    ):
        made(name, stochastic_depth=rate)
