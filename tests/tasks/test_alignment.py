"""Losses between domains against torch and numpy in float64: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import torch

from finetune_jax.tasks.objectives.domain_losses import (
    confident,
    coral,
    discrimination,
    mmd,
    pair_distance,
    ramp,
    reverse_gradient,
    uncertainty_weighted,
)

RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.normal(size=(6, 4)), RNG.normal(0.5, 2.0, size=(5, 4))
# An example that could not be read counts nothing.
ONES, WEIGHT = np.ones(6), np.array([1.0, 1.0, 0.0, 1.0, 1.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def both(function, oracle, *arrays):
    """Compares values and gradients with respect to all arrays."""
    value, gradients = jax.value_and_grad(function, argnums=range(len(arrays)))(
        *map(jnp.asarray, arrays)
    )
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    wanted = oracle(*tensors)
    wanted.backward()
    assert value == pytest.approx(wanted.item(), rel=1e-10, abs=1e-12)
    for gradient, tensor in zip(gradients, tensors):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("of_classes", [True, False])
def test_uncertainty_is_that_of_a_gaussian_or_a_scaled_softmax(of_classes):
    """Of numbers it is the negative log likelihood up to a constant."""

    def oracle(loss, log_variance):
        sigma = torch.exp(log_variance / 2)
        return loss / sigma**2 * (1.0 if of_classes else 0.5) + torch.log(sigma)

    both(
        lambda loss, s: uncertainty_weighted(loss, s, of_classes=of_classes),
        oracle,
        np.array(1.7),
        np.array(-0.4),
    )


def test_the_best_uncertainty_of_numbers_is_their_error():
    gradient = jax.grad(lambda s: uncertainty_weighted(2.5, s, of_classes=False))
    assert gradient(jnp.log(2.5)) == pytest.approx(0.0, abs=1e-12)


def oracle_mmd(source, target):
    """The sum over pairs as Long et al. write it, of the readable examples."""
    both_of = torch.cat([source, target])
    distances = torch.cdist(
        both_of, both_of, compute_mode="donot_use_mm_for_euclid_dist"
    )
    squared = distances.detach() ** 2
    n = len(both_of)
    bandwidth = squared.sum() / (n * n - n)

    def kernel(a, b):
        d = ((a[:, None] - b[None]) ** 2).sum(-1)
        return sum(torch.exp(-d / (s * bandwidth)) for s in (0.25, 0.5, 1.0, 2.0, 4.0))

    return (
        kernel(source, source).mean()
        + kernel(target, target).mean()
        - 2 * kernel(source, target).mean()
    )


def test_mmd_is_torchs_and_leaves_out_what_has_no_weight():
    def readable(target):
        return target[torch.tensor(WEIGHT) > 0]

    both(
        lambda s, t: mmd(s, t, jnp.asarray(ONES), jnp.asarray(WEIGHT)),
        lambda s, t: oracle_mmd(s, readable(t)),
        SOURCE,
        TARGET,
    )


def test_mmd_of_the_same_examples_is_zero():
    same = jnp.asarray(SOURCE)
    assert mmd(same, same, jnp.asarray(ONES), jnp.asarray(ONES)) == pytest.approx(0)
    still = jnp.ones((3, 2))
    assert jnp.isfinite(mmd(still, still, jnp.ones(3), jnp.ones(3)))


def test_coral_is_torchs_and_leaves_out_what_has_no_weight():
    def oracle(source, target):
        target = target[torch.tensor(WEIGHT) > 0]
        difference = torch.cov(source.T) - torch.cov(target.T)
        return (difference**2).sum() / (4 * source.shape[1] ** 2)

    both(
        lambda s, t: coral(s, t, jnp.asarray(ONES), jnp.asarray(WEIGHT)),
        oracle,
        SOURCE,
        TARGET,
    )


def test_gradient_reversal_and_its_discriminator_are_torchs():
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, strength):
            ctx.strength = strength
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return -ctx.strength * gradient, None

    weights = RNG.normal(size=(4, 1))

    def ours(source, target, weights):
        total = jnp.zeros(())
        for features, is_source in ((source, True), (target, False)):
            logit = (reverse_gradient(features, jnp.asarray(0.3)) @ weights)[:, 0]
            total += discrimination(logit, is_source=is_source).mean()
        return total

    def oracle(source, target, weights):
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return sum(
            loss(
                (Reversed.apply(features, 0.3) @ weights)[:, 0],
                torch.full((len(features),), label, dtype=torch.float64),
            )
            for features, label in ((source, 1.0), (target, 0.0))
        )

    both(ours, oracle, SOURCE, TARGET, weights)


def test_the_ramp_is_that_of_ganin_et_al():
    for p in (0.0, 0.25, 1.0):
        wanted = 2 / (1 + np.exp(-10 * p)) - 1
        assert ramp(jnp.asarray(p)) == pytest.approx(wanted)


def test_pseudo_labels_teach_only_where_they_are_certain():
    logits = np.array([[4.0, 0.0, 0.0], [0.3, 0.2, 0.1], [0.0, 0.0, 9.0]])

    def oracle(logits):
        probability, label = torch.softmax(logits.detach(), -1).max(-1)
        loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
        return (loss * (probability >= 0.9)).sum()

    both(lambda x: confident(x, threshold=0.9)[0].sum(), oracle, logits)
    _, is_certain = confident(jnp.asarray(logits), threshold=0.9)
    assert is_certain.tolist() == [True, False, True]


def test_pairs_of_models_are_pulled_together():
    one, two, three = (
        {"a": RNG.normal(size=(2, 3)), "b": RNG.normal(size=shape)}
        for shape in ((2,), (2,), (5,))  # The last has another b.
    )

    def oracle(a1, b1, a2, b2, a3, b3):
        del b3
        pairs = ((a1, a2), (a1, a3), (a2, a3), (b1, b2))
        return sum(((x - y) ** 2).sum() / 2 for x, y in pairs)

    def ours(a1, b1, a2, b2, a3, b3):
        pairs = ((a1, b1), (a2, b2), (a3, b3))
        return pair_distance([{"a": a, "b": b} for a, b in pairs])

    arrays = [m[k] for m in (one, two, three) for k in ("a", "b")]
    value, gradients = jax.value_and_grad(ours, argnums=range(6))(
        *map(jnp.asarray, arrays)
    )
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    oracle(*tensors).backward()
    assert value == pytest.approx(oracle(*tensors).item())
    for gradient, tensor in list(zip(gradients, tensors))[:5]:
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-10)
    assert not np.any(gradients[5])
