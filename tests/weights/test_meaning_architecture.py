"""Files beside weights that describe a network: followed, refused by name, or told."""

import dataclasses
import functools
import json
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import save_file

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.inference.export import libraries
from finetune_jax.models import make_model
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults

BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu",
    "num_attention_heads": 12, "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
DISTIL = {"model_type": "distilbert", "n_heads": 12, "activation": "gelu"}
VIT = {
    "model_type": "vit", "num_attention_heads": 3, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "qkv_bias": True, "patch_size": 16,
}  # fmt: skip
RESNET = {"model_type": "resnet", "layer_type": "bottleneck", "hidden_act": "relu"}
CONVNEXT = {"model_type": "convnext", "hidden_act": "gelu", "layer_norm_eps": 1e-6}
TINY_VIT = {"architecture": "vit_tiny_patch16_224.augreg_in21k"}
DEEP = "[" * 100_000


@dataclasses.dataclass(frozen=True)
class Case:
    """A file beside weights, and its outcome.

    Attributes:
        model: Name of our model.
        values: Content of the file; a string stands as it is.
        filled: Arguments that it gives.
        refuses: Regexes that the refusal matches.
        tells: Regex that a line matches; None expects no line but that of `filled`.
        arguments: Arguments of our model in the config.
        fresh: Regexes of new parameters.
        file: Name of the file.
    """

    model: str
    values: dict | list | str | bytes
    filled: dict = dataclasses.field(default_factory=dict)
    refuses: tuple = ()
    tells: str | None = None
    arguments: dict = dataclasses.field(default_factory=dict)
    fresh: tuple = ()
    file: str = "config.json"


def timm(architecture, **model_args):
    return {"architecture": architecture, "model_args": model_args}


FOLLOWED = [
    Case("bert_base", BERT),
    Case("bert_base", BERT | {"hidden_act": "relu"}, {"hidden_activation": "relu"}),
    Case("bert_base", BERT | {"num_attention_heads": 2}, {"heads": 2}),
    Case("bert_base", BERT | {"num_attention_heads": 2.0}, {"heads": 2}),
    Case("bert_base", BERT | {"hidden_act": "gelu_fast"},
         {"hidden_activation": "gelu_tanh"}),
    Case("bert_base", BERT | {"hidden_act": "swish"}, {"hidden_activation": "silu"}),
    Case("bert_base", BERT | {"hidden_act": "gelu_python"}),
    Case("bert_base", BERT | {"layer_norm_eps": 1e-5}, {"epsilon": 1e-5}),
    Case("bert_base", BERT | {"num_attention_heads": 2}, arguments={"heads": 2}),
    Case("bert_base", BERT | {"architectures": ["BertForTokenClassification"]},
         {"pool": "none"}),
    Case("bert_base", BERT | {"architectures": ["BertForTokenClassification"]},
         fresh=("head/.*",)),
    Case("minilm_l6", BERT | {"model_type": None, "architectures": ["TFBertModel"]}),
    Case("distilbert_base", DISTIL | {"sinusoidal_pos_embds": True}),
    Case("distilbert_base", DISTIL | {"activation": "relu"}, {"hidden_activation": "relu"}),
    Case("distilbert_base", DISTIL | {"n_heads": 6}, {"heads": 6}),
    # DistilBERT's first dense layer has another activation than BERT's.
    Case("bert_base", DISTIL, {"activation": "relu"}, arguments={"types": 0}),
    Case("bert_base", DISTIL, arguments={"types": 0}, fresh=("pool/.*",)),
    Case("bert_base", DISTIL, arguments={"types": 0, "pool": "mean"}),
    Case("vit_tiny_patch16", VIT),
    Case("vit_tiny_patch16", VIT | {"layer_norm_eps": 1e-12}, {"epsilon": 1e-12}),
    Case("vit_tiny_patch16", VIT | {"num_attention_heads": 6}, {"heads": 6}),
    Case("vit_tiny_patch16", VIT | {"patch_size": [16, 16]}),
    Case("vit_tiny_patch16", VIT, arguments={"pool": "mean"}, fresh=("head/.*",)),
    Case("vit_tiny_patch16", TINY_VIT),
    Case("vit_small_patch16", {"architecture": "deit_small_patch16_224"}),
    Case("vit_tiny_patch16", timm("vit_tiny_patch16_224", num_heads=6, img_size=64),
         {"heads": 6}),
    # As exports write models that timm has no name for.
    Case("vit_tiny_patch14", timm("vit_base_patch16_224", num_heads=3, patch_size=14,
                                  embed_dim=192, depth=12)),
    Case("vit_tiny_patch16", TINY_VIT | {"global_pool": "avg"}, {"pool": "mean_norm"},
         fresh=("head/.*",)),
    Case("vit_tiny_patch16", timm("vit_tiny_patch16_224", global_pool="avg", fc_norm=False),
         {"pool": "mean"}),
    Case("vit_tiny_patch16", {"pretrained_cfg": TINY_VIT}),
    Case("resnet50", RESNET),
    Case("resnet50", RESNET | {"downsample_in_bottleneck": False}),
    Case("resnet50", RESNET | {"downsample_in_bottleneck": True}, {"stride_in": "1x1"}),
    Case("resnet18", RESNET | {"layer_type": "basic", "downsample_in_bottleneck": True}),
    Case("resnet50", timm("resnet50.a1_in1k", drop_path_rate=0.1, output_stride=32)),
    Case("resnet50", timm("tv_resnet50")),
    Case("resnet50", timm("hf-hub:timm/resnet50.a1_in1k")),
    Case("bert_base", "\ufeff" + json.dumps(BERT | {"num_attention_heads": 2}),
         {"heads": 2}),
    Case("resnext50_32x4d", timm("resnext50_32x4d", cardinality=32, base_width=4)),
    Case("efficientnet_lite0", timm("tf_efficientnet_lite0.in1k")),
    Case("efficientnet_lite0", timm("efficientnet_lite0.ra_in1k"),
         {"padding": "symmetric", "epsilon": 1e-5}),
    Case("efficientnet_lite3", timm("efficientnet_lite3", bn_eps=1e-4, pad_type="same"),
         {"epsilon": 1e-4}),
    Case("convnext_tiny", CONVNEXT | {"layer_norm_eps": 1e-12}, {"epsilon": 1e-12}),
    Case("convnext_tiny", timm("convnext_tiny.fb_in22k", depths=[3, 3, 9, 3])),
    Case("vgg16_bn", timm("vgg16_bn.tv_in1k")),
    # Files of a run and of an export of this project.
    Case("resnet50", {"model": {"name": "resnet50", "stride_in": "1x1"}},
         {"stride_in": "1x1"}, file="model.json"),
    Case("bert_base", {"model": {"name": "bert_base", "heads": 3}}, {"heads": 3}),
    Case("ft_transformer", {"model": {"name": "ft_transformer", "heads": 2}}, {"heads": 2}),
    Case("bert_base", {"model": {"name": "resnet50", "stride_in": "1x1"}}),
    Case("bert_base", {"model": {"name": "no such model"}}),
    Case("resnet20", BERT),  # A model that no library has.
]  # fmt: skip


def refused(model, values, *refuses, **more):
    return Case(model, values, refuses=refuses, **more)


REFUSED = [
    *(
        refused("bert_base", BERT | {"model_type": kind}, f"model_type='{kind}'")
        for kind in ("roberta", "albert", "electra", "xlm-roberta", "mpnet", "vit")
    ),
    refused("bert_base", {"architectures": ["RobertaModel"]}, "architectures=.*Roberta"),
    refused("bert_base", {"architectures": ["BertGenerationEncoder"]}, "architectures="),
    refused("bert_base", BERT | {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key'.*'absolute'"),
    refused("bert_base", BERT | {"is_decoder": True, "hidden_act": "mish"},
            "is_decoder=True", "hidden_act='mish'"),
    refused("bert_base", BERT | {"hidden_act": ["gelu"]}, "hidden_act="),
    refused("bert_base", BERT | {"add_cross_attention": True}, "add_cross_attention"),
    refused("bert_base", BERT | {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    refused("bert_base", BERT | {"quantization_config": {"bits": 8}}, "quantization_"),
    refused("bert_base", BERT | {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    refused("bert_base", BERT | {"num_attention_heads": 2},
            "config.model.heads: 4.*num_attention_heads=2", arguments={"heads": 4}),
    refused("bert_base", BERT, "hidden_activation: 'relu'.*hidden_act='gelu'",
            arguments={"hidden_activation": "relu"}),
    refused("distilbert_base", DISTIL, "epsilon: 0.1", arguments={"epsilon": 0.1}),
    refused("bert_base", BERT | {"architectures": ["BertForSequenceClassification"]},
            "pool: 'mean'.*ForSequence", arguments={"pool": "mean"}),
    refused("vit_tiny_patch16", VIT | {"model_type": "deit"}, "model_type='deit'"),
    refused("vit_tiny_patch16", VIT | {"model_type": "dinov2"}, "model_type='dinov2'"),
    refused("vit_tiny_patch16", VIT, "pool: 'mean'.*'token'", arguments={"pool": "mean"}),
    refused("vit_tiny_patch16", VIT | {"qkv_bias": False}, "qkv_bias=False"),
    refused("vit_tiny_patch16", VIT | {"patch_size": 8}, "patch_size=8.*16"),
    refused("vit_tiny_patch16", BERT, "model_type='bert'"),
    *(
        refused("vit_tiny_patch16", {"architecture": name}, f"architecture='{name}'")
        for name in (
            "deit_tiny_distilled_patch16_224", "vit_small_patch16_224",
            "vit_tiny_patch14_224", "vit_tiny_r_s16_p8_224", "vit_base_patch16_clip_224",
            "vit_tiny_patch16_reg4_224", "flexivit_small", "resnet50",
        )
    ),
    *(
        refused("vit_tiny_patch16", timm("vit_tiny_patch16_224", **{key: value}),
                f"model_args.{key}=")
        for key, value in {
            "no_embed_class": True, "reg_tokens": 4, "pre_norm": True, "qk_norm": True,
            "init_values": 1e-5, "norm_layer": "rmsnorm", "act_layer": "mish",
            "global_pool": "map", "mlp_ratio": 2, "patch_size": 8, "new_argument": 1,
            "class_token": "no", "fc_norm": True, "pos_embed": "none",
        }.items()
    ),
    *(
        refused("resnet18", {"architecture": name}, f"architecture='{name}'")
        for name in (
            "resnetblur18", "resnet18d", "seresnet18", "resnet34", "resnetv2_18",
            "resnetblur18.tag", "", "resnet18_gn",
        )
    ),
    *(
        refused("resnet50", timm("resnet50", **{key: value}), f"model_args.{key}=")
        for key, value in {
            "output_stride": 16, "aa_layer": "blurpool", "stem_type": "deep",
            "avg_down": True, "act_layer": "silu", "global_pool": "max",
            "base_width": 128, "replace_stem_pool": True, "norm_layer": "groupnorm",
            "block_args": {"attn_layer": "se"},
        }.items()
    ),
    refused("resnet50", timm("resnet50") | {"global_pool": "avgmax"}, "global_pool="),
    refused("resnet50", RESNET | {"layer_type": "basic"}, "layer_type='basic'"),
    refused("resnet50", RESNET | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    refused("resnet50", RESNET | {"downsample_in_first_stage": True}, "first_stage=True"),
    refused("resnet50", RESNET | {"downsample_in_bottleneck": "yes"}, "bottleneck='yes'"),
    refused("resnet50", RESNET | {"downsample_in_bottleneck": True},
            "stride_in: '3x3'.*downsample_in_bottleneck", arguments={"stride_in": "3x3"}),
    refused("resnet50", timm("resnet50"), "stride_in: '1x1'.*architecture='resnet50'",
            arguments={"stride_in": "1x1"}),
    refused("efficientnet_lite0", timm("efficientnet_lite0"),
            "padding: 'same'.*architecture='efficientnet_lite0'",
            arguments={"padding": "same"}),
    refused("efficientnet_lite0", timm("efficientnet_b0"), "architecture='efficient"),
    refused("efficientnet_lite0", timm("efficientnet_lite1"), "architecture='efficient"),
    refused("efficientnet_lite0", timm("efficientnet_lite0", pad_type="valid"), "pad_type"),
    refused("convnext_tiny", timm("convnext_tiny_hnf.a2h_in1k"), "convnext_tiny_hnf"),
    refused("convnext_tiny", timm("convnext_tiny", norm_eps=1e-5), "norm_eps="),
    refused("convnext_tiny", timm("convnext_tiny", conv_mlp=True), "conv_mlp=True"),
    refused("convnext_tiny", CONVNEXT | {"model_type": "convnextv2"}, "convnextv2"),
    refused("convnext_tiny", CONVNEXT | {"hidden_act": "relu"}, "hidden_act='relu'"),
    refused("vgg16", timm("vgg16_bn"), "architecture='vgg16_bn'"),
    refused("vgg16", timm("vgg16", act_layer="gelu"), "act_layer='gelu'"),
    refused("resnet50", {"model": {"name": "resnet50"}}, "stride_in: '1x1'",
            arguments={"stride_in": "1x1"}, file="model.json"),
]  # fmt: skip
TOLD = [
    Case("resnet50", {"model": {"name": "resnet50", "stride_in": ["1x1"]}},
         tells="stride_in=.* is no value"),
    Case("efficientnet_lite0", timm("tf_efficientnet_lite0", bn_eps="1e-3"),
         tells="bn_eps='1e-3' is not a positive number"),
    Case("bert_base", json.dumps(BERT).encode("utf-16"), tells="cannot be read"),
    Case("bert_base", [1], tells="a JSON list, not an object"),
    Case("bert_base", "no JSON", tells="cannot be read as JSON"),
    Case("bert_base", DEEP, tells="nested too deep"),
    Case("bert_base", "", tells="cannot be read as JSON"),
    Case("bert_base", "12", tells="a JSON int"),
    *(
        Case("bert_base", BERT | {"num_attention_heads": value}, tells="positive integer")
        for value in ("12", -1, 0, 1.5, True, [12], {"a": 1}, 10**400, float("nan"))
    ),
    *(
        Case("vit_tiny_patch16", VIT | {"layer_norm_eps": value}, tells="positive number")
        for value in ("1e-12", 0, -1e-6, float("inf"), float("nan"), False, [], 10**400)
    ),
    Case("bert_base", BERT | {"model_type": 3}, tells="model_type=3 is not a string"),
    Case("bert_base", BERT | {"architectures": ["Own"]}, tells="is no class"),
    Case("resnet50", {"architecture": ["resnet50"]}, tells="architecture=.*not a string"),
    Case("resnet50", {"architecture": "resnet50", "model_args": 3}, tells="model_args=3"),
    Case("vit_tiny_patch16", timm("vit_tiny_patch16_224", img_size=[32, 128]),
         tells="is not square"),
]  # fmt: skip


def config_of(case, folder):
    text = case.values
    if not isinstance(text, bytes):
        text = (text if isinstance(text, str) else json.dumps(text)).encode()
    (folder / case.file).write_bytes(text)
    overrides = [
        ("init.pretrained", f"file:{folder}/model.safetensors"),
        ("init.fresh", repr(case.fresh)),
    ]
    return small.config(model=case.model, overrides=overrides, **case.arguments)


def ids(cases):
    return [f"{number}-{case.model}" for number, case in enumerate(cases)]


def check(config):
    architecture.check(architecture.described(config), config.init.fresh)


@pytest.mark.parametrize("case", FOLLOWED, ids=ids(FOLLOWED))
def test_what_a_file_says_is_followed(case, tmp_path):
    config = config_of(case, tmp_path)
    full, lines = with_weight_defaults(config)
    found = {key: full.model[key] for key in full.model if key not in config.model}
    assert found == case.filled
    told = [line for line in lines if line.startswith("config.model")]
    assert told == lines and len(told) == bool(case.filled)
    for key, value in case.filled.items():
        assert f"{key}={value!r}" in told[0] and case.file in told[0]
    check(full)
    assert with_weight_defaults(full) == (full, [])
    if case.filled:  # Without them the network would be another one.
        with pytest.raises(UserError, match=next(iter(case.filled))):
            check(config)


@pytest.mark.parametrize("case", REFUSED, ids=ids(REFUSED))
def test_what_no_argument_follows_is_refused_by_name(case, tmp_path):
    config = config_of(case, tmp_path)
    for find in (with_weight_defaults, check):
        with pytest.raises(
            UserError, match=r"config\.model is another network"
        ) as error:
            find(config)
        for pattern in case.refuses:
            error.match(pattern)


@pytest.mark.parametrize("case", TOLD, ids=ids(TOLD))
def test_what_cannot_be_read_is_told(case, tmp_path):
    full, lines = with_weight_defaults(config_of(case, tmp_path))
    (line,) = lines
    assert case.file in line
    assert re.search(case.tells, line), line
    check(full)


def described(model, **arguments):
    return architecture.Described(
        "config.model", "", {"name": model, **arguments}, "file:/nowhere/w.pth"
    )


@pytest.mark.parametrize(
    "model, layout, arguments, tells",
    [
        (
            "efficientnet_lite0",
            "timm",
            {},
            "tf_efficientnet_lite0.*padding='same', eps",
        ),
        ("efficientnet_lite0", "timm", {"padding": "symmetric"}, "assumed: epsilon="),
        ("efficientnet_lite0", "timm", {"padding": "same", "epsilon": 1e-3}, None),
        ("efficientnet_lite0", "efficientnet-lite-pytorch", {}, None),
        ("efficientnet_lite0", "finetune_jax", {}, None),
        ("resnet50", "torchvision or timm", {}, "assumed: stride_in='3x3'"),
        ("resnet50", "transformers", {}, "assumed: stride_in='3x3'"),
        ("resnet50", "torchvision or timm", {"stride_in": "1x1"}, None),
        ("resnet18", "torchvision or timm", {}, "resnetblur.*assumed: resnet18"),
        ("resnet18", "transformers", {}, None),
        ("vit_tiny_patch16", "timm ViT", {}, "heads=3, .*'gelu', epsilon=1e-06"),
        ("vit_tiny_patch16", "torchvision ViT", {"heads": 6}, "assumed: hidden_act"),
        ("bert_base", "transformers' BERT", {}, "heads=12, .*epsilon=1e-12"),
        ("minilm_l6", "sentence-transformers", {}, "heads=12"),
        ("bert_base", "finetune_jax", {}, None),
        ("convnext_tiny", "transformers ConvNeXt", {}, "assumed: epsilon=1e-06"),
        ("convnext_tiny", "timm ConvNeXt", {}, None),
        ("vgg16", "torchvision VGG", {}, None),
        ("resnet20", "finetune_jax", {}, None),
    ],
)
def test_a_variant_that_no_file_says_is_told(model, layout, arguments, tells):
    lines = architecture.assumed(described(model, **arguments), layout)
    assert len(lines) == (tells is not None)
    for line in lines:
        assert re.search(tells, line) and "file:/nowhere/w.pth" in line, line


def test_what_a_file_leaves_out_is_told_alone(tmp_path):
    case = Case("bert_base", {"model_type": "bert", "num_attention_heads": "12"})
    config_of(case, tmp_path)
    one = described("bert_base", epsilon=1e-12)._replace(
        address=f"file:{tmp_path}/model.safetensors"
    )
    (line,) = architecture.assumed(one, "transformers' BERT")
    assert "num_attention_heads, hidden_act and layer_norm_eps" in line
    assert "assumed: heads=12, hidden_activation='gelu';" in line
    config_of(Case("bert_base", BERT), tmp_path)
    assert not architecture.assumed(one, "transformers' BERT")
    config_of(Case("bert_base", DEEP), tmp_path)
    assert architecture.assumed(one, "transformers' BERT")


def test_members_get_what_the_files_beside_their_own_weights_say(tmp_path):
    config = config_of(Case("vit_tiny_patch16", VIT), tmp_path)
    for name, values in (
        ("a", RESNET | {"downsample_in_bottleneck": True}),
        ("b", VIT),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    teachers = [
        {"label": "same", "name": "resnet50", "stride_in": "1x1",
         "pretrained": f"file:{tmp_path}/a/w.pth"},
        {"name": "resnet50", "pretrained": f"file:{tmp_path}/a/w.pth"},
        {"label": "start", "pretrained": "start"},
    ]  # fmt: skip
    plain = small.editable(config)
    plain.model.members = tuple(map(dict, teachers))
    config, problems = configs.resolve(plain)
    assert not problems
    with pytest.raises(UserError, match=r"members\[1\]\.stride_in='1x1' follows it"):
        check(config)
    full, (line,) = with_weight_defaults(config)
    assert line == "config.model.members[1]: stride_in='1x1', as config.json says"
    assert full.model.members[1]["stride_in"] == "1x1"
    check(full)
    wrong = [dict(teachers[0], stride_in="3x3")]
    plain.model.members = tuple(wrong)
    with pytest.raises(UserError, match=r"members\[0\]\.stride_in: '3x3'"):
        with_weight_defaults(configs.resolve(plain)[0])


def test_the_model_of_a_run_is_that_of_the_run_it_begins_with(tmp_path):
    saved = small.config(model="bert_base", heads=2, hidden_activation="relu")
    (tmp_path / "config.json").write_text(configs.to_json(saved))
    step = tmp_path / "checkpoints" / "10"
    step.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "checkpoints", step):
        overrides = [("init.pretrained", f"orbax:{place}")]
        full, _ = with_weight_defaults(
            small.config(model="bert_base", overrides=overrides)
        )
        assert (full.model.heads, full.model.hidden_activation) == (2, "relu")
    other = small.config(model="bert_base", overrides=overrides, heads=4)
    with pytest.raises(
        UserError, match=r"heads: 4, but config\.json says model\.heads=2"
    ):
        with_weight_defaults(other)


def test_a_loaded_model_is_compared_with_the_file_beside_its_weights(tmp_path):
    """As in a run: no name and no shape of a tensor says where the strides are."""
    model = make_model("resnet50", {"head": {}}, classes=10)
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    leaves = {
        name: np.zeros(leaf.shape, "int8") for name, leaf in named(shapes).items()
    }
    save_file(leaves, tmp_path / "w.safetensors")
    config = {"model_type": "resnet", "downsample_in_bottleneck": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(f"file:{tmp_path}/w.safetensors")
    load = functools.partial(load_weights, shapes, weights, accept=("integer",))
    for wrong in ({}, {"stride_in": "3x3"}):
        with pytest.raises(UserError, match="stride_in"):
            load(model={"name": "resnet50", **wrong})
    loaded = load(model={"name": "resnet50", "stride_in": "1x1"})
    jax.tree.map(np.testing.assert_array_equal, loaded, load())


VARIANTS = [
    ("transformers", "resnet50", {}),
    ("transformers", "resnet50", {"stride_in": "1x1"}),
    ("timm", "resnet50", {}),
    ("timm", "efficientnet_lite0", {}),
    ("timm", "efficientnet_lite1", {"padding": "symmetric", "epsilon": 1e-5}),
    ("timm", "efficientnet_lite0", {"epsilon": 1e-2}),
    ("timm", "efficientnet_lite0", {"padding": "symmetric"}),
    ("timm", "vit_base_patch14", {"heads": 6, "hidden_activation": "silu"}),
    ("timm", "vit_tiny_patch16", {"pool": "mean_norm"}),
    ("timm", "vit_tiny_patch16", {"pool": "mean", "class_token": False}),
    ("timm", "convnext_small", {}),
    (
        "transformers",
        "vit_tiny_patch16",
        {"epsilon": 1e-3, "hidden_activation": "tanh"},
    ),
    ("transformers", "convnext_tiny", {"epsilon": 1e-3}),
    ("BERT", "bert_base", {"heads": 2, "hidden_activation": "quick_gelu"}),
    ("BERT", "minilm_l6", {"epsilon": 1e-3, "hidden_activation": "gelu_tanh"}),
    ("DistilBERT", "distilbert_base", {"heads": 2, "hidden_activation": "silu"}),
    ("ours", "ft_transformer", {"heads": 2}),
    ("ours", "vit_tiny_patch16", {"heads": 6, "epsilon": 0.1}),
]


def exported(name, arguments):
    """Returns a model as an export takes it, which has not been trained."""
    module = make_model(name, {"head": {}, **arguments}, classes=10)
    bias = {"bias": np.zeros(10)}
    trained: Any = types.SimpleNamespace(
        task=types.SimpleNamespace(models={"": module}),
        spec=small.spec((32, 32, 3)),
        model={"name": name, **arguments},
        variables={"params": {"head": {"logits": bias}}},
        tokenizer={},
    )
    return trained


def layout_of(library, trained):
    """Returns the first layout of a library that has names for a family."""
    known = libraries.family_of(trained).LAYOUTS
    return next(layout for layout in known if library in layout.words)


@pytest.mark.parametrize("library, name, arguments", VARIANTS)
def test_an_export_says_its_variant(library, name, arguments, tmp_path):
    model = {"name": name, **arguments}
    if library == "ours":
        values = {"model": {"name": name, **(architecture.effective(model) or {})}}
    else:
        trained = exported(name, arguments)
        layout = layout_of(library, trained)
        values = libraries.files_and_code(trained, layout)[0]["config.json"]
    config = config_of(Case(name, values), tmp_path)
    full, _ = with_weight_defaults(config)
    found = {key: full.model[key] for key in full.model if key not in config.model}
    assert found == arguments


@pytest.mark.parametrize(
    "library, name, arguments",
    [
        ("timm", "resnet50", {"stride_in": "1x1"}),
        ("torchvision", "resnet50", {"stride_in": "1x1"}),
        ("timm", "vit_tiny_patch16", {"epsilon": 1e-3}),
        ("torchvision", "vit_base_patch16", {"heads": 6}),
        ("torchvision", "vit_base_patch16", {"hidden_activation": "relu"}),
        ("timm", "convnext_tiny", {"epsilon": 1e-12}),
        ("torchvision", "vit_base_patch16", {"pool": "mean"}),
        ("transformers", "vit_base_patch16", {"pool": "mean"}),
    ],
)
def test_an_export_names_no_library_that_has_no_such_variant(library, name, arguments):
    for given in ({}, arguments):
        trained = exported(name, given)
        layout = layout_of(library, trained)
        assert libraries.computes(trained, layout) == (given == {})


def test_transformers_has_no_wide_resnet():
    trained = exported("wide_resnet50_2", {})
    assert libraries.computes(trained, layout_of("torchvision", trained))
    assert not libraries.computes(trained, layout_of("transformers", trained))


@pytest.mark.parametrize(
    ("modes", "pool", "told"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean", False),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "mean",
            True,
        ),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "mean",
            True,
        ),
        ({"pooling_mode_mean_tokens": True}, "cls", True),
        ({"pooling_mode_cls_token": True}, "none", False),
        ([], "mean", False),
        ({"word_embedding_dimension": 384}, "mean", False),
    ],
)
def test_another_pooling_of_sentence_transformers_is_told(tmp_path, modes, pool, told):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    model = {"name": "minilm_l6", "pool": pool}
    found = architecture.read(model, f"file:{tmp_path}/model.safetensors")
    assert any("1_Pooling" in note for note in found.notes) is told
