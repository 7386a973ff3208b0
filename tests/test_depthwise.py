"""Depthwise convolution by shifted products is that of XLA, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune_jax.models.depthwise import DepthwiseConv, grouped, shifted_products

KERNELS, STRIDES = (3, 5), (1, 2)
# Odd and even, not square, smaller than a kernel, and a single place.
SIZES = ((8, 8), (7, 7), (9, 6), (1, 5), (2, 2), (1, 1))
PLACES = [(k, s, size) for k in KERNELS for s in STRIDES for size in SIZES]


def inputs(kernel_size, size, channels=3, dtype=np.float64):
    """Returns images and a kernel."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, channels)).astype(dtype)
    kernel = rng.standard_normal((kernel_size, kernel_size, 1, channels)).astype(dtype)
    return x, kernel


def test_these_tests_refuse_to_promote_ranks():
    assert jax.config.jax_numpy_rank_promotion == "raise"


@pytest.mark.parametrize(("kernel_size", "stride", "size"), PLACES)
def test_values_and_both_gradients_are_those_of_xla(kernel_size, stride, size):
    with jax.enable_x64(True):
        given = inputs(kernel_size, size)
        shape = jax.eval_shape(lambda *g: grouped(*g, stride), *given).shape
        pulled = np.random.default_rng(1).standard_normal(shape)

        def all_three(convolve):
            out, pull = jax.vjp(lambda *g: convolve(*g, stride), *given)
            return out, *pull(pulled)

        # Compiled as a whole: one by one, a hundred slices take seconds.
        found = [
            jax.jit(lambda convolve=convolve: all_three(convolve))()
            for convolve in (shifted_products, grouped)
        ]
        for ours, theirs in zip(*found):
            assert ours.dtype == theirs.dtype == np.float64
            assert ours.shape == theirs.shape
            error = np.abs(ours - theirs).max()
            assert error <= 1e-10 * np.abs(theirs).max()


def test_compiling_changes_nothing():
    with jax.enable_x64(True):
        given = inputs(3, (5, 6))

        def loss(x, kernel):
            return jnp.sum(shifted_products(x, kernel, 2) ** 2)

        plain = jax.value_and_grad(loss, argnums=(0, 1))(*given)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*given)
        for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled)):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_module_is_flaxs_convolution_with_a_group_a_channel(
    kernel_size, stride, dtype
):
    x, _ = inputs(kernel_size, (9, 6), channels=4, dtype=np.float32)
    ours = DepthwiseConv(kernel_size, stride, dtype=dtype)
    theirs = nn.Conv(
        4, (kernel_size, kernel_size), strides=(stride, stride), padding="SAME",
        feature_group_count=4, use_bias=False, dtype=dtype,
    )  # fmt: skip
    variables, same = (
        jax.jit(one.init)(jax.random.key(0), x) for one in (ours, theirs)
    )
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (kernel_size, kernel_size, 1, 4)
    # Initialised alike, too: the same key gives the same numbers.
    np.testing.assert_array_equal(kernel, same["params"]["kernel"])
    assert kernel.dtype == jnp.float32
    found, wanted = (jax.jit(one.apply)(variables, x) for one in (ours, theirs))
    assert found.dtype == wanted.dtype == (dtype or jnp.float32)
    scale = 1e-2 if dtype else 1e-5
    error = np.abs(np.float32(found) - np.float32(wanted)).max()
    assert error <= scale * np.abs(np.float32(wanted)).max()


def test_other_devices_than_cpus_take_xlas_own(monkeypatch):
    x, _ = inputs(3, (8, 8), dtype=np.float32)
    module = DepthwiseConv(3, 2)
    variables = module.init(jax.random.key(0), x)

    def program():
        return jax.make_jaxpr(lambda v: module.apply(v, x))(variables).pretty_print()

    assert "conv_general_dilated" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in program()
