"""Layouts of ConvNeXts: those of torchvision, timm and transformers."""

from finetune_jax.pretrained.layout import Layout, Row, Turn

# One number a channel, as torchvision multiplies images [C, H, W].
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
