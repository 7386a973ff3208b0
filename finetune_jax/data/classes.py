"""What is asked of the classes of examples, and of data without any."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.data.labels import near_twins
from finetune_jax.data.source import Source


def check_no_classes(source: Source, config: Mapping[str, Any]) -> None:
    """Checks that nothing is asked for that needs a class of every example.

    Raises:
        UserError: Lists the keys of `config.data` that do.
    """
    problems = [
        f"config.data.{key}: {config[key]!r} needs classes; leave it at {default!r}"
        for key, default in (("per_class", None), ("sampling", "uniform"), ("mix", ()))
        if config[key] != default
    ]
    if problems:
        kinds = {"numbers": source.targets, "masks": source.pixel_classes}
        kind = next((name for name, given in kinds.items() if given), "parts of texts")
        raise problems_error(f"The labels of {source.name} are {kind}:", problems)


def check_classes(source: Source, label: np.ndarray, train: np.ndarray) -> None:
    """Checks that every class occurs in training.

    Args:
        source: Has the classes.
        label: Of all its examples.
        train: Indices of those to train on.

    Raises:
        UserError: Names the classes that do not.
    """
    seen = set(np.unique(label[train]).tolist()) if source.class_names else set()
    absent = [
        name for index, name in enumerate(source.class_names) if index not in seen
    ]
    if absent:
        raise UserError(
            f"config.data.train: {len(absent)} of {len(source.class_names)} classes "
            f"have no training example: {', '.join(absent[:20])}. A model cannot learn "
            "what it never sees; choose another split."
            + "".join(f"\n  {line}" for line in near_twins(source.class_names))
        )


def check_labelled(
    source: Source,
    label: np.ndarray,
    chosen: Mapping[str, np.ndarray],
    *,
    training: bool,
) -> None:
    """Checks that the examples of every split have a class.

    Args:
        source: Has the classes.
        label: Class index of all its examples; below 0 where there is none.
        chosen: Indices of the examples by split, 'train' among them.
        training: Whether training needs labels.

    Raises:
        UserError: Lists the splits that have examples without a class.
    """
    if not source.class_names:
        return
    problems = [
        f"config.data.{split}: {count} of {len(indices)} examples have no class"
        for split, indices in chosen.items()
        if (training or split != "train") and (count := int((label[indices] < 0).sum()))
    ]
    if problems:
        advice = "Choose another split; labels of test splits are often not published."
        raise problems_error(
            f"The data {source.name} cannot be used:", problems, advice
        )
