"""Predictions in a notebook.

from finetune_jax.pipeline import pipeline
classify = pipeline("runs/photos")
classify("photo.jpg")
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.data.dataset import Dataset
from finetune_jax.inference.predictor import Predictor, open_predictor
from finetune_jax.modes.startup import pin_environment, resolved_config


def pipeline(
    workdir: str | pathlib.Path, **overrides: Any
) -> Callable[[Any], dict | list[dict]]:
    """Returns a function that predicts new inputs with the best checkpoint of a run.

    An image is a path, one of Pillow's, or bytes [H, W, C] or [H, W]; where the run has
    feature vectors, an input is one; a text is one, or a dict of texts by their columns,
    such as {'question': ..., 'context': ...}. A list of inputs, or an array [N, ...] of
    them, gives a list of what `--mode=predict` writes of each; one alone gives that alone.

    Args:
        workdir: Workdir of the run.
        **overrides: Config keys that predictions may change: `top_k`, `batch_size`,
            `devices`.

    Raises:
        UserError: There is no run, or no checkpoint yet.
    """
    keys = {
        "top_k": "task.top_k",
        "batch_size": "evaluate.batch_size",
        "devices": "parallel.devices",
    }
    if unknown := sorted(set(overrides) - set(keys)):
        raise UserError(
            f"pipeline: no {', '.join(unknown)}; there are {', '.join(keys)}"
        )
    folder = user_path(workdir, "pipeline")
    pairs = [(keys[name], str(value)) for name, value in overrides.items()]
    config = resolved_config("", folder, pairs)
    pin_environment(folder, config.deterministic, config.parallel)
    wide = config.precision == "float64"
    with jax.enable_x64(wide):
        return Pipeline(open_predictor(config, folder), wide=wide)


class Pipeline:
    """A run that is called on inputs; a program is compiled for each size of batch."""

    def __init__(self, predictor: Predictor, *, wide: bool):
        """Stores the predictor, and whether it computes with 64-bit numbers."""
        self._predictor = predictor
        self._wide = wide

    def __call__(self, inputs: Any) -> dict | list[dict]:
        """Returns a record, or a list of them for a list or an array of inputs.

        Raises:
            UserError: Lists the inputs that cannot be read.
        """
        alone, groups = self._predictor.reader.convert(inputs)
        found: dict[int, dict] = {}
        for places, dataset in groups:
            found |= zip(places, self._records(dataset), strict=True)
        records = [found[place] for place in sorted(found)]
        return records[0] if alone else records

    def _records(self, dataset: Dataset) -> list[dict]:
        # A program is compiled for each batch size.
        of_size = self._predictor.with_batch_size(2 ** (len(dataset) - 1).bit_length())
        # Others in this process may compute in another precision.
        with jax.enable_x64(self._wide):
            return of_size.records(dataset)
