"""Predictions of a held-out split as a page shows them, by the kind of its labels."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_jax.data.dataset import Dataset
from finetune_jax.data.kind import Example, kind_named
from finetune_jax.report import plots
from finetune_jax.report.html.charts import agreement
from finetune_jax.report.html.classes import two_classes
from finetune_jax.report.html.page import Prediction
from finetune_jax.report.segments import for_page, segments_figure
from finetune_jax.tasks.objectives.metrics import confusion_matrix, probabilities
from finetune_jax.tasks.objectives.squad import match_scores
from finetune_jax.training.setup import Setup

# Most examples of a group, and most masks, that the page shows.
SHOWN, SHOWN_MASKS = 10, 8
WRONG, RIGHT = "Wrong, the most certain first", "Right, a sample"


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A held-out split with the outputs of the best state.

    Attributes:
        setup: Setup of the run, or of one domain.
        outputs: Outputs, a row an example.
        dataset: The split.
        folder: Folder that gets the figures.
        caption: Caption of the figures.
    """

    setup: Setup
    outputs: dict[str, np.ndarray]
    dataset: Dataset
    folder: pathlib.Path
    caption: str

    def name(self, position: int) -> str:
        """Returns the name of an example, with the innermost folder at most."""
        return "/".join(pathlib.PurePath(self.dataset.name(position)).parts[-2:])

    def examples(self, positions: Sequence[int]) -> list[Example] | None:
        """Returns examples as a person reads them; None if nobody could."""
        data = self.setup.data
        found = np.array(positions, int)
        return kind_named(data.spec.kind).examples(data, self.dataset, found)

    def records(self) -> list[dict]:
        """Returns the prediction for each example, or group of examples."""
        return self.setup.task.records(self.outputs, self.dataset.on_host())


def _spread(positions: Sequence[int], most: int) -> list[int]:
    """Returns at most so many positions, evenly spread.

    >>> _spread(range(10), 3), _spread([], 3)
    ([0, 4, 9], [])
    """
    if not len(positions):
        return []
    places = np.linspace(0, len(positions) - 1, min(most, len(positions)))
    return [int(positions[place]) for place in places.astype(int)]


def show_numbers(shown: Predicted) -> dict[str, Any]:
    """Draws predicted over true numbers; the page also has the largest errors."""
    prediction, target = shown.outputs["prediction"], shown.dataset.label
    names = shown.setup.data.spec.targets
    path = shown.folder / "predicted.png"
    plots.predicted(prediction, target, names, path, shown.caption)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(prediction - target) / target.std(axis=0)
    error = np.nan_to_num(error.sum(axis=1), nan=np.inf)
    largest = np.argsort(-error, kind="stable")[:SHOWN]

    def text(row: np.ndarray) -> str:
        if len(row) == 1:
            return f"{row[0]:.4g}"
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row))

    def listed(positions: Sequence[int]) -> list[Prediction]:
        return [
            Prediction(
                example=example,
                truth=text(target[at]),
                top=((text(prediction[at]), None),),
                is_right=None,
                name=shown.name(at),
            )
            for at, example in zip(positions, shown.examples(positions) or ())
        ]

    return {
        "charts": agreement(prediction, target, names),
        "examples": {
            "Largest errors": listed(largest.tolist()),
            "A sample": listed(_spread(range(len(target)), SHOWN)),
        },
    }


def show_masks(shown: Predicted) -> dict[str, Any]:
    """Draws predicted masks of a sample of the examples, and returns them for the page."""
    positions = _spread(range(len(shown.dataset)), SHOWN_MASKS)
    found = shown.examples(positions)
    if found is None:
        return {}
    pictures = (
        np.stack([example.image for example in found if example.image is not None]),
        shown.dataset.take(np.array(positions))["mask"],
        shown.outputs["prediction"][positions],
        [shown.name(position) for position in positions],
        shown.setup.data.spec.pixel_classes,
    )
    figure = segments_figure(*pictures)
    (shown.folder / "segments.png").write_bytes(plots.png(figure))
    return {"segments": {"caption": f"Of {shown.caption}", **for_page(*pictures)}}


def show_classes(shown: Predicted) -> dict[str, Any]:
    """Draws the confusion matrix, and returns what the page shows of classes."""
    if "logits" not in shown.outputs:
        return {}
    names, label = shown.setup.data.spec.class_names, shown.dataset.label
    # A model may have more logits than the data has classes.
    logits = shown.outputs["logits"] = shown.outputs["logits"][:, : len(names)]
    counts = confusion_matrix(logits, label)
    path = shown.folder / "confusion_matrix.png"
    plots.confusion_matrix(counts, names, path, shown.caption)
    found: dict[str, Any] = {
        "confusion": (counts, names, shown.caption),
        "examples": _class_examples(shown),
    }
    if len(names) == 2:
        probability = probabilities(logits)[:, 1]
        found["charts"] = two_classes(probability, label, names[1])
    return found


def _class_examples(shown: Predicted) -> dict[str, list[Prediction]]:
    """Returns the most certain wrong predictions, and a sample of the right ones."""
    if shown.examples([0]) is None:
        return {}
    records, label = shown.records(), shown.dataset.label
    certain = np.array([record["top"][0]["probability"] for record in records])
    is_right = np.argmax(shown.outputs["logits"], axis=-1) == label
    right, wrong = np.flatnonzero(is_right), np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-certain[wrong], kind="stable")][:SHOWN]

    def listed(positions: Sequence[int]) -> list[Prediction]:
        return [
            Prediction(
                example=example,
                truth=shown.setup.data.spec.class_names[label[at]],
                top=tuple(
                    (entry["class"], entry["probability"])
                    for entry in records[at]["top"][:3]
                ),
                is_right=bool(is_right[at]),
                name=shown.name(at),
            )
            for at, example in zip(positions, shown.examples(positions) or ())
        ]

    return {
        WRONG: listed(worst.tolist()),
        RIGHT: listed(_spread(right.tolist(), SHOWN)),
    }


def show_answers(shown: Predicted) -> dict[str, Any]:
    """Returns questions with the answers that were found."""
    notes = shown.dataset.on_host()["note"]
    asked = [id(note.question) for note in notes]
    # The first window of each question stands for it.
    firsts = [at for at, one in enumerate(asked) if at == 0 or one != asked[at - 1]]
    records = shown.records()
    wanted = [notes[at].question.answers for at in firsts]
    is_right = [
        match_scores([record["answer"]], [answers])["exact_match"] == 1
        for record, answers in zip(records, wanted)
    ]
    certain = np.argsort([-record["score"] for record in records], kind="stable")
    wrong = [int(row) for row in certain if not is_right[row]][:SHOWN]
    right = [row for row, found in enumerate(is_right) if found]

    def listed(rows: Sequence[int]) -> list[Prediction]:
        examples = shown.examples([firsts[row] for row in rows]) if rows else None
        return [
            Prediction(
                example=example,
                truth=" | ".join(dict.fromkeys(wanted[row])) or "no answer",
                top=((records[row]["answer"] or "no answer", records[row]["score"]),),
                is_right=is_right[row],
                name=records[row].get("id") or shown.name(firsts[row]),
            )
            for row, example in zip(rows, examples or ())
        ]

    return {"examples": {WRONG: listed(wrong), RIGHT: listed(_spread(right, SHOWN))}}


def show_tags(shown: Predicted) -> dict[str, Any]:
    """Returns texts with the tags of their words."""
    label, names = shown.dataset.label, shown.setup.data.spec.class_names
    predicted = [record["tags"] for record in shown.records()]
    wanted = [[names[k] for k in row[row >= 0]] for row in label]
    errors = np.array(
        [sum(a != b for a, b in zip(*row)) for row in zip(predicted, wanted)]
    )
    worst = np.argsort(-errors, kind="stable")[: min(SHOWN, int((errors > 0).sum()))]

    def listed(positions: Sequence[int]) -> list[Prediction]:
        return [
            Prediction(
                example=example,
                truth="",
                top=(),
                is_right=not errors[at],
                name=shown.name(at),
                tags=tuple(zip(wanted[at], predicted[at])),
            )
            for at, example in zip(positions, shown.examples(positions) or ())
        ]

    right = _spread(np.flatnonzero(errors == 0).tolist(), SHOWN)
    return {
        "examples": {
            "Most wrong tags": listed(worst.tolist()) if len(worst) else [],
            "All tags right, a sample": listed(right) if right else [],
        }
    }


# By the kind of labels; the predictions of all others are not shown.
SHOW = {
    "answers": show_answers,
    "classes": show_classes,
    "masks": show_masks,
    "numbers": show_numbers,
    "tags": show_tags,
}
