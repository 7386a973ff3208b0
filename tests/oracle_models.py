"""Other people's vision models with random numbers, and where their stages end."""

import dataclasses
import functools
import tempfile
from typing import Any

import oracles
import pytest

from finetune_jax.weights.addresses import read_weights

CLASSES = 10
DEPTHS = {
    "resnet18": [2, 2, 2, 2],
    "resnet34": [3, 4, 6, 3],
    "resnet50": [3, 4, 6, 3],
    "resnet101": [3, 4, 23, 3],
    "resnet152": [3, 8, 36, 3],
}
ENDS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2,) * 5, "vgg16": (2, 2, 3, 3, 3)}
ENDS["vgg19"] = (2, 2, 4, 4, 4)


@dataclasses.dataclass
class Oracle:
    """A module of torch.

    Attributes:
        module: In evaluation.
        stages: The submodule with whose output a stage of ours ends, by the stage.
        publishes: Whether a file is written for its names, as the library does.
    """

    module: Any
    stages: dict[str, str]
    publishes: bool = False

    def tensors(self):
        """Returns the tensors of its file, by their names there."""
        if self.publishes:
            with tempfile.TemporaryDirectory() as folder:
                self.module.save_pretrained(folder)
                return read_weights(f"file:{folder}/model.safetensors").tensors
        return {k: v.numpy() for k, v in self.module.state_dict().items()}

    def run(self, x_BxHxWxC):
        """Returns what the stages give, and the logits as 'head'."""
        import torch

        found, hooks = {}, []
        for stage, path in self.stages.items():

            def keep(module, given, output, stage=stage):
                found[stage] = output

            hooks.append(self.module.get_submodule(path).register_forward_hook(keep))
        with torch.no_grad():
            logits = self.module(torch.from_numpy(x_BxHxWxC).permute(0, 3, 1, 2))
        for hook in hooks:
            hook.remove()
        found["head"] = getattr(logits, "logits", logits)
        return {stage: _like_ours(output) for stage, output in found.items()}


def _like_ours(output):
    output = getattr(output, "last_hidden_state", output)
    output = output[0] if isinstance(output, tuple) else output
    return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()


def make(library, name, **arguments):
    """Returns the oracle of a model of ours by its name."""
    pytest.importorskip("torch")
    family = name.split("_")[0].rstrip("0123456789")
    found = FAMILIES[family](library, name, **arguments)
    found.module = randomised(found.module)
    return found


def randomised(module):
    """Returns a module in evaluation, every number of which is random and matters."""
    import torch

    rng = torch.Generator().manual_seed(0)
    for name, leaf in module.named_parameters():
        kind = name.split(".")[-1]
        is_norm = kind == "weight" and leaf.ndim == 1
        if is_norm or kind in ("layer_scale", "gamma", "layer_scale_parameter"):
            leaf.data.uniform_(0.5, 1.5, generator=rng)
        elif leaf.ndim == 1:
            leaf.data.normal_(0, 0.2, generator=rng)
        elif kind in ("weight", "in_proj_weight"):
            bound = (3 / leaf[0].numel()) ** 0.5
            gain = 2**0.5 if leaf.ndim == 4 else 1
            leaf.data.uniform_(-gain * bound, gain * bound, generator=rng)
        else:
            leaf.data.normal_(0, 0.5, generator=rng)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2, generator=rng)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=rng)
    return module.eval()


def _resnet(library, name, *, depths=None):
    of_stages = {f"stage{s}": f"layer{s}" for s in range(1, 5)}
    if library == "torchvision":
        models = oracles.import_torchvision().models
        make = getattr(models, name)
        if depths:
            make = functools.partial(
                models.ResNet, models.resnet.Bottleneck, list(depths)
            )
        made = make(num_classes=CLASSES)
        return Oracle(made, {"stem": "maxpool", **of_stages, "pool": "avgpool"})
    if library == "timm":
        made = oracles.import_timm().create_model(name, num_classes=CLASSES)
        return Oracle(made, {"stem": "maxpool", **of_stages, "pool": "global_pool"})
    transformers = oracles.import_transformers()
    kind = "basic" if name in ("resnet18", "resnet34") else "bottleneck"
    config = transformers.ResNetConfig(
        depths=DEPTHS[name],
        layer_type=kind,
        hidden_sizes=[n * (1 if kind == "basic" else 4) for n in (64, 128, 256, 512)],
        num_labels=CLASSES,
    )
    made = transformers.ResNetForImageClassification(config)
    there = {f"stage{s}": f"resnet.encoder.stages.{s - 1}" for s in range(1, 5)}
    return Oracle(made, {"stem": "resnet.embedder", **there, "pool": "resnet.pooler"})


def _efficientnet(library, name, *, depth=None, prefix="tf_"):
    assert library == "timm"
    made = oracles.import_timm().create_model(f"{prefix}{name}", num_classes=CLASSES)
    for blocks in made.blocks if depth else ():
        del blocks[depth:]
    there = {f"stage{s}": f"blocks.{s - 1}" for s in range(1, 8)}
    return Oracle(made, {"stem": "bn1", **there, "top": "bn2", "pool": "global_pool"})


def _vgg(library, name, *, dense, widths=(64, 128, 256, 512, 512)):
    import torch

    pairs = list(zip(ENDS[name.removesuffix("_bn")], widths))
    config = [part for count, width in pairs for part in (*[width] * count, "M")]
    bn = torch.nn.BatchNorm2d if name.endswith("_bn") else None
    if library == "torchvision":
        vgg = oracles.import_torchvision().models.vgg
        features = vgg.make_layers(config, batch_norm=bool(bn))
        with torch.device("meta"):  # What is replaced need not be made.
            made = vgg.VGG(torch.nn.Identity(), dropout=0.0, init_weights=False)
        made.features, layers = features, made.classifier
        layers[0] = torch.nn.Linear(widths[-1] * 49, dense)
        layers[3] = torch.nn.Linear(dense, dense)
        layers[6] = torch.nn.Linear(dense, CLASSES)
        ends = {"pool": "avgpool", "classifier": "classifier.5"}
    else:
        vgg = oracles.import_timm().models.vgg
        made = vgg.VGG(config, CLASSES, norm_layer=bn)
        made.pre_logits = vgg.ConvMlp(widths[-1], dense, 7, drop_rate=0.0)
        made.head = vgg.ClassifierHead(dense, CLASSES)
        ends = {"classifier": "pre_logits"}
    length = 3 if bn else 2
    index = [
        sum(count for count, _ in pairs[: s + 1]) * length + s
        for s in range(len(pairs))
    ]
    there = {f"stage{s + 1}": f"features.{i}" for s, i in enumerate(index)}
    return Oracle(made, there | ends)


def _vit(library, name, *, depth, image_size, **arguments):
    from finetune_jax.models.vit import SIZES

    _, size, patch = name.split("_")
    (width, _, heads), patch = SIZES[size], int(patch.removeprefix("patch"))
    heads = arguments.pop("num_heads", heads)
    if library == "timm":
        made = oracles.import_timm().models.vision_transformer.VisionTransformer(
            img_size=image_size, patch_size=patch, embed_dim=width, depth=depth,
            num_heads=heads, num_classes=CLASSES, weight_init="skip", **arguments,
        )  # fmt: skip
        blocks = {f"block{b + 1}": f"blocks.{b}" for b in range(depth)}
        norm = "fc_norm" if hasattr(made.fc_norm, "weight") else "norm"
        ends = {"pooled_norm" if norm == "fc_norm" else "norm": norm}
        return Oracle(made, {"stem": "norm_pre", **blocks, **ends})
    if library == "torchvision":
        models = oracles.import_torchvision().models
        made = models.vision_transformer.VisionTransformer(
            image_size, patch, depth, heads, width, 4 * width, num_classes=CLASSES
        )
        there = "encoder.layers.encoder_layer_"
        blocks = {f"block{b + 1}": f"{there}{b}" for b in range(depth)}
        return Oracle(made, {"stem": "encoder.dropout", **blocks, "norm": "encoder.ln"})
    transformers = oracles.import_transformers()
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, image_size=image_size, patch_size=patch,
        num_labels=CLASSES, **arguments,
    )  # fmt: skip
    made = transformers.ViTForImageClassification(config)
    blocks = {f"block{b + 1}": f"vit.layers.{b}" for b in range(depth)}
    there = {"stem": "vit.embeddings", **blocks, "norm": "vit.layernorm"}
    return Oracle(made, there, publishes=library == "transformers")


def _convnext(library, name, *, widths, depths):
    if library == "torchvision":
        models = oracles.import_torchvision().models.convnext
        pairs = zip(widths, (*widths[1:], None), depths)
        made = models.ConvNeXt(
            [models.CNBlockConfig(*three) for three in pairs], num_classes=CLASSES
        )
        there = {f"stage{s}": f"features.{2 * s - 1}" for s in range(1, 5)}
        return Oracle(made, {"stem": "features.0", **there, "norm": "classifier.0"})
    if library == "timm":
        made = oracles.import_timm().models.convnext.ConvNeXt(
            depths=depths, dims=widths, num_classes=CLASSES
        )
        there = {f"stage{s}": f"stages.{s - 1}" for s in range(1, 5)}
        return Oracle(made, {"stem": "stem", **there, "norm": "head.norm"})
    transformers = oracles.import_transformers()
    config = transformers.ConvNextConfig(
        depths=depths, hidden_sizes=widths, num_labels=CLASSES
    )
    made = transformers.ConvNextForImageClassification(config)
    there = {f"stage{s}": f"convnext.encoder.stages.{s - 1}" for s in range(1, 5)}
    there = {"stem": "convnext.embeddings", **there, "norm": "convnext.layernorm"}
    return Oracle(made, there, publishes=True)


FAMILIES = {
    "resnet": _resnet,
    "resnext": _resnet,
    "wide": _resnet,
    "efficientnet": _efficientnet,
    "vgg": _vgg,
    "vit": _vit,
    "convnext": _convnext,
}
