"""`masks`: photos and their masks, which have a class for every pixel.

DIR/images/1.jpg, DIR/masks/1.png              cut into splits here
DIR/train/images/1.jpg, DIR/train/masks/1.png  with splits of its own: train, validation
                                               (or val, valid) and test
DIR/classes.csv                                a class a row, in the order of indices

Masks are PNG files of class indices, grey or with a palette, or of colours, where the
rows of classes.csv have them: `road,128,64,128`. Index 255 and a row `ignored` are of
pixels that count nowhere.
"""

import csv
import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from finetune_jax.data.images import SUFFIXES
from finetune_jax.data.labels import class_name, near_twins
from finetune_jax.data.masks import Colour, MaskFiles
from finetune_jax.data.source import Source
from finetune_jax.data.sources.folder import SPLITS, files_below
from finetune_jax.data.splits import stratified_order
from finetune_jax.data.threads import in_threads
from finetune_jax.errors import DataMissing, UserError, problems_error
from finetune_jax.masks import IGNORED

_IGNORED_NAME = "ignored"
_SHOWN = 50


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits of the folder `config.data.dir`.

    Raises:
        UserError: Lists images without masks, masks without images, files that are
            neither, and what is wrong with classes.csv.
    """
    del argument
    if directory is None:
        raise DataMissing("config.data.dir: masks needs the folder of images and masks")
    root = pathlib.Path(os.path.expanduser(directory))
    if not root.is_dir():
        raise DataMissing(f"config.data.dir: no folder {directory!r}")
    problems: list[str] = []
    classes, colours = _classes(root / "classes.csv", problems)
    pairs = {
        split: _pairs(path, problems)
        for split, path in _split_roots(root, problems).items()
    }
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    if problems:
        raise problems_error(f"config.data.dir: {directory} cannot be used:", problems)
    splits = {}
    for split, found in pairs.items():
        names = list(found)
        if split != "all":  # Which is put in such an order where it is cut.
            order = stratified_order(np.zeros(len(names)), seed=0)
            names = [names[index] for index in order]
        splits[split] = MaskFiles(
            images=tuple(found[name][0] for name in names),
            masks=tuple(found[name][1] for name in names),
            classes=len(classes),
            colours=colours,
        )
    return Source(
        name=f"masks {directory}",
        splits=splits,
        class_names=(),
        pixel_classes=classes,
        warnings=tuple(f"{root / 'classes.csv'}: {t}" for t in near_twins(classes)),
        fingerprint=lambda: _fingerprint(root, splits),
    )


def _classes(
    path: pathlib.Path, problems: list[str]
) -> tuple[tuple[str, ...], dict[Colour, int]]:
    """Returns the names of the classes, and the index of each colour."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append(
            f"{path}: not there; it names the classes, a row each, in the order of "
            "their indices"
        )
        return (), {}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return (), {}
    names: list[str] = []
    colours: dict[Colour, int] = {}
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        name, *values = (class_name(part) for part in row or [""])
        where = f"{path}, line {number}"
        if not any((name, *values)):
            continue
        if not name or name in names:
            problems.append(f"{where}: {name!r} " + ("twice" if name else "is no name"))
        index = IGNORED if name == _IGNORED_NAME else len(names)
        if name != _IGNORED_NAME:
            names.append(name)
        if not values:
            continue
        if len(values) != 3 or not all(v.isdecimal() and int(v) < 256 for v in values):
            problems.append(f"{where}: {row}; a name and three bytes are needed")
            continue
        colour = int(values[0]), int(values[1]), int(values[2])
        if colour in colours:
            problems.append(f"{where}: the colour {colour} twice")
        colours[colour] = index
    if not 2 <= len(names) <= IGNORED:
        problems.append(f"{path}: {len(names)} classes; 2 to {IGNORED} are needed")
    return tuple(names), colours


def _split_roots(root: pathlib.Path, problems: list[str]) -> dict[str, pathlib.Path]:
    """Returns the folder of each split; {'all': root} where there are none."""
    if (root / "images").is_dir():
        return {"all": root}
    found: dict[str, pathlib.Path] = {}
    for path in sorted(root.iterdir()):
        name = SPLITS.get(path.name.lower())
        if name is None or not path.is_dir():
            continue
        if name in found:
            problems.append(
                f"{path}: the same split as {found[name]}; have one of them"
            )
        found[name] = path
    if "train" not in found:
        problems.append(f"{root}: neither a folder images, nor train with one in it")
    return found


def _pairs(
    folder: pathlib.Path, problems: list[str]
) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Returns image and mask of each name, in the order of the names."""
    kinds = []
    for kind, suffixes in (("images", SUFFIXES), ("masks", frozenset((".png",)))):
        place, found = folder / kind, {}
        if not place.is_dir():
            problems.append(f"{place}: no such folder")
        for path in files_below(place, problems) if place.is_dir() else ():
            name = path.relative_to(place).with_suffix("").as_posix()
            if path.suffix.lower() not in suffixes:
                what = "an image file" if kind == "images" else "a PNG file"
                problems.append(f"{path}: not {what}; move it elsewhere, or save it so")
            elif name in found:
                problems.append(f"{path}: the same name as {found[name]}")
            found[name] = path
        kinds.append(found)
    images, masks = kinds
    if all(kind.is_dir() for kind in (folder / "images", folder / "masks")):
        problems += [f"{images[n]}: no mask" for n in sorted(images.keys() - masks)]
        problems += [f"{masks[n]}: no image" for n in sorted(masks.keys() - images)]
        if not images.keys() & masks:
            problems.append(f"{folder}: no image that has a mask")
    return {name: (images[name], masks[name]) for name in sorted(images.keys() & masks)}


def _digest_of(path: pathlib.Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _fingerprint(root: pathlib.Path, splits: Mapping[str, MaskFiles]) -> str:
    paths = [root / "classes.csv"]
    for part in splits.values():
        paths += [*part.images, *part.masks]
    paths = sorted(paths)
    lines = [
        f"{path.relative_to(root).as_posix()!a} {digest}"
        for path, digest in zip(paths, in_threads(_digest_of, paths))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
