import functools

import jax
import numpy as np
import optax
import pytest
import small

from finetune_jax.core.pytrees import digest, named, nbytes
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.modes.plan import forward_flops, step_flops
from finetune_jax.optim import compile_phase
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.task import StepContext
from finetune_jax.training.phases import phase_setup

EVERYTHING_ON = dict(
    steps=4, optimizer="adamw", weight_decay=0.1, clip_norm=1.0, accumulate_steps=2
)


def peculiar(tree):
    """Returns the tree with values that any arithmetic, even + 0, could change."""
    odd = np.array([-0.0, 1e-42, -1e-45, np.inf, -np.inf], np.float32)

    def seeded(leaf):
        flat = np.array(leaf).reshape(-1)
        flat[: len(odd)] = odd[: len(flat)]
        return flat.reshape(leaf.shape)

    return jax.tree.map(seeded, tree)


@pytest.mark.bits
@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_frozen_leaves_keep_their_bits_whatever_they_are(jit):
    task = small.task("cnn", convolutions=(4, 4), dense=(8,))
    phase = Phase(name="head", rules=small.HEAD, batch_stats="hold", **EVERYTHING_ON)
    trainer = small.Trainer(task, phase, jit=jit)
    state = trainer.state
    names = named(state.params)
    params = {
        key: value if key == "head" else peculiar(value)
        for key, value in state.params.items()
    }
    trainer.state = state.replace(
        params=params, batch_stats=peculiar(state.batch_stats)
    )
    frozen = trainer.phase.frozen(trainer.state)
    assert len(frozen) == len(names) - 2 + len(named(state.batch_stats))
    before, head = digest(frozen), digest(trainer.state.params["head"])
    for seed in range(3):
        trainer.update(small.batch(micro_batches=2, seed=seed))
    assert digest(trainer.phase.frozen(trainer.state)) == before
    assert digest(trainer.state.params["head"]) != head


def test_the_optimizer_state_holds_the_head_only_and_no_holes():
    task = small.task()
    phase = Phase(name="head", rules=small.HEAD, batch_stats="hold", **EVERYTHING_ON)
    state = small.Trainer(task, phase).state
    head = nbytes(state.params["head"])
    numbers = 4 * 3  # Adam's count, and two of MultiSteps.
    assert (
        nbytes(state.opt_state) == 3 * head + numbers
    )  # Two moments, one accumulator.
    nodes = jax.tree.leaves(
        state.opt_state, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
    assert not any(isinstance(node, optax.MaskedNode) for node in nodes)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.bits
@pytest.mark.slow
def test_a_head_only_step_costs_a_forward_pass():
    task = small.task(shape=(28, 28, 1))
    batch = small.batch(32, (28, 28, 1), micro_batches=2)
    phase = Phase(name="head", rules=small.HEAD, batch_stats="hold", **EVERYTHING_ON)
    trainer = small.Trainer(task, phase)
    state, rate = trainer.state, np.float32(0.1)
    step = flops(trainer.step, state, {"task": {}}, batch, rate, rate)
    whole = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), batch)
    predict = functools.partial(eval_step, task=task)
    forward = flops(predict, state.params, state.batch_stats, whole)
    assert 1.0 <= step / forward <= 1.05
    full = small.Trainer(task, Phase(name="all", **EVERYTHING_ON))
    assert flops(full.step, full.state, {"task": {}}, batch, rate, rate) > 2.5 * forward


@pytest.mark.bits
@pytest.mark.slow
def test_a_head_only_step_of_resnet50_costs_a_forward_pass():
    """By the count on the trace, where what nobody reads is not computed."""
    task = small.task("resnet50", shape=(64, 64, 3))
    state = jax.eval_shape(lambda: random_state(task, 0))
    names = tuple(named(state.params))
    head = Phase(name="h", rules=small.HEAD, batch_stats="hold", **EVERYTHING_ON)
    full = Phase(name="all", **EVERYTHING_ON)
    forward = forward_flops(task, state, 32)
    ours = step_flops(phase_setup((head,), 0, task, names), task, state, 32)
    assert 1.0 <= ours / forward <= 1.05
    assert (
        step_flops(phase_setup((full,), 0, task, names), task, state, 32) > 2 * forward
    )


def parameters_after(task, phase, batches):
    trainer = small.Trainer(task, phase)
    metrics = [trainer.update(batch) for batch in batches]
    return jax.tree.map(np.asarray, trainer.state.params), metrics


def distance(ours, theirs):
    return optax.tree.norm(jax.tree.map(lambda a, b: a - b, ours, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("last", [8, 3])
@pytest.mark.ci_runs("3")
def test_four_micro_batches_equal_one_batch(last):
    """Also with weights 8, 8, 8, 3: the last examples are padding of weight 0."""
    task = small.task()
    plain = Phase(name="all", steps=4, optimizer="sgd", batch_stats="hold")
    cut = Phase(**{**vars(plain), "accumulate_steps": 4})
    one, four = small.batch(micro_batches=1), small.batch(micro_batches=4)
    for batch in (one, four):
        batch["weight"].reshape(-1)[24 + last :] = 0
    start = jax.tree.map(np.asarray, small.Trainer(task, plain).state.params)
    ours, ours_metrics = parameters_after(task, cut, [four])
    theirs, theirs_metrics = parameters_after(task, plain, [one])
    moved = distance(theirs, start)
    # One update of SGD is the gradient times the rate.
    assert distance(ours, theirs) <= 1e-5 * moved
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(
            ours_metrics[0][name], theirs_metrics[0][name], rtol=1e-5
        )


@pytest.mark.slow
def test_the_update_is_that_of_optax_alone():
    """Clipped AdamW over the head, on gradients taken by hand."""
    task = small.task("mlp")
    phase = Phase(
        name="head", steps=4, optimizer="adamw", weight_decay=0.1, clip_norm=0.01,
        rules=small.HEAD, batch_stats="hold",
    )  # fmt: skip
    trainer = small.Trainer(task, phase)
    state = jax.tree.map(np.asarray, trainer.state)
    mask = {"logits": {"kernel": True, "bias": False}}
    oracle = optax.chain(
        optax.clip_by_global_norm(0.01), optax.adamw(0.1, weight_decay=0.1, mask=mask)
    )
    head = state.params["head"]
    oracle_state = oracle.init(head)
    for seed in range(3):
        batch = small.batch(seed=seed)
        inputs = batch["inputs"][0].reshape(32, -1) / np.float32(255)
        dense = state.params["stage1"]["dense"]
        features = np.maximum(inputs @ dense["kernel"] + dense["bias"][None], 0)

        def loss(head, features=features, label=batch["label"][0]):
            logits = features @ head["logits"]["kernel"] + head["logits"]["bias"][None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean()

        updates, oracle_state = oracle.update(jax.grad(loss)(head), oracle_state, head)
        head = optax.apply_updates(head, updates)
        trainer.update(batch)
    for ours, theirs in zip(
        jax.tree.leaves(trainer.state.params["head"]), jax.tree.leaves(head)
    ):
        # Adam's first steps are about 0.1 whatever the gradient: 1e-5 of that is 1e-6.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_augmentation_depends_on_seed_step_and_place_alone():
    """Cutting the update into micro-batches changes no example's augmentation."""
    fields = {"augment": (("flip",), ("pad_crop", 2))}
    task = small.task("mlp", fields=fields)
    plain = Phase(name="all", steps=4, optimizer="sgd", batch_stats="hold")
    cut = Phase(**{**vars(plain), "accumulate_steps": 4})
    ours, _ = parameters_after(task, cut, [small.batch(micro_batches=4)])
    theirs, _ = parameters_after(task, plain, [small.batch(micro_batches=1)])
    still, _ = parameters_after(
        small.task("mlp"), plain, [small.batch(micro_batches=1)]
    )
    assert distance(ours, theirs) < 1e-6
    assert distance(still, theirs) > 1e-3


def test_a_phase_that_trains_nothing_moves_statistics_only():
    task = small.task("cnn", convolutions=(4, 4), dense=(8,))
    phase = Phase(name="adapt", steps=2, rules=((".*", 0.0),), batch_stats="update_all")
    trainer = small.Trainer(task, phase)
    params, stats = digest(trainer.state.params), digest(trainer.state.batch_stats)
    trainer.update(small.batch())
    assert digest(trainer.state.params) == params
    assert digest(trainer.state.batch_stats) != stats


@pytest.mark.slow
def test_a_wrong_nesting_would_be_seen():
    """The count of FLOPs tells a clip outside from one inside: the test can fail."""
    task = small.task(shape=(28, 28, 1))
    batch = small.batch(32, (28, 28, 1))
    phase = Phase(name="head", steps=1, rules=small.HEAD, batch_stats="hold")
    trainer = small.Trainer(task, phase)
    inner = compile_phase(trainer.phase.phase).transformation(trainer.phase.groups)
    outside = optax.chain(optax.clip_by_global_norm(1.0), inner)
    state = trainer.state.replace(opt_state=outside.init(trainer.state.params))
    rate = np.float32(0.1)

    def wrong(params):
        def loss(params):
            mode = trainer.phase.mode
            micro = jax.tree.map(lambda a: a[0], batch)
            micro = task.prepare(micro, jax.random.key(0), mode)
            variables = small.variables(params, state.batch_stats)
            context = StepContext(rng=jax.random.key(0), progress=rate, mode=mode)
            return task.loss(variables, micro, context).total

        return outside.update(
            jax.grad(loss)(params), state.opt_state, params, learning_rate=rate
        )[0]

    right = flops(trainer.step, trainer.state, {"task": {}}, batch, rate, rate)
    assert flops(wrong, state.params) > 2 * right
