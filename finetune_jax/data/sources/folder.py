"""`folder`: photos in folders, a folder a class, in split folders or not.

DIR/daisy/1.jpg, DIR/rose/2.jpg            cut into splits here
DIR/train/daisy/1.jpg, DIR/test/rose/2.jpg with splits of its own: train, validation
                                           (or val, valid) and test
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from finetune_jax.core.errors import raise_if
from finetune_jax.data.images.decoding import Geometry, read_image
from finetune_jax.data.images.depth import depth_warnings
from finetune_jax.data.images.image_formats import images_of, why_no_image
from finetune_jax.data.labels import Classes, classes_of
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


class ImageFiles:
    """The photos of one split; read when asked for."""

    shape = None
    dtype = "uint8"

    def __init__(self, paths: Sequence[pathlib.Path], label: np.ndarray):
        """Takes the files and the class index of each."""
        self.paths, self.label = tuple(paths), label

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.paths)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns one photo, bytes [H, W, 1 or 3], fitted to a geometry if there is one."""
        return read_image(self.paths[index], geometry)

    def name(self, index: int) -> str:
        """Returns the path of one photo."""
        return str(self.paths[index])


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits of the folder `config.data.dir`.

    Raises:
        UserError: Lists folders without images, images outside of the folders of
            classes, and a lack of classes.
    """
    del argument
    root = data_place(directory, "folder needs the folder of the photos")
    notes = FileNotes()
    problems = notes.problems
    roots = _split_roots(root, notes)
    found = {split: _classes(path, notes) for split, path in roots.items()}
    counts: collections.Counter[str] = collections.Counter()
    for folders in found.values():
        counts.update({name: len(images) for name, images in folders.items()})
    classes = classes_of(counts, str(root), unit="images")
    if not counts:
        problems.append(f"{root}: no folders with images in them, one a class")
    else:
        problems += [
            f"{text}. Each class is a folder of its own" for text in classes.problems
        ]
    told = "\n".join(notes.lines("config.data.dir"))
    raise_if(problems, f"config.data.dir: {directory} cannot be used:", told)
    splits = {
        split: _image_files(folders, classes, mixed=split != "all")
        for split, folders in found.items()
    }
    paths = [path for part in splits.values() for path in part.paths]
    return Source(
        name=f"folder {directory}",
        splits=splits,
        class_names=classes.names,
        fingerprint=lambda: digest_of_files(root, paths),
        warnings=(*classes.warnings, *depth_warnings(str(directory), paths)),
        not_used=notes.lines(str(directory)),
    )


def _image_files(
    folders: Mapping[str, Sequence[pathlib.Path]], classes: Classes, *, mixed: bool
) -> ImageFiles:
    """Returns the images of a split.

    Args:
        folders: Images of each class.
        classes: All classes.
        mixed: Whether every stretch has all classes, instead of one class after the
            other; 'all' is put in such an order where it is cut.
    """
    names = sorted(folders, key=lambda name: (classes.index[name], name))
    paths = [path for name in names for path in folders[name]]
    label = classes.of(name for name in names for _ in folders[name])
    if mixed:
        order = stratified_order(label, seed=0)
        paths, label = [paths[i] for i in order], label[order]
    return ImageFiles(paths, label)


def _split_roots(root: pathlib.Path, notes: FileNotes) -> dict[str, pathlib.Path]:
    """Returns the folder of each split; {'all': root} where there are none."""
    inside = visible(root, notes)
    splits = [
        path
        for path in inside
        if path.name.lower() in SPLITS
        and path.is_dir()
        and any(inner.is_dir() for inner in visible(path, notes))
    ]
    if not splits:
        return {"all": root}
    found: dict[str, pathlib.Path] = {}
    for path in inside:
        if path in splits:
            name = SPLITS[path.name.lower()]
            if name in found:
                notes.problems.append(
                    f"{path}: the same split as {found[name]}; have one of them"
                )
            found[name] = path
        elif not path.is_dir() and (reason := why_no_image(path)):
            notes.add(path, reason)
        else:
            notes.problems.append(
                f"{path}: neither a split nor in one; beside train there may be "
                f"{', '.join(sorted(set(SPLITS) - {'train'}))}"
            )
    if "train" not in found:
        notes.problems.append(f"{root}: there are splits, but none is train")
    return found


def _classes(root: pathlib.Path, notes: FileNotes) -> dict[str, list[pathlib.Path]]:
    """Returns the images of each class folder, in an order that is always the same."""
    classes = {}
    for folder in visible(root, notes):
        if not folder.is_dir():
            if reason := why_no_image(folder):
                notes.add(folder, reason)
            else:
                notes.problems.append(f"{folder}: not in the folder of a class")
            continue
        files = files_below(folder, notes)
        images = images_of(files, notes)
        if images:
            classes[folder.name] = images
        else:
            others = f", but {len(files)} other files" if files else ""
            notes.problems.append(f"{folder}: no images in it{others}")
    return classes
