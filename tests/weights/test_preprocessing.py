"""Preprocessing comes with weights, where the config does not say another."""

import json

import numpy as np
import oracles
import pytest
import small
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, read_image
from finetune_jax.weights.metadata.preprocessing import beside, with_weight_defaults

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCH = {"image_mean": list(MEAN), "image_std": list(STD)}
TIMM = {
    "architecture": "resnet18",
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic",
        "crop_mode": "center", "mean": list(MEAN), "std": list(STD),
    },
}  # fmt: skip
SAID = {
    "image_size": 224, "resize": 256, "interpolation": "bicubic", "mean": MEAN, "std": STD,
}  # fmt: skip
# What files of each publisher say, by their names.
FILES = [
    ("config.json", TIMM, SAID),
    ("config.json", TIMM["pretrained_cfg"], SAID),
    (
        "preprocessor_config.json",
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
         "do_center_crop": True, "resample": 3, **TORCH},
        SAID,
    ),
    (  # As ConvNeXts have it.
        "preprocessor_config.json",
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3, **TORCH},
        SAID,
    ),
    (  # As Vision Transformers have it.
        "preprocessor_config.json",
        {"size": 384, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"image_size": 384, "resize": None, "interpolation": "bilinear",
         "mean": (0.5,), "std": (0.5,)},
    ),
    (
        "preprocessor_config.json",
        {"do_resize": False, "do_normalize": False, "rescale_factor": 1 / 127.5},
        {"mean": (0.0,), "std": (0.5,)},
    ),
    ("config.json", {"model_type": "vit", "image_size": 224}, {}),
    ("config.json", [1], {}),
]  # fmt: skip


def weights(folder, name, values):
    (folder / name).write_text(json.dumps(values))
    return f"file:{folder}/model.safetensors"


@pytest.mark.parametrize("name, values, wanted", FILES)
def test_files_beside_weights_are_read(name, values, wanted, tmp_path):
    found, where = beside(weights(tmp_path, name, values))
    assert found.keys() == wanted.keys() and where == (name if wanted else None)
    for key, value in wanted.items():
        assert found[key] == (pytest.approx(value) if type(value) is tuple else value)


def given(address, **data):
    config = small.config(overrides=[("init.pretrained", address)])
    return config.replaced(data={"image_size": None, **data})


def test_the_weights_say_what_the_config_does_not(tmp_path):
    address = weights(tmp_path, "config.json", TIMM)
    config, lines = with_weight_defaults(given(address))
    assert {key: config.data[key] for key in SAID} == SAID
    (line,) = lines
    assert "resize=256" in line and line.endswith("as config.json says")
    again, lines = with_weight_defaults(config)
    assert not lines and not configs.differences(config, again)


def test_the_config_wins_and_conflicts_are_told(tmp_path):
    address = weights(tmp_path, "config.json", TIMM)
    own = {"mean": (0.5,), "image_size": 64, "std": (0.229, 0.224, 0.226)}
    config, lines = with_weight_defaults(given(address, **own))
    assert config.data.mean == (0.5,) and config.data.image_size == 64
    # A crop of the weights' size would not fit the config's.
    assert config.data.resize is None and config.data.interpolation == "bicubic"
    told = "\n".join(lines)
    assert "config.data.mean: (0.5,), but config.json says (0.485" in told
    assert "config.data.image_size: 64, but config.json says 224" in told
    assert "config.data.std" not in told
    grey, _ = with_weight_defaults(given(address, channels=1))
    assert grey.data.mean == pytest.approx((np.mean(MEAN),))


def test_without_weights_or_files_the_data_are_as_they_are(tmp_path):
    for address in (f"file:{tmp_path}/w.pth", "zoo:resnet20_fashion_mnist"):
        config, lines = with_weight_defaults(given(address))
        assert not lines and config.data.mean is None
        assert config.data.image_size is None
    spec = make_data(small.config().data, seed=0).spec.inputs
    assert (spec.mean, spec.std, spec.interpolation) == ((0.0,), (1.0,), "bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("name, values", [row[:2] for row in FILES[2:5]])
def test_images_become_what_processors_of_transformers_make(name, values, tmp_path):
    """To a grey level where these resize with torch."""
    transformers = oracles.import_transformers()
    kinds = {"crop_size": "Bit", "crop_pct": "ConvNext"}
    kind = next((k for key, k in kinds.items() if key in values), "ViT")
    values = values | {"image_processor_type": f"{kind}ImageProcessor"}
    address = weights(tmp_path, name, values)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    found, _ = beside(address)
    size = found["image_size"]
    geometry = Geometry(
        shape=(size, size, 3),
        resize=found["resize"],
        interpolation=found["interpolation"],
    )
    ours = (read_image(image, geometry) / 255 - found["mean"]) / found["std"]
    assert theirs.shape == (3, size, size)
    difference = np.abs(ours - theirs.transpose(1, 2, 0)) * found["std"] * 255
    assert difference.mean() < 0.5 and difference.max() < 4
