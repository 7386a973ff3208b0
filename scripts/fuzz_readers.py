"""Feeds damaged files to every reader: nothing but the project's own errors may come.

.venv/bin/python scripts/fuzz_readers.py [--inputs=100000] [--seed=0]

Starts from valid files of each format, and from the pickles, headers and arrays inside
archives, which a damaged archive would hide: bytes and bits are changed, stretches are cut
out, doubled, moved, and put in from other files, numbers become extreme. A reader may
return something or raise `UserError`; another exception, more memory than the limit, or
more than ten seconds for one file is a finding, which is written to a file. The exit status
is 1 if there is one. No code from a file may run: a folder that one of them would make is
looked for at the end.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable

import numpy as np
import safetensors.numpy
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import torch_files  # type: ignore[import-not-found]

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.images.decoding import Geometry, read_image
from finetune_jax.data.sources import arrays, idx
from finetune_jax.weights.formats.readers import FORMATS

MEMORY = 4 * 2**30
TENSORS = {
    "stem/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "head/bias": np.arange(5, dtype=np.float32),
    "steps": np.array([3], np.int64),
}
EXTREME = [
    struct.pack(kind, value)
    for kind, values in {
        "<B": (0, 1, 127, 128, 255),
        "<H": (0, 0x7FFF, 0xFFFF),
        "<I": (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
        ">I": (1, 0x7FFFFFFF, 0xFFFFFFFF),
        "<Q": (0, 1 << 40, (1 << 63) - 1, (1 << 64) - 1),
    }.items()
    for value in values
] + [b"-1", b"99999999999999999999", b"1e999", b"NaN", b"../../", b"\x00", b"\n", b"{}"]


def npz(tensors: dict[str, np.ndarray]) -> bytes:
    """Returns an .npz file."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **tensors)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """Returns an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def picture(kind: str) -> bytes:
    """Returns a small picture in a format of Pillow's."""
    file = io.BytesIO()
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def idx_file() -> bytes:
    """Returns an IDX file of 4 images."""
    return struct.pack(">HBBIII", 0, 8, 3, 4, 3, 3) + bytes(range(36))


def archived(content: bytes) -> bytes:
    """Returns an .npz file whose array has this content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weight.npy", content)
    return file.getvalue()


def with_pickle(content: bytes) -> bytes:
    """Returns a torch archive with this pickle."""
    values = list(TENSORS.values()) * 2
    return torch_files.zipped(content, values)


def reader_of_file(function: Callable) -> Callable[[bytes], object]:
    """Returns a reader of bytes from one of a path."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    place = pathlib.Path(tempfile.mkdtemp(dir=memory)) / "file.npz"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return function(place)

    return read


def both_ways(place: pathlib.Path) -> object:
    """Returns a picture, which is read at reduced scale too."""
    read_image(place, Geometry(shape=(4, 4, 3), resize=5, decode="fast"))
    return read_image(place)


def targets() -> dict[str, tuple[list[bytes], Callable[[bytes], object]]]:
    """Returns seeds and a reader of bytes for each kind of file."""
    stored = {"x": np.zeros((4, 3), np.float32), "y": np.arange(4)}
    whole = torch_files.write_zip(TENSORS)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickles = [archive.read("archive/data.pkl")]
    with zipfile.ZipFile(io.BytesIO(torch_files.with_code())) as archive:
        pickles.append(archive.read("archive/data.pkl"))
    checkpoint = torch_files.with_objects(TENSORS)
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        pickles.append(archive.read("archive/data.pkl"))
    text = configs.to_json(configs.resolve(configs.default())[0]).encode()
    pth, npz_of = FORMATS[".pth"], FORMATS[".npz"]
    return {
        "safetensors": (
            [safetensors.numpy.save(TENSORS)],
            lambda data: FORMATS[".safetensors"](data, "f"),
        ),
        "npz": ([npz(TENSORS)], lambda data: npz_of(data, "f")),
        "array in an npz": (
            [npy(value) for value in TENSORS.values()],
            lambda data: npz_of(archived(data), "f"),
        ),
        "pth": (
            [whole, checkpoint, torch_files.with_code()],
            lambda data: pth(data, "f"),
        ),
        "pickle in a pth": (pickles, lambda data: pth(with_pickle(data), "f")),
        "pth before 1.6": (
            [torch_files.write_legacy(TENSORS)],
            lambda data: pth(data, "f"),
        ),
        "npz of data": (
            [npz(stored)],
            reader_of_file(lambda place: arrays.load(str(place))),
        ),
        "idx": ([idx_file()], reader_of_file(idx.read_idx)),
        "pictures": (
            [picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")],
            reader_of_file(both_ways),
        ),
        "config.json": (
            [text],
            lambda data: configs.from_json(data.decode("utf-8", "replace"), "f"),
        ),
    }


def damaged(draw: random.Random, seeds: list[bytes]) -> bytes:
    """Returns a seed after one to eight changes."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(data) + 1)
        size = min(draw.choice((1, 1, 2, 4, 16, 64)), len(data) - at)
        change = draw.randrange(8)
        if change == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[at : at + size] = draw.randbytes(size)
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = data[at : at + size] * draw.randint(1, 3)
        elif change == 4:
            value = draw.choice(EXTREME)
            data[at : at + len(value)] = value
        elif change == 5:
            data[at:at] = draw.choice(EXTREME)
        elif change == 6:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + draw.choice((4, 32, 256))]
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)


def main() -> None:
    """Runs all inputs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    here = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_readers-"))
    os.chdir(here)
    kinds, findings = targets(), 0
    share = -(-given.inputs // len(kinds))
    print("| file | inputs | read | refused | findings | slowest (ms) |")
    print("|---|---|---|---|---|---|")
    for kind, (seeds, read) in kinds.items():
        draw, counts = random.Random(f"{given.seed} {kind}"), collections.Counter()
        slowest = 0.0
        for number in range(share):
            data = damaged(draw, seeds)
            begin, found = time.perf_counter(), None
            try:
                read(data)
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1
            except Exception as error:
                found = error
            seconds = time.perf_counter() - begin
            if seconds > 10:
                found = found or TimeoutError(f"{seconds:.0f} s")
            if found is not None:
                counts["findings"] += 1
                place = here / f"{kind.replace(' ', '_')}-{number}"
                place.write_bytes(data)
                print(
                    json.dumps([kind, repr(found)[:200], str(place)]), file=sys.stderr
                )
            slowest = max(slowest, seconds)
        findings += counts["findings"]
        print(f"| {kind} | {share} | {counts['read']} | {counts['refused']} | "
              f"{counts['findings']} | {1e3 * slowest:.0f} |", flush=True)  # fmt: skip
    ran = [path for path in here.iterdir() if path.is_dir()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{share * len(kinds)} inputs, {findings} findings, code was "
          f"{'RUN' if ran else 'never run'}, at most {peak:.0f} MB")  # fmt: skip
    sys.exit(bool(findings or ran))


if __name__ == "__main__":
    main()
