"""EfficientNet-Lites of efficientnet-lite-pytorch and timm."""

from typing import Any

from finetune_jax.weights.fields import MEAN_POOLS, Fields
from finetune_jax.weights.layout import Built, Layout

LAYOUTS = (
    Layout(
        name="efficientnet-lite-pytorch",
        rows=(
            ("stem/conv", "_conv_stem"),
            ("stem/bn", "_bn0"),
            ("stage{s}/block{b}/expand_conv", "_blocks.{n}._expand_conv"),
            ("stage{s}/block{b}/expand_bn", "_blocks.{n}._bn0"),
            ("stage{s}/block{b}/depthwise_conv", "_blocks.{n}._depthwise_conv"),
            ("stage{s}/block{b}/depthwise_bn", "_blocks.{n}._bn1"),
            ("stage{s}/block{b}/project_conv", "_blocks.{n}._project_conv"),
            ("stage{s}/block{b}/project_bn", "_blocks.{n}._bn2"),
            ("top/conv", "_conv_head"),
            ("top/bn", "_bn1"),
            ("head/logits", "_fc"),
        ),
    ),
    Layout(
        name="timm",
        rows=(
            ("stem/conv", "conv_stem"),
            ("stem/bn", "bn1"),
            # Blocks without expansion have other names for their convolutions.
            ("stage1/block{b}/depthwise_conv", "blocks.0.{b-1}.conv_dw"),
            ("stage1/block{b}/depthwise_bn", "blocks.0.{b-1}.bn1"),
            ("stage1/block{b}/project_conv", "blocks.0.{b-1}.conv_pw"),
            ("stage1/block{b}/project_bn", "blocks.0.{b-1}.bn2"),
            ("stage{s}/block{b}/expand_conv", "blocks.{s-1}.{b-1}.conv_pw"),
            ("stage{s}/block{b}/expand_bn", "blocks.{s-1}.{b-1}.bn1"),
            ("stage{s}/block{b}/depthwise_conv", "blocks.{s-1}.{b-1}.conv_dw"),
            ("stage{s}/block{b}/depthwise_bn", "blocks.{s-1}.{b-1}.bn2"),
            ("stage{s}/block{b}/project_conv", "blocks.{s-1}.{b-1}.conv_pwl"),
            ("stage{s}/block{b}/project_bn", "blocks.{s-1}.{b-1}.bn3"),
            ("top/conv", "conv_head"),
            ("top/bn", "bn2"),
            ("head/logits", "classifier"),
        ),
    ),
)

# Supported values of timm's arguments.
_TIMM_ARGUMENTS = {
    "output_stride": (32,), "global_pool": MEAN_POOLS,
    "act_layer": ("relu6",), "norm_layer": ("batchnorm2d", "batchnorm"),
    "se_layer": ("",), "aa_layer": ("",), "fix_stem": (True,), "stem_size": (32,),
}  # fmt: skip
_PADDINGS = {"same": "same", "": "symmetric"}


def read_timm(
    fields: Fields, arguments: Fields, architecture: str, name: str
) -> tuple[str, ...]:
    """Reads `config.json` of timm; see `weights.layouts`."""
    converted = architecture == f"tf_{name}"
    if not converted and architecture != name:
        fields.refuse("architecture", f"{name} follows tf_{name} and {name} of timm")
        return tuple(arguments)
    padding, epsilon = ("same", 1e-3) if converted else ("symmetric", 1e-5)
    fields.take("padding", padding, "architecture")
    fields.take("epsilon", epsilon, "architecture")
    given = arguments.get("pad_type")
    arguments.must("pad_type", *_PADDINGS)
    if isinstance(given, str) and given in _PADDINGS:
        arguments.take("padding", _PADDINGS[given], "pad_type")
    if arguments.get("bn_eps") is not None:
        arguments.positive("epsilon", "bn_eps")
    fields.must("global_pool", *MEAN_POOLS)
    return ("pad_type", "bn_eps", *arguments.musts(_TIMM_ARGUMENTS))


def ambiguous(layout: str, name: str) -> tuple[tuple[str, ...], str]:
    """Returns the arguments that a layout leaves open, and the reason."""
    if layout != "timm":
        return (), ""
    return ("padding", "epsilon"), (
        f"the names fit tf_{name} of timm (padding='same', epsilon=0.001) and {name} "
        "(padding='symmetric', epsilon=1e-05)"
    )


def timm_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in timm and its arguments; see `weights.layouts`."""
    padding, epsilon = built.module["stem"].variant
    usual = 1e-3 if padding == "same" else 1e-5
    arguments = {} if epsilon == usual else {"bn_eps": epsilon}
    return (f"tf_{built.name}" if padding == "same" else built.name), arguments
