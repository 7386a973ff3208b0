"""ConvNeXts of torchvision, timm and transformers."""

import re
from typing import Any

from finetune_jax.weights.fields import MEAN_POOLS, Fields
from finetune_jax.weights.layout import Built, Layout, Row, Turn

# One number for each channel; torchvision's have the axes of images [C, H, W].
OF_CHANNELS = Turn(ours=lambda a: a[:, 0, 0], theirs=lambda a: a[:, None, None])

TORCHVISION: list[Row] = [
    ("stem/conv", "features.0.0"),
    ("stem/ln", "features.0.1"),
    ("stage{s}/downsample_ln", "features.{2s-2}.0"),
    ("stage{s}/downsample_conv", "features.{2s-2}.1"),
    ("stage{s}/block{b}/depthwise_conv", "features.{2s-1}.{b-1}.block.0"),
    ("stage{s}/block{b}/ln", "features.{2s-1}.{b-1}.block.2"),
    ("stage{s}/block{b}/dense1", "features.{2s-1}.{b-1}.block.3"),
    ("stage{s}/block{b}/dense2", "features.{2s-1}.{b-1}.block.5"),
    (
        "stage{s}/block{b}/layer_scale",
        "features.{2s-1}.{b-1}.layer_scale",
        OF_CHANNELS,
    ),
    ("norm/ln", "classifier.0"),
    ("head/logits", "classifier.2"),
]
TIMM: list[Row] = [
    ("stem/conv", "stem.0"),
    ("stem/ln", "stem.1"),
    ("stage{s}/downsample_ln", "stages.{s-1}.downsample.0"),
    ("stage{s}/downsample_conv", "stages.{s-1}.downsample.1"),
    ("stage{s}/block{b}/depthwise_conv", "stages.{s-1}.blocks.{b-1}.conv_dw"),
    ("stage{s}/block{b}/ln", "stages.{s-1}.blocks.{b-1}.norm"),
    ("stage{s}/block{b}/dense{k}", "stages.{s-1}.blocks.{b-1}.mlp.fc{k}"),
    ("stage{s}/block{b}/layer_scale", "stages.{s-1}.blocks.{b-1}.gamma"),
    ("norm/ln", "head.norm"),
    ("head/logits", "head.fc"),
]


def _transformers(prefix: str) -> list[Row]:
    stage = f"{prefix}encoder.stages.{{s-1}}"
    block = f"{stage}.layers.{{b-1}}"
    return [
        ("stem/conv", f"{prefix}embeddings.patch_embeddings"),
        ("stem/ln", f"{prefix}embeddings.layernorm"),
        ("stage{s}/downsample_ln", f"{stage}.downsampling_layer.0"),
        ("stage{s}/downsample_conv", f"{stage}.downsampling_layer.1"),
        ("stage{s}/block{b}/depthwise_conv", f"{block}.dwconv"),
        ("stage{s}/block{b}/ln", f"{block}.layernorm"),
        ("stage{s}/block{b}/dense{k}", f"{block}.pwconv{{k}}"),
        ("stage{s}/block{b}/layer_scale", f"{block}.layer_scale_parameter"),
        ("norm/ln", f"{prefix}layernorm"),
        ("head/logits", "classifier"),
    ]


LAYOUTS = (
    Layout(name="torchvision ConvNeXt", rows=TORCHVISION),
    Layout(name="timm ConvNeXt", rows=TIMM),
    Layout(name="transformers ConvNeXt", rows=_transformers("convnext.")),
    Layout(name="transformers ConvNeXt without a head", rows=_transformers("")),
)

TRANSFORMERS = {"convnext": "ConvNext"}
_OLDER = re.compile(r"(_384)?(_in22ft1k|_in22k)$")
# Supported values of timm's arguments.
_TIMM_ARGUMENTS = {
    "output_stride": (32,), "global_pool": MEAN_POOLS,
    "kernel_sizes": (7,), "ls_init_value": (1e-6,), "stem_type": ("patch",),
    "patch_size": (4,), "head_norm_first": (False,), "conv_mlp": (False,),
    "conv_bias": (True,), "use_grn": (False,), "act_layer": ("gelu",),
    "norm_layer": ("layernorm", "layernorm2d"), "norm_eps": (1e-6,),
}  # fmt: skip


def read_transformers(fields: Fields, kind: str, name: str) -> None:
    """Reads `config.json` of transformers; see `weights.layouts`."""
    del kind, name
    fields.must("hidden_act", "gelu", "gelu_python")
    fields.must("patch_size", 4)
    fields.must("num_stages", 4)
    fields.positive("epsilon", "layer_norm_eps")


def read_timm(
    fields: Fields, arguments: Fields, architecture: str, name: str
) -> tuple[str, ...]:
    """Reads `config.json` of timm; see `weights.layouts`."""
    if not fields.is_model(_OLDER.sub("", architecture), name):
        return tuple(arguments)
    fields.take("epsilon", 1e-6, "architecture")
    fields.must("global_pool", *MEAN_POOLS)
    return arguments.musts(_TIMM_ARGUMENTS)


def ambiguous(layout: str, name: str) -> tuple[tuple[str, ...], str]:
    """Returns the arguments that a layout leaves open, and the reason."""
    del name
    if not layout.startswith("transformers"):
        return (), ""
    return ("epsilon",), (
        "no config.json says the epsilon of the last LayerNorm, which is 1e-12 in "
        "transformers by default"
    )


def _stages(built: Built) -> list[Any]:
    return [built.module[stage] for stage in built.module.stages if "stage" in stage]


def transformers_config(built: Built) -> dict[str, Any] | None:
    """Returns `config.json` of transformers without labels; see `weights.layouts`."""
    stages = _stages(built)
    return {
        "architectures": ["ConvNextForImageClassification"],
        "model_type": "convnext",
        "num_channels": built.shape[-1],
        "num_stages": len(stages),
        "depths": [len(stage.rates) for stage in stages],
        "hidden_sizes": [stage.width for stage in stages],
        "patch_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": built.module["norm"].epsilon,
        "layer_scale_init_value": stages[0].layer_scale,
        "image_size": built.shape[0],
    }


def timm_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in timm and its arguments; see `weights.layouts`."""
    if built.module["norm"].epsilon != 1e-6:
        return None
    stages = _stages(built)
    depths, widths = [len(one.rates) for one in stages], [one.width for one in stages]
    return built.name, {"depths": depths, "dims": widths}


def torchvision_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in torchvision and its arguments; see `weights.layouts`."""
    return (built.name, {}) if built.module["norm"].epsilon == 1e-6 else None
