"""New inputs of a finished run that are arrays, and image files where it takes them."""

import dataclasses
import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import printable, user_path
from finetune_jax.data.dataset import Dataset, unlabelled
from finetune_jax.data.images.array_files import read_arrays
from finetune_jax.data.kind import FileRule
from finetune_jax.data.reading.threads import attempts, check_readable
from finetune_jax.data.source import infinity_problem
from finetune_jax.data.spec import DataSpec

SUFFIXES = (".npy", ".npz")
# Files that are decoded before the model sees the first of them.
CHUNK = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Image files and images of Pillow as inputs.

    Attributes:
        types: Types of Python objects that are such inputs.
        read: Returns the readable ones as a dataset, None if there are none, and the
            error of each input.
        check: Raises or warns about doubtful objects, given their positions and them.
    """

    types: tuple[type, ...]
    read: Callable[[Sequence[Any]], tuple[Dataset | None, list[UserError | None]]]
    check: Callable[[Sequence[int], Sequence[Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayReader:
    """Reader of arrays, and of images where `images` is given.

    Attributes:
        spec: Description of the run's data.
        files: Files that can be read.
        check: Returns arrays [N, ...] as the model takes them, given their name for
            messages and whether a single input was given.
        images: Image files as inputs; None takes arrays only.
    """

    spec: DataSpec
    files: FileRule
    check: Callable[[np.ndarray, str, bool], np.ndarray]
    images: ImageInputs | None = None

    def read(
        self, paths: Sequence[pathlib.Path], errors: list[UserError | None]
    ) -> Iterator[tuple[list[str], Dataset]]:
        """Yields the names of inputs and the inputs; arrays come first."""
        for path in filter(is_array, paths):
            with warnings.catch_warnings(record=True) as doubts:
                warnings.simplefilter("always", UserWarning)
                (array, error), *_ = attempts(self.read_file, [path])
            for doubt in doubts:
                print(f"warning: {printable(str(doubt.message))}")
            errors.append(error)
            if error is None:
                names = [f"{path}#{row}" for row in range(len(array))]
                yield names, unlabelled(array, self.spec)
        files = itertools.filterfalse(is_array, paths)
        while chunk := list(itertools.islice(files, CHUNK)):
            assert self.images is not None
            dataset, found = self.images.read(chunk)
            errors += found
            if dataset is not None:
                good = [str(path) for path, error in zip(chunk, found) if error is None]
                yield good, dataset

    def read_file(self, path: pathlib.Path) -> np.ndarray:
        """Returns the inputs [N, ...] of an `.npy` file, or `x` of an `.npz` file.

        Raises:
            UserError: Names the file and its problem.
        """
        arrays = read_arrays(path, "x")
        array = arrays.get("", arrays.get("x"))
        if array is None:
            raise UserError(
                f"{path}: no array 'x' in it, but {', '.join(arrays) or 'nothing'}; save "
                "the inputs as x: np.savez('inputs.npz', x=x)"
            )
        return self.check(array, str(path), False)

    def convert(self, given: Any) -> tuple[bool, list[tuple[Sequence[int], Dataset]]]:
        """Returns whether `given` is a single input, and inputs with their positions."""
        if isinstance(given, np.ndarray):
            alone, dataset = self._array(given)
            return alone, [(range(len(dataset)), dataset)]
        if isinstance(given, Sequence) and not isinstance(given, str | bytes):
            return False, self._listed(given)
        return True, self._listed([given])

    def _array(self, array: np.ndarray) -> tuple[bool, Dataset]:
        axes = len(self.spec.shape)
        if axes == 3 and array.ndim == 2:
            array = array[..., None]
        if array.ndim not in (axes, axes + 1):
            raise UserError(
                f"an array {array.shape}, but the model takes {self.spec.shape} each"
            )
        alone = array.ndim == axes
        many = self.check(array[None] if alone else array, "an array", alone)
        return alone, unlabelled(many, self.spec)

    def _listed(self, given: Sequence[Any]) -> list[tuple[Sequence[int], Dataset]]:
        types = (np.ndarray, *(self.images.types if self.images else ()))
        problems = [
            f"input {place}: {shown(item)}"
            for place, item in enumerate(given)
            if not isinstance(item, types)
        ]
        takes = "paths, Pillow's images or arrays" if self.images else "arrays"
        raise_if(problems, f"The model takes {takes}, but there are:")
        groups: list[tuple[Sequence[int], Dataset]] = []
        files = [n for n, item in enumerate(given) if not isinstance(item, np.ndarray)]
        if files and self.images:
            found = [given[place] for place in files]
            found = [user_path(one) if isinstance(one, str) else one for one in found]
            self.images.check(files, found)
            dataset, errors = self.images.read(found)
            check_readable(errors, "Leave them out.")
            assert dataset is not None
            groups.append((files, dataset))
        for place in sorted(set(range(len(given))) - set(files)):
            alone, dataset = self._array(given[place])
            if not alone:
                raise UserError(
                    f"input {place}: {given[place].shape}, which are several"
                )
            groups.append(([place], dataset))
        return groups


def is_array(path: pathlib.Path) -> bool:
    """Returns whether a file has the suffix of a file of arrays."""
    return path.suffix.lower() in SUFFIXES


def shown(item: Any) -> str:
    """Returns a Python object and its type, in short, for messages."""
    return f"{item!r:.60} ({type(item).__name__})"


def check_numbers(array: np.ndarray, spec: DataSpec, name: str, fits: bool) -> None:
    """Checks that an array holds inputs of the model's shape, finite numbers.

    Args:
        array: Inputs [N, ...].
        spec: Description of the run's data.
        name: Name of the array, for messages.
        fits: Whether the shape is one that the model takes.

    Raises:
        UserError: The model does not take them.
    """
    if not array.size or not fits:
        raise UserError(f"{name}: {array.shape}, but the model takes {spec.shape} each")
    if array.dtype.kind not in "uifb":
        raise UserError(f"{name}: {array.dtype}, but the model takes {spec.dtype}")
    if problem := infinity_problem(array):
        raise UserError(f"{name}: {problem}")


def check_dtype(array: np.ndarray, spec: DataSpec, name: str) -> np.ndarray:
    """Returns the array.

    Raises:
        UserError: The model takes inputs of another dtype.
    """
    if array.dtype != np.dtype(spec.dtype):
        raise UserError(f"{name}: {array.dtype}, but the model takes {spec.dtype}")
    return array
