"""Folders of small images, made for tests."""

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def image(colour, seed=0, size=(24, 20)):
    """Returns bytes [H, W, 3] of one colour with noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-30, 30, (*size, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def make_folder(root, examples=10, splits=("",), suffix=".png", classes=COLOURS):
    """Writes images, a folder a class, below each split; returns the root."""
    seed = 0
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(examples):
                seed += 1
                size = (20 + number % 5, 24 - number % 3)
                picture = Image.fromarray(image(COLOURS[name], seed, size))
                picture.save(folder / f"{number}{suffix}", quality=95)
    return root


def write_arrays(path, size=28):
    """Writes grey images of two classes, in three splits; returns the file."""
    arrays = {}
    for seed, (split, count) in enumerate(
        {"train": 40, "validation": 10, "test": 10}.items()
    ):
        rng = np.random.default_rng(seed)
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, size, size), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 2
    np.savez(path, **arrays)
    return path
