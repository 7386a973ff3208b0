"""Random weights of small models by the names of every layout, in every file format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch_files
from safetensors.numpy import save_file

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.models import convnext
from finetune_jax.tasks.components.text_inputs import tokens
from finetune_jax.weights import addresses
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.layout import layouts
from finetune_jax.weights.merge import load_weights

# What is too large for tests that are about names.
SMALLER = {
    "vgg11": ((), {"dense": 8}),
    "vgg13_bn": ((), {"dense": 8}),
    "convnext_tiny": ((convnext.Shape((1, 1, 2, 3), (8, 8, 8, 8)),), {}),
}

TEXT = {"layers": 2, "width": 16, "heads": 4, "vocabulary": 31, "positions": 12}

REPOSITORY = "timm/resnet50.a1_in1k"


@functools.cache
def shapes(model, classes=7):
    """Returns the variables of a model, shapes only: nothing is compiled."""
    is_text = "bert" in model
    sizes, arguments = SMALLER.get(model, ((), TEXT if is_text else {}))
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    module = small.of_sizes(
        model, *sizes, head={}, classes=classes, **arguments, **kinds
    )
    x = tokens(jnp.ones((1, 2, 2), jnp.int32)) if is_text else jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))


@functools.cache
def values(model, classes=7):
    """Returns a random array for every leaf of a model, by our names."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in named(shapes(model, classes)).items()
    }


def layout(name):
    (found,) = [one for one in layouts() if one.name == name]
    return found


def published(name, model, classes=7):
    """Returns the values by the names of a layout, as torch lays kernels."""
    return renamed(name, values(model, classes))


def renamed(name, leaves):
    if name == "finetune_jax":
        return dict(leaves)
    return layout(name).tensors(leaves)


def given(tensors):
    return Weights(address="file:weights", tensors=tensors, sha256={})


def write(path, tensors):
    """Writes tensors in the format that the suffix says; '.pt' is that of old torch."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        writer = torch_files.write_legacy if path.suffix == ".pt" else None
        path.write_bytes((writer or torch_files.write_zip)(tensors))


def problems(model, weights, classes=7, **arguments):
    """Returns the lines of the error that weights which do not fit end in."""
    with pytest.raises(UserError) as error:
        load_weights(shapes(model, classes), weights, **arguments)
    return [line.strip() for line in str(error.value).splitlines()]


def empty_hub(folder, monkeypatch):
    """Returns a function that puts files of a repository into a cache, and its folder.

    Until the test ends, that cache is all there is of the hub.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(addresses, "_failures", {})
    monkeypatch.setattr(addresses, "_reached", set())

    def put(*files):
        root = folder / f"models--{REPOSITORY.replace('/', '--')}"
        snapshot = root / "snapshots" / ("a1" * 20)
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("a1" * 20)
        for number, name in enumerate(files):
            # Told apart by their values.
            (snapshot / name).parent.mkdir(exist_ok=True)
            write(snapshot / name, {"x": np.full(2, number, np.float32)})
        return snapshot

    return put
