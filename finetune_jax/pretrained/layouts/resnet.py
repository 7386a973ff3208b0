"""Layouts of ResNets: those of torchvision and timm, which agree, and transformers'."""

from finetune_jax.pretrained.layout import Layout, Row


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
