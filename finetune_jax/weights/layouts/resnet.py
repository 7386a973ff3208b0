"""ResNets of torchvision, timm and transformers."""

import re
from typing import Any

from finetune_jax.models.resnet import MODELS
from finetune_jax.weights.fields import MEAN_POOLS, Fields
from finetune_jax.weights.layout import Built, Layout, Row


def _transformers(prefix: str) -> list[Row]:
    block = f"{prefix}encoder.stages.{{s-1}}.layers.{{b-1}}"
    return [
        ("stem/conv", f"{prefix}embedder.embedder.convolution"),
        ("stem/bn", f"{prefix}embedder.embedder.normalization"),
        ("stage{s}/block{b}/conv{k}", f"{block}.layer.{{k-1}}.convolution"),
        ("stage{s}/block{b}/bn{k}", f"{block}.layer.{{k-1}}.normalization"),
        ("stage{s}/block{b}/shortcut_conv", f"{block}.shortcut.convolution"),
        ("stage{s}/block{b}/shortcut_bn", f"{block}.shortcut.normalization"),
        ("head/logits", "classifier.1"),
    ]


LAYOUTS = (
    Layout(
        name="torchvision or timm",
        rows=(
            ("stem/conv", "conv1"),
            ("stem/bn", "bn1"),
            ("stage{s}/block{b}/conv{k}", "layer{s}.{b-1}.conv{k}"),
            ("stage{s}/block{b}/bn{k}", "layer{s}.{b-1}.bn{k}"),
            ("stage{s}/block{b}/shortcut_conv", "layer{s}.{b-1}.downsample.0"),
            ("stage{s}/block{b}/shortcut_bn", "layer{s}.{b-1}.downsample.1"),
            ("head/logits", "fc"),
        ),
    ),
    Layout(name="transformers", rows=_transformers("resnet.")),
    Layout(name="transformers without a head", rows=_transformers("")),
)

TRANSFORMERS = {"resnet": "ResNet"}
_BASIC = ("resnet18", "resnet34")
# Prefixes of older names in timm, which are tags of weights now.
_OLDER = re.compile(r"^(tv|ssl|swsl)_")
# Supported values of timm's arguments.
_TIMM_ARGUMENTS = {
    "output_stride": (32,), "global_pool": MEAN_POOLS,
    "stem_width": (64,), "stem_type": ("",), "replace_stem_pool": (False,),
    "block_reduce_first": (1,), "down_kernel_size": (1,), "avg_down": (False,),
    "channels": ([64, 128, 256, 512],), "act_layer": ("relu",),
    "norm_layer": ("batchnorm2d", "batchnorm"), "aa_layer": ("",), "block_args": ({},),
}  # fmt: skip


def read_transformers(fields: Fields, kind: str, name: str) -> None:
    """Reads `config.json` of transformers; see `weights.layouts`."""
    fields.must("hidden_act", "relu")
    fields.must("downsample_in_first_stage", False)
    fields.must("layer_type", "basic" if name in _BASIC else "bottleneck")
    fields.must("downsample_in_bottleneck", False, True)
    if name not in _BASIC:
        # Files without the field mean False.
        first = fields.get("downsample_in_bottleneck") is True
        key = "downsample_in_bottleneck"
        fields.take("stride_in", "1x1" if first else "3x3", key)
    del kind


def read_timm(
    fields: Fields, arguments: Fields, architecture: str, name: str
) -> tuple[str, ...]:
    """Reads `config.json` of timm; see `weights.layouts`."""
    if not fields.is_model(_OLDER.sub("", architecture), name):
        return tuple(arguments)
    if name not in _BASIC:
        fields.take("stride_in", "3x3", "architecture")
    fields.must("global_pool", *MEAN_POOLS)
    shape = MODELS[name].args[0]
    sizes = {"cardinality": (shape.groups,), "base_width": (shape.group_width,)}
    return arguments.musts({**_TIMM_ARGUMENTS, **sizes})


def ambiguous(layout: str, name: str) -> tuple[tuple[str, ...], str]:
    """Returns the arguments that a layout leaves open, and the reason."""
    if layout not in {one.name for one in LAYOUTS}:
        return (), ""
    if name not in _BASIC:
        return ("stride_in",), (
            "no config.json says which convolution of a bottleneck has the stride ('3x3' "
            "in torchvision and timm, '1x1' in the original ResNets)"
        )
    if "timm" not in layout:
        return (), ""
    return (), "no config.json says whether this is resnet or resnetblur of timm"


def transformers_config(built: Built) -> dict[str, Any] | None:
    """Returns `config.json` of transformers without labels; see `weights.layouts`."""
    ours = built.module["stage1"].blocks[0].shape
    if (ours.groups, ours.group_width) != (1, 64):
        return None
    factor = 4 if ours.bottleneck else 1
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": built.shape[-1],
        "embedding_size": 64,
        "hidden_sizes": [64 * 2**stage * factor for stage in range(4)],
        "depths": list(ours.blocks),
        "layer_type": "bottleneck" if ours.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": ours.stride_in == "1x1",
    }


def timm_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in timm and its arguments; see `weights.layouts`."""
    shape = built.module["stage1"].blocks[0].shape
    return (built.name, {}) if shape.stride_in == "3x3" else None


torchvision_model = timm_model
