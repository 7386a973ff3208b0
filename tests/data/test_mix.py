"""MixUp and CutMix, against numpy and against what can be counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import small

from finetune_jax.core.errors import UserError
from finetune_jax.data.augmentation import mixup
from finetune_jax.models.modes import EVALUATION, Mode
from finetune_jax.plans.micro_batches import check_batch
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.task import StepContext

SHAPE, CLASSES = (9, 12, 3), 4
RNG = jax.random.key(0)
BOTH = (("mixup", 0.2), ("cutmix", 1.0))
SHARES = jax.jit(jax.vmap(mixup.symmetric_beta, (0, None)))
TRAINING = Mode(learning=frozenset({"head"}))


def batch(examples, shape=SHAPE):
    random = np.random.default_rng(0)
    label = np.arange(examples) % CLASSES
    return (
        random.random((examples, *shape)).astype(np.float32),
        np.eye(CLASSES, dtype=np.float32)[label],
        np.arange(examples, dtype=np.int32),
    )


@functools.cache
def compiled(entries):
    return jax.jit(functools.partial(mixup.mixed, entries=entries))


def mixed(entries, inputs, target, position, seed=0):
    found = compiled(entries)(inputs, target, position, jax.random.key(seed))
    return map(np.asarray, found)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def partners(rows):
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def test_mixup_of_pairs_is_that_of_the_paper_for_the_share_in_the_target():
    inputs, target, position = batch(16)
    found, soft = mixed((("mixup", 0.2),), inputs, target, position)
    for i in range(16):
        j = i ^ 1
        share = soft[i, i % CLASSES]
        wanted = share * inputs[i] + (1 - share) * inputs[j]
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)
        wanted = share * target[i] + (1 - share) * target[j]
        np.testing.assert_allclose(soft[i], wanted, atol=1e-6)
    shares = soft[np.arange(16), np.arange(16) % CLASSES]
    assert (shares[::2] == shares[1::2]).all() and len(np.unique(shares)) == 8


def test_mixup_takes_feature_vectors():
    inputs, target, position = batch(8, (5,))
    found, soft = mixed((("mixup", 0.5),), inputs, target, position)
    share = soft[np.arange(8), np.arange(8) % CLASSES][:, None]
    wanted = share * inputs + (1 - share) * partners(inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_cutmix_pastes_one_box_of_the_partner_whose_share_is_in_the_target():
    inputs, target, position = batch(64)
    found, soft = mixed((("cutmix", 1.0),), inputs, target, position)
    own = (found == inputs).all(axis=-1)
    assert (own | (found == partners(inputs)).all(axis=-1)).all()
    pasted = ~own
    assert (pasted[::2] == pasted[1::2]).all()
    for i, box in enumerate(pasted):
        rows, columns = box.any(axis=1), box.any(axis=0)
        assert (box == np.outer(rows, columns)).all()
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2
        assert soft[i, i % CLASSES] == pytest.approx(1 - box.mean(), abs=1e-6)
    assert len(np.unique(pasted.sum(axis=(1, 2)))) > 10


@pytest.mark.slow
def test_boxes_of_cutmix_are_those_of_the_paper_for_their_share_and_centre():
    height, width = 32, 48
    stored = jnp.array([height, width])
    draw = jax.jit(functools.partial(mixup.cutmix, shape=(height, width, 3)))
    for rng in keys(20, seed=5):
        share_rng, place_rng = jax.random.split(rng)
        share = float(mixup.symmetric_beta(share_rng, 1.0))
        y, x = np.asarray(jax.random.randint(place_rng, (2,), 0, stored))
        tall = int(height * (1 - share) ** 0.5 / 2)
        wide = int(width * (1 - share) ** 0.5 / 2)
        wanted = np.ones((height, width, 1))
        top, left = max(y - tall, 0), max(x - wide, 0)
        wanted[top : y + tall, left : x + wide] = 0
        kept, exact = draw(rng)
        assert (np.asarray(kept) == wanted).all()
        assert float(exact) == pytest.approx(wanted.mean(), abs=1e-6)


def test_soft_targets_sum_to_1():
    inputs, target, position = batch(64)
    _, soft = mixed(BOTH, inputs, target, position)
    assert soft.min() >= 0
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)


def test_each_pair_is_mixed_in_one_of_the_ways_about_equally_often():
    inputs, target, position = batch(64)
    cut = []
    for seed in range(20):
        found, _ = mixed(BOTH, inputs, target, position, seed)
        whole = (found == inputs) | (found == partners(inputs))
        cut.append(whole.all(axis=(1, 2, 3))[::2].mean())
    # Mixtures whose share rounds to 0 or 1, some 2 % of all, look cut too. The bound is
    # five standard deviations of a fair coin.
    assert abs(np.mean(cut) - 0.51) < 5 * 0.5 / (20 * 32) ** 0.5


def shares(alpha):
    drawn = SHARES(keys(20_000), np.float32(alpha))
    return np.asarray(drawn, np.float64)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_are_distributed_as_a_beta(alpha):
    share = shares(alpha)
    assert scipy.stats.kstest(share, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 100.0])
def test_extreme_alphas_give_shares_between_0_and_1(alpha):
    share = shares(alpha)
    assert np.isfinite(share).all() and share.min() >= 0 and share.max() <= 1
    # Five standard errors, of the mean and (coarsely) of the variance.
    variance = 0.25 / (2 * alpha + 1)
    assert abs(share.mean() - 0.5) < 5 * (variance / 20_000) ** 0.5
    assert share.var() == pytest.approx(variance, rel=0.05)


def test_micro_batches_are_mixed_as_one_batch_is():
    inputs, target, position = batch(64)
    whole = list(mixed(BOTH, inputs, target, position))
    for part in (slice(0, 32), slice(32, 64)):
        own = mixed(BOTH, inputs[part], target[part], position[part])
        for one, other in zip(own, whole):
            np.testing.assert_allclose(one, other[part], atol=1e-6)


@pytest.mark.slow
def test_devices_mix_their_own_pairs_without_a_word_to_one_another():
    data = batch(64)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    placed = jax.device_put(data, rows)
    lowered = compiled(BOTH).lower(*placed, RNG)
    text = lowered.compile().as_text() or ""
    assert "num_partitions=4" in text
    assert not any(w in text for w in ("all-", "collective", "reduce-scatter"))
    for one, other in zip(compiled(BOTH)(*placed, RNG), mixed(BOTH, *data)):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_mixtures_depend_on_the_key_and_on_nothing_else():
    data = batch(64)
    first, again, other = (list(mixed(BOTH, *data, seed=s)) for s in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


def test_a_mixture_draws_from_no_key_of_augmentation():
    """Whose keys are those of the places in the update."""
    rng = jax.random.key(0)
    own = jax.random.key_data(jax.random.fold_in(rng, mixup.OWN_KEY))
    places = jax.vmap(lambda place: jax.random.fold_in(rng, place))(jnp.arange(10_000))
    assert (jax.random.key_data(places) != own[None]).any(axis=1).all()


def task(entries, **fields):
    given = {"mix": entries, **fields}
    return small.task("mlp", shape=(6, 6, 1), fields=given)


def prepared(learner, mode=TRAINING):
    rows = {k: v[0] for k, v in small.batch(8, (6, 6, 1)).items()}
    return rows, jax.jit(learner.prepare, static_argnums=2)(rows, RNG, mode)


def test_evaluation_and_a_run_without_mix_have_no_soft_target():
    rows, plain = prepared(task(()))
    _, evaluated = prepared(task(BOTH), EVALUATION)
    assert "target" not in plain and "target" not in evaluated
    assert (evaluated["inputs"] == plain["inputs"]).all()
    _, found = prepared(task(BOTH))
    assert (found["label"] == rows["label"]).all()
    assert (found["inputs"] != plain["inputs"]).any()


@pytest.mark.slow
def test_images_are_mixed_after_each_was_augmented():
    augment = (("flip",),)
    rows, alone = prepared(task((), augment=augment))
    one_hot = jax.nn.one_hot(rows["label"], 10)
    wanted, soft = mixed(BOTH, alone["inputs"], one_hot, rows["position"])
    _, found = prepared(task(BOTH, augment=augment))
    np.testing.assert_allclose(found["inputs"], wanted, atol=1e-6)
    np.testing.assert_allclose(found["target"], soft, atol=1e-6)


@pytest.mark.slow
def test_a_partner_that_could_not_be_read_takes_the_weight_of_both():
    learner = task((("mixup", 0.2),))
    batch = {name: array[0] for name, array in small.batch(6).items()}
    batch["weight"] = np.float32([1, 1, 1, 0, 0, 1])
    ready = learner.prepare(batch, jax.random.key(0), TRAINING)
    np.testing.assert_array_equal(ready["weight"], [1, 1, 0, 0, 0, 0])


def test_the_loss_is_the_cross_entropy_of_the_soft_target():
    """Also where the model has more classes than the data."""
    learner = small.task("mlp", (6, 6, 1), fields={"mix": BOTH}, classes=13)
    rows, ready = prepared(learner)
    params, stats = jax.jit(learner.init)(RNG)
    variables = small.variables(params, stats)
    loss = learner.loss(variables, ready, StepContext(rng=RNG, mode=TRAINING))
    logits = learner.outputs(variables, ready)["logits"]
    log_p = np.asarray(jax.nn.log_softmax(logits))[:, :10]
    wanted = -np.sum(np.asarray(ready["target"]) * log_p)
    assert float(loss.total) == pytest.approx(float(wanted), rel=1e-5)
    assert float(loss.weight) == 8
    right = (np.argmax(logits, axis=-1) == rows["label"]).sum()
    assert float(loss.metrics["accuracy"][0]) == right


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("mixap", 0.2), "did you mean 'mixup'"),
        (("mixup", 0), "alpha 0; a number above 0 is needed"),
        (("mixup", "a"), "alpha 'a'"),
        (("cutmix", 1.0, 2.0), "with 2 values; takes alpha"),
        (0.2, "0.2 is not a step such as ('mixup', 0.2)"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused_by_name(entry, message):
    with pytest.raises(UserError) as found:
        task((("mixup", 0.2), entry))
    assert message in str(found.value)
    assert "config.data.mix[1]: " in str(found.value)


def test_cutmix_refuses_feature_vectors():
    mixup.check_mix(("mixup",), (5,))
    with pytest.raises(UserError, match=r"mix\[1\]: 'cutmix' needs images"):
        mixup.check_mix(BOTH, (5,))


def test_batches_that_tear_pairs_are_refused():
    plan = (
        Phase(name="one", steps=1),
        Phase(name="odd", steps=1, accumulate_steps=4),
        Phase(name="three", steps=1, accumulate_steps=3),
    )
    check_batch(24, plan, 1, mix=BOTH)
    check_batch(12, plan[:1], 4, mix=())
    with pytest.raises(UserError, match=r"^config\.data\.batch_size: ") as found:
        check_batch(12, plan, 1, mix=BOTH)
    wanted = "12 examples in 4 micro-batches over 1 devices in phase 'odd'"
    assert wanted in str(found.value)
    assert "'one'" not in str(found.value) and "'three'" not in str(found.value)
    with pytest.raises(UserError, match="over 4 devices"):
        check_batch(12, plan[:1], 4, mix=BOTH)
