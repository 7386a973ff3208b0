"""Position embeddings that fit images of another size."""

import jax
import numpy as np
import oracles
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.models import make_model
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.layout import layouts
from finetune_jax.weights.merge import load_weights, resized


def drawn(tokens):
    return np.random.default_rng(0).normal(size=(1, tokens, 8)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (16, 14), (2, 1), (3, 3)])
def test_positions_are_resized_as_timm_does(old, new, prefix):
    timm = oracles.import_timm()
    import torch

    positions = drawn(old**2 + prefix)
    wanted = timm.layers.resample_abs_pos_embed(
        torch.from_numpy(positions), [new, new], num_prefix_tokens=prefix
    ).numpy()
    found = resized(positions, new**2 + prefix, prefix)
    # timm computes in float32, whose rounding is more than 1e-6 in some of these.
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    grid = torch.from_numpy(positions[:, prefix:]).double().reshape(1, old, old, 8)
    exact = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), size=(new, new), mode="bicubic", antialias=True
    )
    exact = exact.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy()
    found = resized(positions.astype(np.float64), new**2 + prefix, prefix)
    assert np.abs(found[:, prefix:] - exact).max() <= 1e-12


def test_what_is_no_square_or_fits_already_stays():
    assert resized(drawn(10), 17, 1).shape[1] == 17
    for tokens, wanted, prefix in ((10, 10, 1), (10, 17, 0), (11, 17, 1), (10, 18, 1)):
        positions = drawn(tokens)
        assert resized(positions, wanted, prefix) is positions


def shapes(size, **arguments):
    model = make_model(
        "vit_tiny_patch16", {"head": {}, **arguments}, classes=3,
        dtype="float32", param_dtype="float32",
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


def values(shapes):
    return {
        name: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
        for name, leaf in named(shapes).items()
    }


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.fast_runs("True")
def test_weights_for_images_of_another_size_are_resized_where_they_are_loaded(
    class_token,
):
    arguments = {"class_token": class_token, "pool": "mean"}
    tensors = values(shapes(64, **arguments))
    weights = Weights(address="file:w", tensors=tensors, sha256={})
    loaded = named(load_weights(shapes(48, **arguments), weights))
    name = "params/stem/position_embedding"
    prefix = int(class_token)
    assert loaded[name].shape == (1, prefix + 9, 192)
    np.testing.assert_array_equal(
        loaded[name], resized(tensors[name], prefix + 9, prefix)
    )
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    assert all(np.array_equal(loaded[key], others[key]) for key in others)


def test_positions_that_cannot_be_resized_are_told():
    tensors = values(shapes(64))
    tensors["params/stem/position_embedding"] = drawn(18)
    weights = Weights(address="file:w", tensors=tensors, sha256={})
    message = r"position_embedding: model \(1, 10, 192\), weights \(1, 18, 8\)"
    with pytest.raises(UserError, match=message):
        load_weights(shapes(48), weights)


def test_images_that_patches_do_not_divide_are_refused():
    message = "patches of 16 pixels do not divide images of 50 x 50; set config.data"
    with pytest.raises(UserError, match=message):
        shapes(50)


def by_timm(positions, **more):
    """Returns tensors of a small image's model as timm names them."""
    leaves = values(shapes(48))
    layout = next(one for one in layouts() if one.name == "timm ViT")
    tensors = layout.tensors(leaves)
    table = np.random.default_rng(0).normal(size=(1, positions, 192))
    return tensors | {"pos_embed": table.astype(np.float32)} | more


@pytest.mark.fast_runs("9-more0-48", "11-more3-64", "10-more5-48")
@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize(
    "positions, more",
    [
        (9, {}),  # Only the patches have positions: `no_embed_class`.
        (16, {}),
        (1, {}),
        (11, {"dist_token": np.zeros((1, 1, 192), np.float32)}),
        (14, {"reg_token": np.zeros((1, 4, 192), np.float32)}),
        # Five registers, a class token and 4 patches are as many as 9 patches and one.
        (10, {"reg_token": np.zeros((1, 5, 192), np.float32)}),
    ],
)
def test_positions_of_other_tokens_are_not_taken_for_those_of_patches(
    positions, more, size
):
    weights = Weights(address="file:w", tensors=by_timm(positions, **more), sha256={})
    with pytest.raises(UserError, match="pos_embed|dist_token|reg_token"):
        load_weights(shapes(size), weights)
