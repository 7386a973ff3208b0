"""Layouts of ResNets: those of torchvision and timm, which agree, and transformers'."""

from finetune_jax.pretrained.layout import Layout

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
    Layout(
        name="transformers",
        rows=(
            ("stem/conv", "resnet.embedder.embedder.convolution"),
            ("stem/bn", "resnet.embedder.embedder.normalization"),
            (
                "stage{s}/block{b}/conv{k}",
                "resnet.encoder.stages.{s-1}.layers.{b-1}.layer.{k-1}.convolution",
            ),
            (
                "stage{s}/block{b}/bn{k}",
                "resnet.encoder.stages.{s-1}.layers.{b-1}.layer.{k-1}.normalization",
            ),
            (
                "stage{s}/block{b}/shortcut_conv",
                "resnet.encoder.stages.{s-1}.layers.{b-1}.shortcut.convolution",
            ),
            (
                "stage{s}/block{b}/shortcut_bn",
                "resnet.encoder.stages.{s-1}.layers.{b-1}.shortcut.normalization",
            ),
            ("head/logits", "classifier.1"),
        ),
    ),
)
