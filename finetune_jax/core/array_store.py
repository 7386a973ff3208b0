"""Tables of arrays on disk that runs share: whole, the right ones, or not there."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax.core.files import bytes_below, write_text
from finetune_jax.core.pytrees import nbytes

ABOUT = "about.json"
# A table that has been in the making for so long is not being made any more.
LEFTOVER_S = 24 * 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """A folder of tables, a folder each.

    Attributes:
        folder: Made when it is needed.
        limit: Bytes that they may take; the longest unused go first.
        memory: Bytes of one table that may be in memory; a larger one stays on disk.
        say: Tells a person.
        writes: Whether this process writes tables. Of several processes that see the same
            folder one does; all of them read.
        wait: Returns once all processes have called it, after a table is written.
    """

    folder: pathlib.Path
    limit: float
    memory: float
    say: Callable[[str], None]
    writes: bool = True
    wait: Callable[[], None] = lambda: None

    def place(self, key: str) -> pathlib.Path:
        """Returns where a table is, or would be."""
        return self.folder / key[:32]

    def nbytes(self) -> int:
        """Returns the number of bytes of all tables, those of other runs too."""
        return bytes_below(self.folder)

    def find(self, key: str, table: Any) -> list[np.ndarray] | None:
        """Returns the arrays of a table that is there and whole.

        Args:
            key: Key of the table.
            table: Its shapes.
        """
        place = self.place(key)
        try:
            wanted = json.loads((place / ABOUT).read_text())["sha256"]
            leaves = self._opened(place, table)
            if [sha256_of(leaf) for leaf in leaves] == wanted:
                with contextlib.suppress(OSError):  # It may be somebody else's.
                    os.utime(place / ABOUT)
                return leaves
            wrong = "it has changed since it was written"
        except (FileNotFoundError, NotADirectoryError) as error:
            if not os.path.exists(place):
                return None
            wrong = str(error)
        except OSError as error:
            self.say(f"{place} cannot be read: {error}")
            return None
        except Exception as error:  # Damage can raise any exception.
            wrong = str(error)
        self.say(f"{place} is damaged and made anew: {wrong}")
        if self.writes:
            discard(place)
        return None

    def _opened(self, place: pathlib.Path, table: Any) -> list[np.ndarray]:
        """Returns the arrays of a table, in memory, or mapped if they are too large."""
        leaves = []
        for index, leaf in enumerate(jax.tree.leaves(table)):
            file = place / f"{index}.bin"
            if file.stat().st_size != nbytes(leaf):
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes")
            if not nbytes(leaf) or nbytes(table) <= self.memory:
                flat = aligned_zeros((nbytes(leaf),), np.uint8)
                with file.open("rb") as opened:
                    opened.readinto(flat.data)
            else:
                flat = np.memmap(file, np.uint8, mode="r")
            leaves.append(flat.view(leaf.dtype).reshape(leaf.shape))
        return leaves

    def make(
        self,
        key: str,
        about: dict[str, Any],
        table: Any,
        rows: Iterator[list[np.ndarray]],
        what: str,
    ) -> list[np.ndarray] | None:
        """Returns the arrays of a new table, which is kept if that can be.

        Args:
            key: Key of the table.
            about: All that the table depends on.
            table: Its shapes.
            rows: Stretches of its arrays, in order.
            what: It is, for a person.
        """
        place, leaves = self.place(key), jax.tree.leaves(table)
        kept = [] if nbytes(table) <= self.memory else None

        def noted() -> Iterator[list[np.ndarray]]:
            for parts in rows:
                if kept is not None:
                    kept.append(parts)
                yield parts

        given = noted()
        if not self.writes:
            for _ in given:  # Computed with the process that writes them.
                pass
            self.wait()
            return self._kept_or_opened(kept, place, table)
        try:
            text = json.dumps(about, indent=2)
            self._make_room(nbytes(table) + len(text) + 100 * len(leaves))
            write_table(self.folder, len(leaves), given, lambda: (place, about))
        except OSError as error:
            self.say(f"{what} cannot be kept in {self.folder}: {error}")
            for _ in given:  # To the end, though nowhere but in memory.
                pass
            self.wait()
            if kept is None:
                return None
            if sum(len(parts[0]) for parts in kept) < len(leaves[0]):
                raise  # It was the examples that could not be read.
        else:
            self.say(f"{what}: computed once, {nbytes(table) / 1e6:,.1f} MB in {place}")
            self.wait()
        return self._kept_or_opened(kept, place, table)

    def _kept_or_opened(
        self, kept: list | None, place: pathlib.Path, table: Any
    ) -> list[np.ndarray] | None:
        """Returns the arrays of a new table, from memory if they fit into it.

        They are None if another process could not write them.
        """
        if kept is not None:
            return [concatenated(parts) for parts in zip(*kept)]
        try:
            return self._opened(place, table)
        except OSError:
            if self.writes:
                raise
            return None

    def _make_room(self, size: int) -> None:
        """Deletes the tables that were not used for longest, as the limit says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for place in self.folder.iterdir():
            try:
                if place.name.startswith("."):  # Of a run that may have been killed.
                    if time.time() - place.stat().st_mtime > LEFTOVER_S:
                        discard(place)
                    continue
                used = (place / ABOUT).stat().st_mtime
                taken = sum(file.stat().st_size for file in place.iterdir())
            except OSError:
                continue  # Another run was faster, or it is not ours.
            found.append((used, taken, place))
        total = size + sum(taken for _, taken, _ in found)
        for _, taken, place in sorted(found):
            if total <= self.limit:
                break
            discard(place)
            total -= taken


def write_table(
    folder: pathlib.Path,
    count: int,
    rows: Iterator[list[np.ndarray]],
    named: Callable[[], tuple[pathlib.Path, dict[str, Any]]],
) -> tuple[pathlib.Path, bool]:
    """Writes a table, which is there when it is whole.

    Returns where it is, and whether it was written here: another run may be faster.

    Args:
        folder: Folder of tables.
        count: Number of its arrays.
        rows: Stretches of the arrays.
        named: Called when they are written, says where in the folder the table is to be,
            and what it depends on.

    Raises:
        OSError: It cannot be written.
    """
    part = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        digesters = [hashlib.sha256() for _ in range(count)]
        with contextlib.ExitStack() as opened:
            files = [
                opened.enter_context((part / f"{index}.bin").open("wb"))
                for index in range(count)
            ]
            for parts in rows:
                for file, digester, array in zip(files, digesters, parts):
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    file.write(content.data)
                    digester.update(content.data)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        place, about = named()
        about = {**about, "sha256": [digester.hexdigest() for digester in digesters]}
        write_text(part / ABOUT, json.dumps(about, indent=2) + "\n")
        part.chmod(0o755)
        try:
            part.rename(place)
        except OSError:
            if (place / ABOUT).is_file():
                return place, False
            discard(place)
            part.rename(place)
        return place, True
    finally:
        shutil.rmtree(part, ignore_errors=True)


def discard(place: pathlib.Path) -> None:
    """Deletes a folder so that no half of it is ever found under its name."""
    with contextlib.suppress(OSError):
        part = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
        try:
            place.rename(part)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def sha256_of(array: np.ndarray) -> str:
    """Returns the digest of an array's bytes, read in stretches."""
    digester, flat = hashlib.sha256(), array.reshape(-1).view(np.uint8)
    for begin in range(0, flat.size, 2**26):
        digester.update(flat[begin : begin + 2**26].data)
    return digester.hexdigest()


# Bytes; XLA asks for it.
ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns an uninitialised array [*shape] that begins at a multiple of `ALIGNMENT`."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns zeros [*shape] that begin at a multiple of `ALIGNMENT`."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(make: Callable, shape: Sequence[int], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = make(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of arrays of one dtype, one after another."""
    count = sum(map(len, parts))
    found = aligned_zeros((count, *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=found)
