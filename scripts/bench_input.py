"""Claim: a folder of JPEGs becomes batches faster than with torch's DataLoader.

.venv/bin/python scripts/bench_input.py [--data=FOLDER] [--size=500x400] [--photos=1024]

Reads photos (shorter side to 256, the centre 224x224, 4 batches of 32) in turn with torch's
DataLoader and this project's `training_batches`, with nothing kept in memory, until each
batch is on the device as normalised float32. Prints photos a second, what all processes had
of the cores, which other work on the machine changes less, and ratios of the same round.

torch's DataLoader has two workers, which decode with Pillow and do what torchvision's
Resize, CenterCrop, ToTensor and Normalize do; 'torch, bytes' leaves out the last two, which
this project does on the device. The workers stay from turn to turn, and the first turn of
everything is not counted, so that no start-up is. Both make the same pixels, which is
checked. Needs torch. FOLDER has photos, a folder a class; without it, photos of a size are
made out of one that scikit-learn brings.
"""

import argparse
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

RESIZE, SIZE, BATCH, BATCHES = 256, 224, 32, 4
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


def make_photos(folder: pathlib.Path, width: int, height: int, count: int) -> None:
    """Writes photos, each a stretch of an endless mirrored one, in two classes."""
    from sklearn.datasets import load_sample_image

    photo, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    rows, columns = photo.shape[:2]
    wide = ((0, max(height - rows, 0)), (0, max(width - columns, 0)), (0, 0))
    photo = np.pad(photo, wide, mode="symmetric")
    for number in range(count):
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        moved = np.roll(photo, rng.integers(rows, size=2), (0, 1))[:height, :width]
        Image.fromarray(moved).save(place / f"{number}.jpg", quality=90)


class Photos:
    """What a DataLoader reads: photos as torchvision's transforms make them."""

    def __init__(self, paths: list[pathlib.Path], floats: bool):
        """Takes the files, and whether they become normalised numbers."""
        self.paths, self.floats = paths, floats

    def __len__(self) -> int:
        """Returns the number of photos."""
        return len(self.paths)

    def __getitem__(self, index: int):
        """Returns one photo, [3, H, W], and a label."""
        import torch  # type: ignore[import-not-found]

        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        width, height = image.size
        long = int(RESIZE * max(width, height) / min(width, height))
        size = (RESIZE, long) if width < height else (long, RESIZE)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - SIZE) / 2) for side in size)
        image = image.crop((left, top, left + SIZE, top + SIZE))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if self.floats:
            mean, std = (torch.from_numpy(v).view(3, 1, 1) for v in (MEAN, STD))
            x = x.to(torch.float32).div(255).sub_(mean).div_(std)
        return x, index % 2


def theirs(paths: list[pathlib.Path], floats: bool) -> Callable[[], object]:
    """Returns what makes the batches of a turn with torch's DataLoader."""
    from torch.utils.data import (  # type: ignore[import-not-found]
        DataLoader,
        RandomSampler,
    )

    photos: Any = Photos(paths, floats)
    loader: Any = DataLoader(
        photos, batch_size=BATCH, num_workers=2, persistent_workers=True,
        sampler=RandomSampler(photos, num_samples=BATCH * BATCHES),
    )  # fmt: skip
    return lambda: sum(len(x) for x, _ in loader)


def ours(folder: str, decode: str) -> tuple[Callable[[], object], Callable]:
    """Returns what makes the batches of a turn, and a reader of some photos."""
    import jax

    from finetune_jax import config as configs
    from finetune_jax.data.batches import training_batches
    from finetune_jax.data.dataset import make_data

    config = configs.default().data
    config.update(
        name="folder", dir=folder, train="all", image_size=SIZE, resize=RESIZE,
        decode=decode,
    )  # fmt: skip
    train = make_data(config, seed=0).train
    normalised = jax.jit(lambda x: (x / np.float32(255) - MEAN) / STD)

    turns = itertools.count()

    def turn() -> None:
        start = next(turns) * BATCHES
        for batch in training_batches(
            train, seed=0, batch_size=BATCH, micro_batches=1,
            updates=range(start, start + BATCHES),
        ):  # fmt: skip
            placed = jax.device_put(batch)
            jax.block_until_ready((normalised(placed["inputs"]), placed))

    def read(positions: np.ndarray):
        names = [pathlib.Path(train.name(int(place))) for place in positions]
        return names, train.take(positions)["inputs"]

    return turn, read


def core_seconds() -> float:
    """Returns what this process and its workers have had of the cores."""
    total = 0
    for number in (os.getpid(), *(c.pid for c in multiprocessing.active_children())):
        fields = pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2]
        total += sum(map(int, fields.split()[11:13]))  # In user mode and in the kernel.
    return total / os.sysconf("SC_CLK_TCK")


def measure(folder: str, rounds: int) -> None:
    """Runs all in turn and prints."""
    paths = sorted(pathlib.Path(folder).rglob("*.jp*g"))
    runs = {
        "torch": theirs(paths, floats=True),
        "torch, bytes": theirs(paths, floats=False),
    }
    for run in runs.values():  # Workers are forked before jax has threads.
        run()
    for decode in ("exact", "fast"):
        runs[f"ours, {decode}"], read = ours(folder, decode)
        names, found = read(np.arange(8))
        wanted = [np.moveaxis(x.numpy(), 0, -1) for x, _ in Photos(names, floats=False)]
        off = np.abs(found - np.array(wanted, np.int64)).mean()
        assert off == 0 or decode == "fast", "not the same pixels"
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    cores: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin, before = time.perf_counter(), core_seconds()
            run()
            if number:
                speeds[name].append(BATCH * BATCHES / (time.perf_counter() - begin))
                cores[name].append((core_seconds() - before) / BATCH / BATCHES)
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    print(f"{len(paths)} photos of {size:.0f} kB; fast decoding is {off:.2f} grey levels "
          f"off; {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    for name, found in speeds.items():
        line = f"{name:12} {statistics.median(found):6.1f} photos/s, "
        line += f"{1e3 * statistics.median(cores[name]):5.2f} ms of a core each"
        for base in ("torch", "torch, bytes") if name.startswith("ours") else ():
            ratios = sorted(a / b for a, b in zip(found, speeds[base]))
            line += f"; {statistics.median(ratios):.2f} of {base} ({ratios[0]:.2f} to "
            line += f"{ratios[-1]:.2f})"
        print(line, flush=True)


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--size", default="500x400", help="of photos that are made")
    parser.add_argument("--photos", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    if given.data:
        measure(given.data, given.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="bench_input-") as folder:
        width, height = map(int, given.size.split("x"))
        make_photos(pathlib.Path(folder), width, height, given.photos)
        print(f"{given.size}: ", end="")
        measure(folder, given.rounds)


if __name__ == "__main__":
    main()
