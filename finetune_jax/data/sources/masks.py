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
import pathlib

import numpy as np

from finetune_jax.core.errors import first_of, raise_if
from finetune_jax.core.text_lines import lines_of
from finetune_jax.data.augmentation.masks import IGNORED
from finetune_jax.data.images.depth import depth_warnings
from finetune_jax.data.images.image_formats import image_suffixes, images_of
from finetune_jax.data.images.mask_files import Colour, MaskFiles
from finetune_jax.data.labels import class_name, near_twins
from finetune_jax.data.reading.files import (
    SPLITS,
    FileNotes,
    data_place,
    digest_of_files,
    files_below,
    visible,
)
from finetune_jax.data.source import Source
from finetune_jax.data.splits import stratified_order

MASKS = True
_IGNORED_NAME = "ignored"
_SHOWN = 50
_PNG = (".png", ".apng")
_NO_PLACE = "neither in images nor in masks"


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits of the folder `config.data.dir`.

    Raises:
        UserError: Lists images without masks, masks without images, masks that are no
            PNG files, and problems of classes.csv.
    """
    del argument
    root = data_place(directory, "masks needs the folder of images and masks")
    notes = FileNotes()
    classes, colours = _classes(root / "classes.csv", notes.problems)
    pairs = {
        split: _pairs(path, notes) for split, path in _split_roots(root, notes).items()
    }
    raise_if(
        first_of(notes.problems, _SHOWN),
        f"config.data.dir: {directory} cannot be used:",
        "\n".join(notes.lines("config.data.dir")),
    )
    splits = {}
    for split, found in pairs.items():
        if split != "all":  # 'all' is put in such an order where it is cut.
            order = stratified_order(np.zeros(len(found)), seed=0)
            found = [found[index] for index in order]
        splits[split] = MaskFiles(
            images=tuple(image for image, _ in found),
            masks=tuple(mask for _, mask in found),
            classes=len(classes),
            colours=colours,
        )
    images = [path for part in splits.values() for path in part.images]
    masks = [path for part in splits.values() for path in part.masks]
    table = root / "classes.csv"
    return Source(
        name=f"masks {directory}",
        splits=splits,
        class_names=(),
        pixel_classes=classes,
        fingerprint=lambda: digest_of_files(root, [table, *images, *masks]),
        warnings=(
            *(f"{table}: {text}" for text in near_twins(classes)),
            *depth_warnings(str(directory), images),
        ),
        not_used=notes.lines(str(directory)),
    )


def _classes(
    path: pathlib.Path, problems: list[str]
) -> tuple[tuple[str, ...], dict[Colour, int]]:
    """Returns the names of the classes, and the index of each colour."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
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
    for number, row in enumerate(csv.reader(lines_of(text, path)), start=1):
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


def _split_roots(root: pathlib.Path, notes: FileNotes) -> dict[str, pathlib.Path]:
    """Returns the folder of each split; {'all': root} where there are none."""
    if (root / "images").is_dir():
        return {"all": root}
    found: dict[str, pathlib.Path] = {}
    for path in visible(root, notes):
        name = SPLITS.get(path.name.lower())
        if name is None or not path.is_dir():
            if path.name != "classes.csv":
                _leave_out(path, notes)
            continue
        if name in found:
            notes.problems.append(
                f"{path}: the same split as {found[name]}; have one of them"
            )
        found[name] = path
    if "train" not in found:
        notes.problems.append(
            f"{root}: neither a folder images, nor train with one in it"
        )
    return found


def _leave_out(path: pathlib.Path, notes: FileNotes) -> None:
    """Notes that a file, or all files of a folder, are not used."""
    files = files_below(path, notes) if path.is_dir() else [path]
    for file in files:
        notes.add(file, _NO_PLACE)


def _named(place: pathlib.Path, notes: FileNotes) -> dict[str, pathlib.Path]:
    """Returns the images below a folder by their name without suffix."""
    found: dict[str, pathlib.Path] = {}
    if not place.is_dir():
        notes.problems.append(f"{place}: no such folder")
        return found
    for path in images_of(files_below(place, notes), notes):
        inner = path.relative_to(place)
        is_known = path.suffix.lower() in image_suffixes()
        name = (inner.with_suffix("") if is_known else inner).as_posix()
        if name in found:
            notes.problems.append(f"{path}: the same name as {found[name]}")
        found[name] = path
    return found


def _pairs(
    folder: pathlib.Path, notes: FileNotes
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Returns image and mask of each name, in the order of the names."""
    images, masks = (_named(folder / kind, notes) for kind in ("images", "masks"))
    problems = notes.problems
    problems += [
        f"{path}: not a PNG file; move it elsewhere, or save it so"
        for path in masks.values()
        if path.suffix.lower() in image_suffixes() - frozenset(_PNG)
    ]
    for path in visible(folder, notes):
        if path.name not in ("images", "masks", "classes.csv"):
            _leave_out(path, notes)
    if all(kind.is_dir() for kind in (folder / "images", folder / "masks")):
        problems += [f"{images[n]}: no mask" for n in sorted(images.keys() - masks)]
        problems += [f"{masks[n]}: no image" for n in sorted(masks.keys() - images)]
        if not images.keys() & masks:
            problems.append(f"{folder}: no image that has a mask")
    return [(images[name], masks[name]) for name in sorted(images.keys() & masks)]
