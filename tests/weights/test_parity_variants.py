"""Networks of one set of names: each member of a pair computes what its library computes.

The file beside the weights chooses the member, as in a run.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable

import bert_oracles
import jax
import numpy as np
import oracle_models
import oracles
import pytest
import small
from safetensors.numpy import save_file

from finetune_jax.models import constructors, convnext, model_of
from finetune_jax.models.resnet import Shape as ResNetShape
from finetune_jax.models.vit import Shape
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults

pytestmark = pytest.mark.slow
ONCE, NARROW = (1, 1, 1, 1), (8, 8, 16, 16)
CLASSES = oracle_models.CLASSES


@dataclasses.dataclass(frozen=True)
class Pair:
    """A network of a library, and ours with the arguments that must be filled.

    Attributes:
        name: Name of our model.
        make: Takes a folder, writes weights and `config.json`, and returns the module.
        filled: Arguments that the file gives.
        sizes: Sizes of our model, if it is smaller than its name says.
        arguments: Arguments of our model in the config.
    """

    name: str
    make: Callable
    filled: dict
    sizes: tuple = ()
    arguments: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return "-".join([self.name, *map(str, self.filled.values())])


def published(module, folder):
    module = oracle_models.randomised(module)
    module.save_pretrained(folder)
    return module


def by_timm(architecture, model_args, module, folder):
    module = oracle_models.randomised(module)
    tensors = {name: leaf.numpy() for name, leaf in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    values = {"architecture": architecture, "model_args": model_args}
    (folder / "config.json").write_text(json.dumps(values))
    return module


def bert(kind="Bert", **fields):
    def make(folder):
        library = oracles.import_transformers()
        sizes = {
            "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24,
            "vocab_size": 31, "max_position_embeddings": 12, "num_labels": CLASSES,
        }  # fmt: skip
        if kind == "DistilBert":
            sizes = {
                "dim": 16, "n_layers": 2, "hidden_dim": 24, "vocab_size": 31,
                "max_position_embeddings": 12, "num_labels": CLASSES,
            }  # fmt: skip
        config = getattr(library, f"{kind}Config")(**sizes, **fields)
        make = getattr(library, f"{kind}ForSequenceClassification")
        return published(make(config), folder)

    return make


def vit(**fields):
    def make(folder):
        library = oracles.import_transformers()
        sizes = {
            "hidden_size": 192, "num_hidden_layers": 2, "intermediate_size": 768,
            "num_labels": CLASSES, "image_size": 32,
        }  # fmt: skip
        config = library.ViTConfig(**sizes, **fields)
        return published(library.ViTForImageClassification(config), folder)

    return make


def timm_vit(**model_args):
    def make(folder):
        library = oracles.import_timm().models.vision_transformer
        sizes = {"img_size": 32, "embed_dim": 192, "depth": 2, "num_classes": CLASSES}
        module = library.VisionTransformer(**sizes, **model_args)
        return by_timm("vit_tiny_patch16_224", model_args, module, folder)

    return make


def resnet(downsample):
    def make(folder):
        library = oracles.import_transformers()
        config = library.ResNetConfig(
            depths=list(ONCE), num_labels=CLASSES, downsample_in_bottleneck=downsample
        )
        return published(library.ResNetForImageClassification(config), folder)

    return make


def lite(architecture, **model_args):
    def make(folder):
        module = oracles.import_timm().create_model(
            architecture, num_classes=CLASSES, **model_args
        )
        for blocks in module.blocks:
            del blocks[1:]
        return by_timm(architecture, model_args, module, folder)

    return make


def next_of(epsilon):
    def make(folder):
        library = oracles.import_transformers()
        config = library.ConvNextConfig(
            depths=ONCE, hidden_sizes=NARROW, num_labels=CLASSES, layer_norm_eps=epsilon
        )
        return published(library.ConvNextForImageClassification(config), folder)

    return make


TINY = {key: bert_oracles.TINY[key] for key in ("layers", "width", "hidden")}
TINY |= {"vocabulary": 31, "positions": 12}
HEADS_2 = {"num_attention_heads": 2, "layer_norm_eps": 1e-3, "hidden_act": "relu"}


SHALLOW = (Shape(192, 2, 3, 16),)
FIRST, FEW = (ResNetShape(ONCE),), (1.0, 0.1)


PAIRS = [
    Pair(
        "bert_base",
        bert(**HEADS_2),
        {"heads": 2, "hidden_activation": "relu", "epsilon": 1e-3},
        arguments=TINY,
    ),
    Pair(
        "minilm_l6",
        bert(num_attention_heads=4, hidden_act="gelu_new", layer_norm_eps=1e-5),
        {"heads": 4, "hidden_activation": "gelu_tanh", "epsilon": 1e-5},
        arguments=TINY,
    ),
    Pair(
        "bert_base",
        bert(num_attention_heads=4, hidden_act="quick_gelu"),
        {"heads": 4, "hidden_activation": "quick_gelu"},
        arguments=TINY,
    ),
    Pair(
        "distilbert_base",
        bert("DistilBert", n_heads=8, activation="relu"),
        {"heads": 8, "hidden_activation": "relu"},
        arguments=TINY,
    ),
    Pair(
        "bert_base",
        bert("DistilBert", n_heads=2, activation="silu"),
        {"heads": 2, "hidden_activation": "silu", "activation": "relu"},
        arguments={**TINY, "types": 0},
    ),
    Pair(
        "vit_tiny_patch16",
        vit(num_attention_heads=6, hidden_act="relu", layer_norm_eps=1e-2),
        {"heads": 6, "hidden_activation": "relu", "epsilon": 1e-2},
        sizes=SHALLOW,
    ),
    Pair(
        "vit_tiny_patch16",
        vit(num_attention_heads=3, hidden_act="gelu_pytorch_tanh"),
        {"hidden_activation": "gelu_tanh", "epsilon": 1e-12},
        sizes=SHALLOW,
    ),
    Pair(
        "vit_tiny_patch16",
        timm_vit(num_heads=6, act_layer="quick_gelu", global_pool="avg"),
        {"heads": 6, "hidden_activation": "quick_gelu", "pool": "mean_norm"},
        sizes=SHALLOW,
    ),
    Pair(
        "vit_tiny_patch16",
        timm_vit(
            num_heads=3,
            global_pool="avg",
            fc_norm=False,
            class_token=False,
            act_layer="gelu_tanh",
        ),  # fmt: skip
        {"class_token": False, "pool": "mean", "hidden_activation": "gelu_tanh"},
        sizes=SHALLOW,
    ),
    Pair("resnet50", resnet(True), {"stride_in": "1x1"}, sizes=FIRST),
    Pair("resnet50", resnet(False), {}, sizes=FIRST),
    Pair("efficientnet_lite0", lite("tf_efficientnet_lite0"), {}, sizes=FEW),
    Pair(
        "efficientnet_lite0",
        lite("efficientnet_lite0"),
        {"padding": "symmetric", "epsilon": 1e-5},
        sizes=FEW,
    ),
    Pair(
        "efficientnet_lite0",
        lite("tf_efficientnet_lite0", bn_eps=1e-2, pad_type=""),
        {"padding": "symmetric", "epsilon": 1e-2},
        sizes=FEW,
    ),
    Pair(
        "convnext_tiny",
        next_of(1e-2),
        {"epsilon": 1e-2},
        sizes=(convnext.Shape(ONCE, NARROW),),
    ),
]


def inputs_of(pair):
    """Returns inputs of ours, and the arguments of the library's module."""
    import torch

    if "bert" in pair.name or "minilm" in pair.name:
        x = bert_oracles.texts(types=1)
        ids, mask = (torch.from_numpy(x[key]).long() for key in ("ids", "mask"))
        return x, {"input_ids": ids, "attention_mask": mask}
    size = 32 if pair.name.startswith("vit") else 64
    x = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    there = torch.from_numpy(x).permute(0, 3, 1, 2)
    return x, {"x" if pair.name.startswith("eff") else "pixel_values": there}


def logits_of(module, given):
    import torch

    with torch.no_grad():
        if not hasattr(module, "config"):
            return module(*given.values()).numpy()
        return module(**given).logits.numpy()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.ci_runs(
    "bert_base-2-relu-0.001",
    "distilbert_base-8-relu",
    "vit_tiny_patch16-6-quick_gelu-mean_norm",
    "resnet50-1x1",
    "efficientnet_lite0-symmetric-0.01",
    "convnext_tiny-0.01",
)
def test_the_member_that_the_file_describes_is_computed(pair, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    module = pair.make(tmp_path)
    address = f"file:{tmp_path}/model.safetensors"
    config = small.config(
        model=pair.name,
        overrides=[("init.pretrained", address)],
        **pair.arguments,
    )
    full, _ = with_weight_defaults(config)
    assert {
        k: full.model[k] for k in full.model if k not in config.model
    } == pair.filled
    described = {k: v for k, v in full.model.to_dict().items() if k[:4] != "lora"}
    described = {k: v for k, v in described.items() if k != "members"}
    if pair.sizes:
        make = constructors()[pair.name][1]
        smaller = functools.partial(make.func, *pair.sizes, **make.keywords)
        family = sys.modules[make.func.__module__]
        monkeypatch.setitem(family.MODELS, pair.name, smaller)
    ours = model_of(described, classes=CLASSES, precision="float32")
    x, given = inputs_of(pair)
    variables = jax.eval_shape(lambda: ours.init(jax.random.key(0), x, train=False))
    loaded = load_weights(variables, read_weights(address))
    found = np.asarray(jax.jit(lambda v: ours.apply(v, x, train=False))(loaded))
    wanted = logits_of(module, given)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
