"""Predictions in a notebook.

from finetune_jax.pipeline import pipeline
classify = pipeline("runs/photos")
classify("photo.jpg")
"""

import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.paths import user_path
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.images.depth import bytes_problem, depth_warnings
from finetune_jax.data.text.files import check_texts
from finetune_jax.data.text.tokens import Rows
from finetune_jax.data.threads import check_readable
from finetune_jax.inference.predictor import (
    Predictor,
    checked,
    examples,
    fitted,
    open_predictor,
    takes_files,
    text_examples,
)
from finetune_jax.modes.startup import pin_environment, resolved_config


def pipeline(
    workdir: str | pathlib.Path, **overrides: Any
) -> Callable[[Any], dict | list[dict]]:
    """Returns a function of new inputs: what the best checkpoint of a run says of them.

    An image is a path, one of Pillow's, or bytes [H, W, C] or [H, W]; where the run has
    feature vectors, an input is one; a text is one, or a dict of texts by their columns,
    such as {'question': ..., 'context': ...}. A list of inputs, or an array [N, ...] of
    them, gives a list of what `--mode=predict` writes of each; one alone gives that alone.

    Args:
        workdir: Of the run.
        **overrides: What predictions may change of the config: `top_k`, `batch_size`,
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
    pin_environment(folder, config.deterministic)
    wide = config.precision == "float64"
    with jax.enable_x64(wide):
        return Pipeline(open_predictor(config, folder), wide=wide)


class Pipeline:
    """A run that is called on inputs; a program is compiled for each size of batch."""

    def __init__(self, predictor: Predictor, *, wide: bool):
        """Takes what predicts, and whether it computes with 64-bit numbers."""
        self._predictor = predictor
        self._wide = wide

    def __call__(self, inputs: Any) -> dict | list[dict]:
        """Returns a record, or a list of them for a list or an array of inputs.

        Raises:
            UserError: Lists the inputs that cannot be read.
        """
        spec = self._predictor.spec
        if spec.text is not None:
            alone = isinstance(inputs, str | Mapping)
            records = self._of_texts([inputs] if alone else list(inputs))
            return records[0] if alone else records
        if isinstance(inputs, np.ndarray):
            axes = len(spec.shape)
            if axes == 3 and inputs.ndim == 2:
                inputs = inputs[..., None]
            if inputs.ndim not in (axes, axes + 1):
                raise UserError(
                    f"an array {inputs.shape}, but the model takes {spec.shape} each"
                )
            alone = inputs.ndim == axes
            many = inputs[None] if alone else inputs
            many = checked(many, spec, "an array", alone=alone)
            records = self._records(examples(many, spec))
            return records[0] if alone else records
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
            return self._listed(inputs)
        return self._listed([inputs])[0]

    def _listed(self, inputs: Sequence[Any]) -> list[dict]:
        """Returns the records of inputs of any kinds, in their order."""
        spec = self._predictor.spec
        problems = [
            f"input {place}: {_kind(item)}"
            for place, item in enumerate(inputs)
            if not isinstance(item, np.ndarray)
            and not (takes_files(spec) and isinstance(item, _FILES))
        ]
        if problems:
            takes = (
                "paths, Pillow's images or arrays" if takes_files(spec) else "arrays"
            )
            raise problems_error(f"The model takes {takes}, but there are:", problems)
        found: dict[int, dict] = {}
        files = [n for n, item in enumerate(inputs) if not isinstance(item, np.ndarray)]
        if files:
            images = [_file(inputs[place]) for place in files]
            _check_depth(files, images)
            dataset, errors = fitted(images, spec)
            check_readable(errors, "Leave them out.")
            assert dataset is not None
            found |= zip(files, self._records(dataset))
        for place, item in enumerate(inputs):
            if isinstance(item, np.ndarray):
                record = self(item)
                if isinstance(record, list):
                    raise UserError(f"input {place}: {item.shape}, which are several")
                found[place] = record
        return [found[place] for place in range(len(inputs))]

    def _of_texts(self, inputs: Sequence[Any]) -> list[dict]:
        """Returns the records of texts, or of what has several by their columns."""
        spec = self._predictor.spec
        assert spec.text is not None
        options = spec.text.options
        kinds = (str, Mapping) if len(options.text) == 1 else (Mapping,)
        problems = [
            f"input {place}: {_kind(item)}"
            for place, item in enumerate(inputs)
            if not isinstance(item, kinds)
        ]
        if problems:
            columns = " and ".join(map(repr, options.text))
            takes = "texts, or dicts with" if str in kinds else "dicts with"
            raise problems_error(f"The model takes {takes} {columns}:", problems)
        rows = Rows(
            where="inputs",
            columns=options.text,
            cells=[
                {options.text[0]: item} if isinstance(item, str) else item
                for item in inputs
            ],
            lines=range(len(inputs)),
            unit="number",
        )
        check_texts(rows, options)
        return self._records(text_examples(rows, spec, self._predictor.encoder))

    def _records(self, dataset: Dataset) -> list[dict]:
        # A program is compiled for each batch size.
        of_size = self._predictor.with_batch_size(2 ** (len(dataset) - 1).bit_length())
        # Others in this process may compute in another precision.
        with jax.enable_x64(self._wide):
            return of_size.records(dataset)


_FILES = (str, pathlib.Path, Image.Image)


def _check_depth(places: Sequence[int], images: Sequence[Any]) -> None:
    """Warns of images of 16 bits that would become almost black.

    Raises:
        UserError: Lists Pillow's images of more than 8 bits that hold bytes.
    """
    problems = [
        f"input {place}: {problem}"
        for place, image in zip(places, images)
        if isinstance(image, Image.Image) and (problem := bytes_problem(image))
    ]
    if problems:
        raise problems_error("Some images would become black:", problems)
    for line in depth_warnings("inputs", images):
        warnings.warn(line, stacklevel=2)


def _file(item: Any) -> Any:
    return user_path(item) if isinstance(item, str) else item


def _kind(item: Any) -> str:
    return f"{item!r:.60} ({type(item).__name__})"
