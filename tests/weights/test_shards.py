"""Weights in several files, and files of other families and in half precision."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import given, layout, problems, shapes, values

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest, named
from finetune_jax.training.initial.starting_state import told_of
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights


def write(folder, tensors, listed=None):
    """Returns the address of the index of two files."""
    names = sorted(tensors)
    files = {
        n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files | (listed or {})}))
    return f"file:{index}"


def tensors():
    return {f"t{i}": np.full(3, i, np.float32) for i in range(5)}


def test_files_of_an_index_are_read_as_one(tmp_path):
    weights = read_weights(write(tmp_path, tensors()))
    assert digest(weights.tensors) == digest(tensors())
    assert len(weights.sha256) == 3


def test_a_missing_file_and_tensors_in_no_file_are_told(tmp_path):
    address = write(tmp_path, tensors(), {"t9": "model-00002-of-00002.safetensors"})
    with pytest.raises(UserError, match="t9: not in model-00002-of-00002"):
        read_weights(address)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match="model-00002.*: no such file beside it, with 3"
    ):
        read_weights(address)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": "../b"}}'])
def test_what_is_no_index_is_refused(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no index of weights|names '../b'"):
        read_weights(f"file:{path}")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(kind, tmp_path):
    half = {n: t.astype(kind) for n, t in layout("timm ViT").tensors(
        values("vit_tiny_patch16")).items()}  # fmt: skip
    save_file(half, tmp_path / "w.safetensors")
    weights = read_weights(f"file:{tmp_path}/w.safetensors")
    loaded = named(load_weights(shapes("vit_tiny_patch16"), weights))
    name = "params/block3/attention/key/kernel"
    assert loaded[name].dtype == np.float32
    wanted = values("vit_tiny_patch16")[name].astype(kind).astype(np.float32)
    np.testing.assert_array_equal(loaded[name], wanted)
    (told,) = told_of(weights, "float32")
    count, kind = len(half), np.dtype(kind).name
    assert f"{count} of {count} tensors are {kind}; they become float32" in told
    assert len(told_of(weights, "bfloat16")) == (kind == "float16")
    assert not told_of(None, "float32") and not told_of(given(tensors()), "float32")


def test_another_width_is_told_by_parts_of_tensors_and_shapes():
    weights = given(layout("timm ViT").tensors(values("vit_tiny_patch16")))
    found = problems("vit_small_patch16", weights)
    assert (
        "params/block1/attention/key/bias (blocks.0.attn.qkv.bias[1/3]): "
        "model (384,), weights (192,)"
    ) in found


def test_another_family_is_refused():
    weights = given(layout("torchvision VGG").tensors(values("vgg11")))
    found = problems("resnet18", weights)
    assert found[0].startswith("file:weights (layout: torchvision VGG) does not fit")
    assert (
        "is config.model.name the model that these weights were made for?" in found[1]
    )
