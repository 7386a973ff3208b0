"""Files that transformers and timm read beside weights, and code that loads them."""

from collections.abc import Sequence
from typing import Any

from finetune_jax.inference.export import text_encoders
from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.models import constructors
from finetune_jax.models.fully_convolutional import FullyConvolutional
from finetune_jax.weights.layout import Built, Layout, family_module

# Pillow's numbers, which transformers writes.
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_WEIGHTS_ALONE = """\
from safetensors.torch import load_file

weights = load_file("model.safetensors")"""
_TEXTS = """\
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.{kind}.from_pretrained(".")
inputs = tokenizer(["A text."], padding=True, truncation=True, return_tensors="pt")
print(model(**inputs))"""
_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
print(model.encode(["A text."]))  # Logits."""
_IMAGES = """\
import transformers

model = transformers.{kind}.from_pretrained(".")"""
_TIMM = """\
import timm

model = timm.create_model("local-dir:.", pretrained=True)"""
_TORCHVISION = """\
import torchvision
from safetensors.torch import load_file

model = torchvision.models.{name}({arguments})
model.load_state_dict(load_file("model.safetensors"))"""


# Functions of a family, which return None if the library cannot compute the model.
_MAKERS = {
    "transformers": "transformers_config",
    "timm": "timm_model",
    "torchvision": "torchvision_model",
}


def family_of(trained: Trained) -> Any:
    """Returns the module in `weights.layouts` of the model's family; None without one."""
    if isinstance(trained.task.models[""], FullyConvolutional):
        return None  # The model is another than its backbone.
    return family_module(constructors()[trained.model["name"]][0])


def computes(trained: Trained, layout: Layout) -> bool:
    """Returns whether a library of the layout computes the model.

    Epsilons, activations, heads and strides count, too, if the library has no argument for
    them. Layouts of other programs always fit.
    """
    named = [library for library in _MAKERS if library in layout.words]
    return not named or any(_made(trained, layout, library) for library in named)


def files_and_code(
    trained: Trained, layout: Layout
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns JSON files by name, and a block of Python for each library.

    Args:
        trained: The exported model.
        layout: Layout of its weights.
    """
    files, code = {}, []
    if config := _made(trained, layout, "transformers"):
        files, block = _transformers_files(trained, config)
        code.append(block)
    if made := _made(trained, layout, "timm"):
        files["config.json"] = _timm_config(trained, *made)
        code.append(_TIMM)
    if made := _made(trained, layout, "torchvision"):
        name, arguments = made
        arguments = {"num_classes": _classes(trained), **arguments}
        listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
        code.append(_TORCHVISION.format(name=name, arguments=listed))
    return files, code or [_WEIGHTS_ALONE]


def _made(trained: Trained, layout: Layout, library: str) -> Any:
    """Returns what the family writes for a library; None if the layout is another's."""
    make = getattr(family_of(trained), _MAKERS[library], None)
    if make is None or library not in layout.words:
        return None
    module, shape = trained.task.models[""], trained.spec.shape
    return make(Built(trained.model["name"], module, shape, layout))


def _transformers_files(
    trained: Trained, config: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Returns the files of transformers, and the code that loads them."""
    files, kind = {"config.json": config | _labels(trained)}, config["architectures"][0]
    if trained.tokenizer:
        means = text_encoders.pools_by_mean(trained)
        return files, (_SENTENCES if means else _TEXTS).format(kind=kind)
    if len(trained.spec.shape) == 3:
        files["preprocessor_config.json"] = _preprocessor(trained)
    return files, _IMAGES.format(kind=kind)


def _classes(trained: Trained) -> int:
    """Returns the number of outputs, which may exceed the number of class names."""
    head = trained.variables["params"]["head"]
    return head["logits"]["bias"].shape[0]


def _names(trained: Trained) -> list[str]:
    names = [*trained.spec.names]
    return names + [f"LABEL_{n}" for n in range(len(names), _classes(trained))]


def _labels(trained: Trained) -> dict[str, Any]:
    names = _names(trained)
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "num_labels": len(names),
        "problem_type": "regression"
        if trained.spec.labels == "numbers"
        else "single_label_classification",
        "dtype": str(trained.variables["params"]["head"]["logits"]["bias"].dtype),
    }


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def _preprocessor(trained: Trained) -> dict[str, Any]:
    """Returns `preprocessor_config.json` for transformers' BitImageProcessor."""
    spec = trained.spec
    height, width, channels = spec.shape
    cut = {"height": height, "width": width}
    crops = spec.inputs.resize is not None
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": spec.inputs.resize} if crops else cut,
        "resample": _RESAMPLE[spec.inputs.interpolation],
        "do_center_crop": crops,
        "crop_size": cut,
        "do_rescale": spec.dtype == "uint8",
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(spec.inputs.mean, channels),
        "image_std": _per_channel(spec.inputs.std, channels),
        "do_convert_rgb": channels == 3,
    }


def _timm_config(
    trained: Trained, name: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Returns `config.json` of timm."""
    spec = trained.spec
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": _classes(trained),
        "model_args": {"in_chans": spec.shape[-1], **arguments},
    }
    if len(spec.shape) == 3:
        height, width, channels = spec.shape
        config["pretrained_cfg"] = {
            "input_size": [channels, height, width],
            "interpolation": spec.inputs.interpolation,
            "crop_pct": height / spec.inputs.resize if spec.inputs.resize else 1.0,
            "crop_mode": "center" if spec.inputs.resize else "squash",
            "mean": _per_channel(spec.inputs.mean, channels),
            "std": _per_channel(spec.inputs.std, channels),
            "num_classes": _classes(trained),
            "label_names": _names(trained),
        }
    return config
