"""Scores of every example of the held-out split, in `predictions.npz` of a run.

Two runs on the same examples are compared by them, example by example. The arrays are

    SPLIT/id                an identifier of each example, uint64
    SPLIT/METRIC            the score of each example; their mean is the metric
    SPLIT/predicted         the predicted class, if classes are predicted

and with several domains SPLIT/DOMAIN/id and so on. They are those of the best state. The
split is the test split, or the validation split if there is no other.
"""

import hashlib
import pathlib
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_jax.core.files import write_bytes

if TYPE_CHECKING:  # Comparisons read the file without jax.
    from finetune_jax.data.dataset import Dataset
    from finetune_jax.evaluation.evaluator import Evaluator, Place
    from finetune_jax.tasks.task import Task

FILE = "predictions.npz"
ID, PREDICTED = "id", "predicted"


def recorded_split(held_out: Mapping[str, object]) -> str | None:
    """Returns the split whose scores are recorded; None without held-out examples."""
    return next((name for name in ("test", "validation") if name in held_out), None)


class Recorder:
    """Collects the scores of one state, while it is measured.

    Attributes:
        arrays: Arrays of the file, by name.
        outputs: Split, or its part of one domain, that was measured last with the weights
            that predictions are made with, and its outputs.
    """

    def __init__(self, split: str | None, *, chosen_ema: bool):
        """Takes the split to record, and whether predictions use averaged weights."""
        self._split = split
        self._chosen_ema = chosen_ema
        self.arrays: dict[str, np.ndarray] = {}
        self.outputs: tuple[Dataset, dict[str, np.ndarray]] | None = None

    def __call__(
        self,
        place: "Place",
        dataset: "Dataset",
        task: "Task",
        outputs: dict[str, np.ndarray],
    ) -> None:
        """Takes the outputs of a split."""
        if place.split != self._split:
            return
        if place.ema == self._chosen_ema:
            self.outputs = dataset, outputs
        kept = dataset.kept()
        found = task.example_scores(outputs, kept.on_host())
        if not found.scores:
            return
        name = place.name(ID, of_state=False)
        if name not in self.arrays:
            self.arrays[name] = example_ids(kept, found.first)
        for metric, score_N in found.scores.items():
            self.arrays[place.name(metric)] = compact(score_N)
        if found.predicted is not None:
            self.arrays[place.name(PREDICTED)] = compact(found.predicted)


def recorder_of(evaluator: "Evaluator", held_out: Mapping[str, object]) -> Recorder:
    """Returns the recorder of a state that an evaluator measures on held-out splits."""
    return Recorder(recorded_split(held_out), chosen_ema=evaluator.chosen_ema)


def example_ids(dataset: "Dataset", first: np.ndarray | None = None) -> np.ndarray:
    """Returns an identifier of each example: a hash of its name and its label.

    It does not depend on the other examples, except that examples of one name and label
    are counted.

    Args:
        dataset: The examples.
        first: Positions of the rows that stand for an example; None takes all.
    """
    positions = np.arange(len(dataset)) if first is None else first
    seen: dict[bytes, int] = {}
    found = np.zeros(len(positions), np.uint64)
    for row, name in enumerate(dataset.names(positions)):
        label = dataset.label[positions[row]].tobytes()
        text = name.encode("utf-8", "surrogateescape") + b"\0" + label
        count = seen[text] = seen.get(text, -1) + 1
        text += b"\0%d" % count
        found[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return found


def compact(values: np.ndarray) -> np.ndarray:
    """Returns integers in their smallest type, and other numbers as float32.

    >>> compact(np.array([True, False])).dtype, compact(np.array([0, 300])).dtype
    (dtype('uint8'), dtype('uint16'))
    """
    if values.dtype.kind in "bui":
        return values.astype(np.min_scalar_type(int(values.max(initial=0))))
    return values.astype(np.float32)


def write(workdir: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file of a run, whole or not at all; none without arrays."""
    named: Any = dict(arrays)  # numpy's types take a name for its own argument.
    if arrays:
        write_bytes(workdir / FILE, lambda file: np.savez_compressed(file, **named))


def read(workdir: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a run; None if it has no file, or a damaged one."""
    try:
        # np.load leaves a damaged file that it opened itself open.
        with (workdir / FILE).open("rb") as file, np.load(file) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def scores_of(
    arrays: Mapping[str, np.ndarray], metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns identifiers and scores of a metric; None if it is no mean over examples.

    Args:
        arrays: Content of the file.
        metric: Full name of the metric, such as 'test/accuracy'.
    """
    if metric not in arrays:
        return None
    # The metrics of a model among several have its label before their name.
    parts = metric.split("/")[:-1]
    for end in range(len(parts), 0, -1):
        name = "/".join((*parts[:end], ID))
        if name in arrays:
            return arrays[name], arrays[metric].astype(np.float64)
    return None
