"""What the backward pass computes again gives the same gradients, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax.models import convnext, resnet, vit

SMALL = {
    "vit_tiny_patch16": (vit.Shape(16, 2, 2, 16),),
    "convnext_tiny": (convnext.Shape((1, 1, 1, 1), (2, 2, 2, 2)),),
    "vgg11_bn": (tuple((blocks, 4) for blocks in (1, 1, 2, 2, 2)), True),
    "resnet18": (resnet.Shape((1, 1, 1, 1), bottleneck=False),),
}
DROPS = {
    "vit_tiny_patch16": {"dropout": 0.2, "attention_dropout": 0.2, "heads": 2},
    "vgg11_bn": {"dropout": 0.3, "dense": 8},
}


def gradients(name, remat):
    """Returns the gradients and batch statistics of a step with dropout, its program."""
    arguments = {"head": {}, "remat": remat, **DROPS.get(name, {})}
    if name not in ("vgg11_bn",):
        arguments["stochastic_depth"] = 0.4
    arguments |= {"classes": 3, "dtype": jnp.float64, "param_dtype": jnp.float64}
    model = small.of_sizes(name, *SMALL[name], **arguments)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape), shapes)

    def loss(params):
        y, moved = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )  # fmt: skip
        return (y**2).mean(), moved

    step = jax.grad(loss, has_aux=True)
    return jax.jit(step)(variables["params"]), str(
        jax.make_jaxpr(step)(variables["params"])
    )


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.ci_runs("resnet18")
def test_gradients_are_the_same_and_blocks_are_computed_again(name):
    with jax.enable_x64(True):
        (plain, program), (again, other) = (
            gradients(name, remat) for remat in (False, True)
        )
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-13)
    assert "remat" not in program and "remat" in other
