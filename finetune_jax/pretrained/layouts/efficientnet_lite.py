"""Layouts of EfficientNet-Lite: the one of efficientnet-lite-pytorch, and timm's."""

from finetune_jax.pretrained.layout import Layout

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
            # Blocks that do not expand name their convolutions otherwise.
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
