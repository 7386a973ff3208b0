"""What transformers, timm and torchvision read beside weights, and how they load them."""

from collections.abc import Callable, Sequence
from typing import Any

from finetune_jax.inference.export import text_encoders
from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.models import vit
from finetune_jax.weights.fields import ACTIVATIONS

# Of Pillow, as transformers writes them.
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_ALONE = """\
from safetensors.torch import load_file

weights = load_file("model.safetensors")"""
_OF_TEXTS = """\
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.{kind}.from_pretrained(".")
inputs = tokenizer(["A text."], padding=True, truncation=True, return_tensors="pt")
print(model(**inputs))"""
_OF_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
print(model.encode(["A text."]))  # Logits."""


def words_of(layout: str) -> list[str]:
    """Returns the words of a layout's name, among them those of libraries.

    >>> words_of("transformers' BERT")
    ['transformers', 'BERT']
    """
    return layout.replace("'", "").split()


def written(
    trained: Trained, layout: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns files by name, and a block of Python for each library that loads them.

    Args:
        trained: What is exported.
        layout: The name of the layout of its weights.
    """
    module, libraries = trained.task.models[""], words_of(layout)
    if text_encoders.is_encoder(trained):
        kind = text_encoders.architecture(trained, layout)
        if "transformers" not in libraries or kind is None:
            return {}, [_ALONE]
        config = text_encoders.model_config(trained, kind) | _labels(trained)
        block = _OF_SENTENCES if text_encoders.pools_by_mean(trained) else _OF_TEXTS
        return {"config.json": config}, [block.format(kind=kind)]
    if "transformers" in libraries:
        make = TRANSFORMERS.get(type(module).__name__)
        if make is None:
            return {}, [_ALONE]
        config = make(module, trained) | _labels(trained)
        files = {"config.json": config}
        if len(trained.spec.shape) == 3:
            files["preprocessor_config.json"] = _preprocessor(trained)
        kind = config["architectures"][0]
        code = (
            f'import transformers\n\nmodel = transformers.{kind}.from_pretrained(".")'
        )
        return files, [code]
    name, classes = trained.model["name"], _classes(trained)
    files, code = {}, []
    if "timm" in libraries and has("timm", module):
        files["config.json"] = _timm(trained)
        made = 'timm.create_model("local-dir:.", pretrained=True)'
        code.append(f"import timm\n\nmodel = {made}")
    if "torchvision" in libraries and has("torchvision", module):
        arguments = f"num_classes={classes}"
        if type(module).__name__ == "VisionTransformer":
            arguments += f", image_size={trained.spec.shape[0]}"
        made = f"torchvision.models.{_torchvision_name(name)}({arguments})"
        code.append(
            "import torchvision\nfrom safetensors.torch import load_file\n\n"
            f'model = {made}\nmodel.load_state_dict(load_file("model.safetensors"))'
        )
    return files, code or [_ALONE]


def _classes(trained: Trained) -> int:
    """Returns how many outputs there are; they may be more than there are names."""
    head = trained.variables["params"]["head"]
    return head["logits"]["bias"].shape[0]


def _names(trained: Trained) -> list[str]:
    names = [*(trained.spec.class_names or trained.spec.targets)]
    return names + [f"LABEL_{n}" for n in range(len(names), _classes(trained))]


def _labels(trained: Trained) -> dict[str, Any]:
    names = _names(trained)
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "num_labels": len(names),
        "problem_type": "regression"
        if trained.spec.targets
        else "single_label_classification",
        "dtype": str(trained.variables["params"]["head"]["logits"]["bias"].dtype),
    }


def _resnet(module: Any, trained: Trained) -> dict[str, Any]:
    shape = module.shape
    factor = 4 if shape.bottleneck else 1
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": trained.spec.shape[-1],
        "embedding_size": 64,
        "hidden_sizes": [64 * 2**stage * factor for stage in range(4)],
        "depths": list(shape.blocks),
        "layer_type": "bottleneck" if shape.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": shape.stride_in == "1x1",
    }


def _vit(module: Any, trained: Trained) -> dict[str, Any]:
    shape = module.shape
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "hidden_act": ACTIVATIONS[module.hidden_activation][0],
        "layer_norm_eps": module.epsilon,
        "image_size": list(trained.spec.shape[:2]),
        "patch_size": shape.patch,
        "num_channels": trained.spec.shape[-1],
        "qkv_bias": True,
    }


def _convnext(module: Any, trained: Trained) -> dict[str, Any]:
    shape = module.shape
    return {
        "architectures": ["ConvNextForImageClassification"],
        "model_type": "convnext",
        "num_channels": trained.spec.shape[-1],
        "num_stages": len(shape.blocks),
        "depths": list(shape.blocks),
        "hidden_sizes": list(shape.widths),
        "patch_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": module.epsilon,
        "layer_scale_init_value": module.layer_scale,
        "image_size": trained.spec.shape[0],
    }


# By the class of the module.
TRANSFORMERS: dict[str, Callable[[Any, Trained], dict[str, Any]]] = {
    "ResNet": _resnet,
    "VisionTransformer": _vit,
    "ConvNeXt": _convnext,
}


# Families that these libraries have by our names.
FAMILIES = ("ResNet", "EfficientNetLite", "VGG", "VisionTransformer", "ConvNeXt")


def has(library: str, module: Any) -> bool:
    """Returns whether a library has the model, so that it can take its weights.

    Epsilons, activations, heads and strides that a library has no argument for count, too.
    """
    family = type(module).__name__
    if library in ("torchvision", "timm") and not _computed_by(library, module):
        return False
    if family == "Bert":
        return library in ("transformers", "sentence-transformers")
    if library != "transformers":
        return family in FAMILIES
    # It has ResNets, but neither wide ones nor those of groups.
    plain = family != "ResNet" or (module.shape.groups, module.shape.group_width) == (
        1,
        64,
    )
    return family in TRANSFORMERS and plain


def _computed_by(library: str, module: Any) -> bool:
    """Returns whether torchvision or timm can compute the variant of a family."""
    family = type(module).__name__
    if family == "ResNet":
        return module.shape.stride_in == "3x3"
    if family == "ConvNeXt":
        return module.epsilon == 1e-6
    if family == "VisionTransformer":
        heads = {width: heads for width, _, heads in vit.SIZES.values()}
        plain = module.hidden_activation == "gelu"
        plain = plain and module.shape.heads == heads.get(module.shape.width)
        return module.epsilon == 1e-6 and (library == "timm" or plain)
    return True


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def _preprocessor(trained: Trained) -> dict[str, Any]:
    """Returns `preprocessor_config.json`, for a processor that can crop or stretch."""
    spec = trained.spec
    height, width, channels = spec.shape
    cut = {"height": height, "width": width}
    crops = spec.resize is not None
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": spec.resize} if crops else cut,
        "resample": _RESAMPLE[spec.interpolation],
        "do_center_crop": crops,
        "crop_size": cut,
        "do_rescale": spec.dtype == "uint8",
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(spec.mean, channels),
        "image_std": _per_channel(spec.std, channels),
        "do_convert_rgb": channels == 3,
    }


def _timm(trained: Trained) -> dict[str, Any]:
    spec, module = trained.spec, trained.task.models[""]
    config: dict[str, Any] = {
        "architecture": _timm_name(trained.model["name"], module),
        "num_classes": _classes(trained),
        "model_args": {"in_chans": spec.shape[-1], **_timm_arguments(trained)},
    }
    if len(spec.shape) == 3:
        height, width, channels = spec.shape
        config["pretrained_cfg"] = {
            "input_size": [channels, height, width],
            "interpolation": spec.interpolation,
            "crop_pct": height / spec.resize if spec.resize else 1.0,
            "crop_mode": "center" if spec.resize else "squash",
            "mean": _per_channel(spec.mean, channels),
            "std": _per_channel(spec.std, channels),
            "num_classes": _classes(trained),
            "label_names": _names(trained),
        }
    return config


def _timm_arguments(trained: Trained) -> dict[str, Any]:
    """Returns what of a model its name does not say there."""
    module: Any = trained.task.models[""]
    family = type(module).__name__
    if family == "ConvNeXt":
        return {"depths": list(module.shape.blocks), "dims": list(module.shape.widths)}
    if family == "EfficientNetLite":
        padding, epsilon = module.variant
        usual = epsilon == (1e-3 if padding == "same" else 1e-5)
        return {} if usual else {"bn_eps": epsilon}
    if family != "VisionTransformer":
        return {}
    shape, kind = module.shape, module.pool_kind
    found = {
        "img_size": list(trained.spec.shape[:2]),
        "patch_size": shape.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "class_token": module.class_token,
        "global_pool": "token" if kind == "token" else "avg",
    }
    if module.hidden_activation != "gelu":
        found["act_layer"] = module.hidden_activation
    return found | ({} if kind == "token" else {"fc_norm": kind == "mean_norm"})


# Those of Vision Transformers whose sizes it has a name for.
_TIMM_VITS = (
    "vit_tiny_patch16", "vit_small_patch16", "vit_small_patch32", "vit_base_patch16",
    "vit_base_patch32", "vit_large_patch14", "vit_large_patch16", "vit_large_patch32",
)  # fmt: skip


def _timm_name(name: str, module: Any = None) -> str:
    """Returns the name of a model in timm, or of one that becomes it by arguments.

    Args:
        name: Our name.
        module: The model; only its padding matters.

    >>> _timm_name("vit_tiny_patch14"), _timm_name("resnet18")
    ('vit_base_patch16_224', 'resnet18')
    """
    if name.startswith("vit_"):
        return f"{name if name in _TIMM_VITS else 'vit_base_patch16'}_224"
    padding = getattr(getattr(module, "variant", None), "padding", None)
    return f"tf_{name}" if padding == "same" else name


def _torchvision_name(name: str) -> str:
    """Returns what torchvision calls a model.

    >>> _torchvision_name("vit_base_patch16"), _torchvision_name("resnet18")
    ('vit_b_16', 'resnet18')
    """
    if not name.startswith("vit_"):
        return name
    _, size, patch = name.split("_")
    return f"vit_{size[0]}_{patch.removeprefix('patch')}"
