"""Preprocessing of images that weights were trained with, from files beside them.

transformers has `preprocessor_config.json`; timm has `pretrained_cfg` in `config.json`, or
only its keys; an export of this project has `model.json`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.weights.fields import loads
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.files import read_beside

# Pillow's numbers, which transformers writes.
_RESAMPLED = {2: "bilinear", 3: "bicubic"}
# Keys that are taken together: an image size and a crop of different sources do not fit.
_GEOMETRY = ("image_size", "resize")
# Keys of `config.data` that the files may set.
KEYS = (*_GEOMETRY, "interpolation", "mean", "std")
# ConvNeXts of transformers crop below this size and stretch from it on.
_STRETCHED_FROM = 384


def with_weight_defaults(
    config: Config, keys: Collection[str] = KEYS
) -> tuple[Config, list[str]]:
    """Returns the config with the preprocessing and the network of its weights.

    In `config.data` given values stay, and a line reports differences. `config.model` must
    agree with the weights. If the files say nothing, the same config is returned.

    Args:
        config: Resolved config; None in `data` stands for values that are not given.
        keys: Keys of `config.data` that the kind of the data takes from such files.

    Returns:
        The config, and lines about values that were filled in.

    Raises:
        UserError: `config.model` is another network than that of the weights.
    """
    config, lines = architecture.with_variants(config)
    config, more = _with_preprocessing(config, keys)
    return config, [*lines, *more]


def _with_preprocessing(
    config: Config, keys: Collection[str]
) -> tuple[Config, list[str]]:
    found, where = {}, None
    if config.init.pretrained is not None:
        found, where = beside(config.init.pretrained)
    found = {key: value for key, value in found.items() if key in keys}
    if not found:
        return config, []
    lines, taken = [], {}
    if config.data.channels == 1:
        found |= {k: _mean(found[k]) for k in ("mean", "std") if k in found}
    for key, value in found.items():
        given = config.data[key]
        is_given = given is not None
        if key in _GEOMETRY:
            is_given = any(config.data[one] is not None for one in _GEOMETRY)
        if not is_given:
            taken[key] = value
        elif not _same(given, value):
            lines.append(
                f"config.data.{key}: {given!r}, but {where} says {value!r}, with which "
                "the weights were trained"
            )
    if taken:
        told = ", ".join(f"{key}={value!r}" for key, value in taken.items())
        lines.insert(0, f"config.data: {told}, as {where} says")
    return config.replaced(data=taken) if taken else config, lines


def beside(address: str) -> tuple[dict[str, Any], str | None]:
    """Returns keys of `config.data` for weights, and the name of the file that has them.

    The keys are 'image_size', 'resize' (None stretches), 'interpolation', 'mean' and
    'std', without those that are unknown or that `config.data` cannot express.
    """
    for name, read in READERS.items():
        try:
            text = read_beside(address, name)
            values = loads(text) if text is not None else None
        except (UserError, ValueError):  # Not in the repository, or not JSON.
            continue
        if not isinstance(values, dict):
            continue
        try:
            found = read(values)
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
            continue
        if found:
            return found, name
    return {}, None


def _transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    size, cut = _sides(values.get("size")), _sides(values.get("crop_size"))
    crop_share = values.get("crop_pct")
    if values.get("do_resize", True) and size is not None:
        shortest, exact = size
        if crop_share and shortest and shortest < _STRETCHED_FROM:
            found = {"image_size": shortest, "resize": int(shortest / crop_share)}
        elif crop_share and shortest:
            found = {"image_size": shortest, "resize": None}
        elif values.get("do_center_crop") and shortest and cut and cut[1]:
            found = {"image_size": cut[1], "resize": shortest}
        elif exact and not values.get("do_center_crop"):
            found = {"image_size": exact, "resize": None}
    if values.get("resample") in _RESAMPLED:
        found["interpolation"] = _RESAMPLED[values["resample"]]
    normalises = values.get("do_normalize", True)
    mean = values.get("image_mean") if normalises else (0.0,)
    std = values.get("image_std") if normalises else (1.0,)
    if mean is not None and std is not None:
        # transformers scales bytes by any factor, we by 1/255.
        scale = 255 * values.get("rescale_factor", 1 / 255)
        if not values.get("do_rescale", True):
            scale = 255
        found |= {"mean": _scaled(mean, scale), "std": _scaled(std, scale)}
    return found


def _sides(size: Any) -> tuple[int | None, int | None] | None:
    """Returns the length of the shortest side, and of both sides if they are equal.

    >>> _sides({"shortest_edge": 256}), _sides({"height": 8, "width": 8}), _sides(9)
    ((256, None), (None, 8), (9, 9))
    """
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping):
        return None
    height = size.get("height")
    return size.get("shortest_edge"), height if height == size.get("width") else None


def _timm(values: Mapping[str, Any]) -> dict[str, Any]:
    values = values.get("pretrained_cfg") or values
    found: dict[str, Any] = {}
    _, height, width = values.get("input_size") or (None, None, None)
    share = values.get("crop_pct")
    if height and height == width:
        crops = share and values.get("crop_mode", "center") == "center"
        # Source: timm/data/transforms_factory.py, `transforms_imagenet_eval`.
        resize = math.floor(height / share) if crops else None
        found = {"image_size": height, "resize": resize}
    if values.get("interpolation") in _RESAMPLED.values():
        found["interpolation"] = values["interpolation"]
    for key in ("mean", "std"):
        if values.get(key):
            found[key] = _scaled(values[key], 1.0)
    return found


def _ours(values: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("data"), Mapping):  # Written by convert_weights.py.
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values["data"].items()
            if key in ("image_size", "resize", "interpolation", "mean", "std")
        }
    looks, (height, width, _) = values["preprocessing"], values["inputs"]["shape"]
    found = {key: looks[key] for key in ("interpolation", "resize")}
    found |= {key: _scaled(looks[key], 1.0) for key in ("mean", "std")}
    return found | {"image_size": height} if height == width else found


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "preprocessor_config.json": _transformers,
    "config.json": _timm,
    "model.json": _ours,
}


def _scaled(values: Any, scale: float) -> tuple[float, ...]:
    """Returns numbers in units of bytes / 255."""
    values = [values] if isinstance(values, int | float) else values
    found = tuple(float(value) / scale for value in values)
    return found[:1] if len(set(found)) == 1 else found


def _mean(values: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(values) / len(values),)


def _same(ours: Any, theirs: Any) -> bool:
    """Returns whether two values are equal up to rounding."""
    if not isinstance(ours, tuple) or not isinstance(theirs, tuple):
        return ours == theirs
    longest = max(len(ours), len(theirs))
    pairs = [(v * longest)[:longest] if len(v) == 1 else v for v in (ours, theirs)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(abs(a - b) < 5e-3 for a, b in zip(*pairs))
