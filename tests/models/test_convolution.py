"""Convolutions that are computed otherwise on CPU are those of XLA, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune_jax.models.kernels import convolution
from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.kernels.pooling import max_pool

pytestmark = pytest.mark.slow

# Odd and even, not square, smaller than a kernel, and a single place.
SIZES = ((8, 8), (7, 7), (9, 6), (1, 5), (2, 2), (1, 1))
# Kernel, strides, padding, size; as TensorFlow pads, as torch does, and lopsidedly.
DEPTHWISE = [
    (kernel, (stride, stride), padding, size)
    for kernel in (3, 5)
    for stride in (1, 2)
    for padding, sizes in (
        ("SAME", SIZES),
        (((kernel // 2, kernel // 2),) * 2, ((9, 6), (1, 1))),
    )
    for size in sizes
]
DEPTHWISE += [
    (3, (2, 1), "SAME", (7, 8)),
    (3, (1, 1), "VALID", (6, 7)),
    (5, (2, 2), "VALID", (9, 6)),
    (3, (2, 2), ((0, 1), (2, 4)), (6, 5)),
]
POINTWISE = [
    (1, (1, 1), padding, size) for padding in ("SAME", "VALID") for size in SIZES
]
NAMES = ("NHWC", "HWIO", "NHWC")


def xlas(x, kernel, strides, padding, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NAMES, **options
    )


def ours(x, kernel, strides, padding, **options):
    """Returns what a model has, called as `nn.Conv` calls it."""
    return convolve(x, kernel, strides, padding, dimension_numbers=NAMES, **options)


def inputs(kernel_size, size, *, channels=3, filters=3, groups=3):
    """Returns images and a kernel."""
    rng = np.random.default_rng(0)
    kernel_shape = (kernel_size, kernel_size, channels // groups, filters)
    return rng.standard_normal((2, *size, channels)), rng.standard_normal(kernel_shape)


def check(given, strides, padding, groups):
    """Checks values and both gradients, in float64."""

    def convolution(function):
        return lambda *g: function(*g, strides, padding, feature_group_count=groups)

    def all_three(function, pulled):
        out, pull = jax.vjp(convolution(function), *given)
        return out, *pull(pulled)

    with jax.enable_x64(True):
        shape = jax.eval_shape(convolution(xlas), *given).shape
        pulled = np.random.default_rng(1).standard_normal(shape)
        # Compiled as a whole: one by one, a hundred slices take seconds.
        found, wanted = (
            jax.jit(all_three, static_argnums=0)(function, pulled)
            for function in (ours, xlas)
        )
        for one, other in zip(found, wanted):
            assert one.dtype == other.dtype == np.float64
            assert one.shape == other.shape
            assert np.abs(one - other).max() <= 1e-10 * np.abs(other).max()


def test_these_tests_refuse_to_promote_ranks():
    assert jax.config.jax_numpy_rank_promotion == "raise"


@pytest.mark.parametrize(("kernel_size", "strides", "padding", "size"), DEPTHWISE)
@pytest.mark.ci_runs(every=7)
def test_depthwise_values_and_gradients_are_those_of_xla(
    kernel_size, strides, padding, size
):
    check(inputs(kernel_size, size), strides, padding, groups=3)


@pytest.mark.parametrize(("kernel_size", "strides", "padding", "size"), POINTWISE)
@pytest.mark.ci_runs(every=5)
def test_pointwise_values_and_gradients_are_those_of_xla(
    kernel_size, strides, padding, size
):
    given = inputs(kernel_size, size, channels=4, filters=6, groups=1)
    check(given, strides, padding, groups=1)


DENSE = [
    (kernel, strides, padding, size)
    for kernel, strides, padding in (
        (3, (1, 1), "SAME"),
        (3, (2, 2), ((1, 1), (1, 1))),
        (3, (2, 1), "VALID"),
        (5, (2, 2), "SAME"),
        (7, (2, 2), ((3, 3), (3, 3))),
        (2, (3, 3), ((0, 1), (2, 0))),
        (2, (2, 2), "VALID"),
    )
    for size in ((8, 8), (9, 6), (7, 7))
]


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("many", [0, 100])
@pytest.mark.parametrize(("kernel_size", "strides", "padding", "size"), DENSE)
@pytest.mark.ci_runs(every=9)
def test_gradients_as_products_are_those_of_xla(
    monkeypatch, kernel_size, strides, padding, size, few, many
):
    monkeypatch.setattr(convolution, "FEW_CHANNELS", few)
    monkeypatch.setattr(convolution, "MANY_WEIGHTS", many)
    given = inputs(kernel_size, size, channels=4, filters=6, groups=1)
    check(given, strides, padding, groups=1)


@pytest.mark.parametrize(
    ("window", "strides", "pads", "size"),
    [
        ((2, 2), (2, 2), ((0, 0), (0, 0)), (8, 8)),
        ((2, 2), (2, 2), ((0, 0), (0, 0)), (7, 5)),
        ((3, 3), (2, 2), ((1, 1), (1, 1)), (9, 6)),
        ((3, 2), (1, 3), ((1, 0), (0, 1)), (5, 7)),
        ((1, 1), (2, 2), ((0, 0), (0, 0)), (4, 4)),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.ci_runs(every=3)
def test_max_pooling_and_its_gradient_are_those_of_xla(
    window, strides, pads, size, ties
):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3))
    x = np.maximum(np.round(x), 0) if ties else x

    def both(function):
        y, pull = jax.vjp(lambda x: function(x, window, strides, pads), x)
        return y, *pull(np.random.default_rng(1).standard_normal(y.shape))

    with jax.enable_x64(True):
        found, wanted = (
            jax.jit(both, static_argnums=0)(f) for f in (max_pool, nn.max_pool)
        )
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "channels", "filters", "groups"),
    [
        (1, (2, 2), 4, 6, 1),  # A shortcut with stride: not all places are met.
        (1, (1, 1), 4, 6, 2),
        (1, (1, 1), 3, 3, 3),
        (3, (1, 1), 1, 4, 1),  # One channel, but a filter each for four.
        (3, (1, 1), 1, 1, 1),
        (3, (1, 1), 3, 6, 3),  # Two filters a channel.
        (3, (2, 2), 4, 6, 2),
    ],
)
def test_convolutions_like_those_are_not_mistaken_for_them(
    kernel_size, strides, channels, filters, groups
):
    given = inputs(
        kernel_size, (6, 5), channels=channels, filters=filters, groups=groups
    )
    check(given, strides, "SAME", groups=groups)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "groups"),
    [(3, 2, 4), (5, 1, 4), (1, 1, 1)],
)
@pytest.mark.ci_runs("3-2-4-None", "5-1-4-bfloat16")
def test_a_module_with_it_is_flaxs_own(kernel_size, stride, groups, dtype):
    x = inputs(kernel_size, (9, 6), channels=4)[0].astype(np.float32)
    arguments = dict(
        features=4, kernel_size=(kernel_size, kernel_size), strides=(stride, stride),
        feature_group_count=groups, use_bias=False, dtype=dtype,
    )  # fmt: skip
    modules = (
        nn.Conv(**arguments, conv_general_dilated=convolve),
        nn.Conv(**arguments),
    )
    variables, same = (jax.jit(one.init)(jax.random.key(0), x) for one in modules)
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (kernel_size, kernel_size, 4 // groups, 4)
    # Initialised alike, too: the same key gives the same numbers.
    np.testing.assert_array_equal(kernel, same["params"]["kernel"])
    assert kernel.dtype == jnp.float32
    found, wanted = (jax.jit(one.apply)(variables, x) for one in modules)
    assert found.dtype == wanted.dtype == (dtype or jnp.float32)
    error = np.abs(np.float32(found) - np.float32(wanted)).max()
    assert error <= (1e-2 if dtype else 1e-5) * np.abs(np.float32(wanted)).max()


@pytest.mark.parametrize(("kernel_size", "groups"), [(3, 3), (1, 1)])
def test_other_devices_than_cpus_take_xlas_own(kernel_size, groups, monkeypatch):
    given = inputs(kernel_size, (8, 8), groups=groups)

    def program():
        made = jax.make_jaxpr(
            lambda *g: ours(*g, (1, 1), "SAME", feature_group_count=groups)
        )
        return made(*given).pretty_print()

    assert "conv_general_dilated" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in program()
