"""The order of training examples, uniform and balanced, and the weights of classes."""

import grain
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sklearn.utils.class_weight import compute_class_weight

from finetune_jax.core.errors import UserError
from finetune_jax.data.order import permutation, training_order
from finetune_jax.models.modes import Mode
from finetune_jax.tasks.classify import make
from finetune_jax.tasks.components.targets import TargetOptions
from finetune_jax.tasks.task import StepContext

LABEL = np.repeat([0, 1, 2], (50, 10, 3))


def drawn(seed, count, sampling="balanced"):
    return training_order(LABEL, seed, sampling)(0, count)


def test_balanced_sampling_draws_every_class_equally_often():
    counts = np.bincount(LABEL[drawn(0, 300)])
    np.testing.assert_array_equal(counts, [100, 100, 100])
    uniform = np.bincount(LABEL[drawn(0, 3 * len(LABEL), "uniform")])
    np.testing.assert_array_equal(uniform, [150, 30, 9])


def test_balanced_sampling_goes_through_a_class_before_it_repeats():
    places = drawn(3, 300)
    rare = places[LABEL[places] == 2]
    for start in range(0, 99, 3):
        assert len(set(rare[start : start + 3])) == 3
    common = places[LABEL[places] == 0]
    assert len(set(common[:50])) == len(set(common[50:])) == 50
    assert (common[:50] != common[50:]).any()


def test_the_order_depends_on_the_seed_alone():
    assert (drawn(5, 90) != drawn(6, 90)).any()
    for sampling in ("balanced", "uniform"):
        part = training_order(LABEL, 5, sampling)(60, 72)
        np.testing.assert_array_equal(part, drawn(5, 90, sampling)[60:72])


@pytest.mark.parametrize("count", [1, 2, 3, 63, 1000, 2**16, 2**16 + 2, 70_000])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_an_epoch_is_shuffled_as_grain_does(count, seed):
    found = permutation(count, seed)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))
    some = np.unique(np.linspace(0, count - 1, 50).astype(int))
    wanted = [
        grain.experimental.index_shuffle(
            int(n), max_index=count - 1, seed=seed, rounds=4
        )
        for n in some
    ]
    np.testing.assert_array_equal(found[some], wanted)


def test_no_example_is_left_out_where_grain_leaves_one_out():
    count = 2**16 + 1
    np.testing.assert_array_equal(np.sort(permutation(count, 3)), np.arange(count))


def test_epochs_follow_one_another_as_grain_has_them():
    wanted = grain.MapDataset.range(63).shuffle(seed=2**32 - 1).repeat()
    order = training_order(LABEL, 2**32 - 1)
    np.testing.assert_array_equal(
        order(50, 150), [wanted[place] for place in range(50, 150)]
    )


def classify(class_weights):
    spec = small.spec(
        (4,),
        classes=3,
    )
    spec = type(spec)(**{**vars(spec), "train_counts": (50, 10, 3), "dtype": "float32"})
    model = {"name": "mlp", "hidden": (), "classes": None, "head": {}}
    return make(
        data=spec,
        model=model,
        precision="float32",
        options=TargetOptions(class_weights=class_weights),
    )


def test_balanced_class_weights_are_scikit_learns():
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=LABEL)
    np.testing.assert_allclose(classify("balanced").target.class_weights, wanted)
    with pytest.raises(UserError, match="class_weights: no 'balance'"):
        classify("balance")


def test_a_weighted_loss_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4)).astype(np.float32)
    label = np.arange(12) % 3
    batch = {"inputs": x, "label": label, "weight": np.ones(12, np.float32)}
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    task = classify("balanced")
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    params = {"head": {"logits": {"kernel": kernel, "bias": np.zeros(3, np.float32)}}}
    mode = Mode(learning=frozenset({"head"}))
    variables = {"params": params, "batch_stats": {}}
    loss = task.loss(variables, batch, StepContext(mode=mode))
    logits = x.astype(np.float64) @ kernel
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(12), label]
    weights = np.array(task.target.class_weights)[label]
    np.testing.assert_allclose(
        loss.total / loss.weight, np.average(losses, weights=weights), 1e-5
    )
    assert loss.metrics["accuracy"][1] == 12
