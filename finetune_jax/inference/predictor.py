"""A finished run on new inputs: what predictions on files and in notebooks share."""

import dataclasses
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import Dataset, dataset_of, no_data
from finetune_jax.data.images.array_files import read_arrays
from finetune_jax.data.images.decoding import read_image
from finetune_jax.data.images.pixels import to_predict
from finetune_jax.data.source import ArrayExamples, Source, not_finite
from finetune_jax.data.spec import DataSpec, spec_from_json
from finetune_jax.data.text.questions import asked_in, encode_questions
from finetune_jax.data.text.tags import encode_words, tag_labels, words_of
from finetune_jax.data.text.token_counts import TokenCounts, counts_for
from finetune_jax.data.text.tokens import (
    Rows,
    TextOptions,
    encode,
    make_encoder,
    packed,
)
from finetune_jax.data.threads import attempts
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.report.workdir import read_manifest
from finetune_jax.tasks.components.multi_domain import Several
from finetune_jax.training.restore import best_state
from finetune_jax.training.setup import Setup, make_setup
from finetune_jax.weights.metadata.tokenizer import find_tokenizer

ARRAYS = (".npy", ".npz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """The best checkpoint of a run.

    Attributes:
        setup: Of the run, without its data.
        state: State of the checkpoint.
        step: Of the checkpoint.
        encoder: The tokenizer of a run of texts, else None.
    """

    setup: Setup
    state: EvaluatedState
    step: int
    encoder: Any = None

    @property
    def spec(self) -> DataSpec:
        """What the inputs look like."""
        return self.setup.data.spec

    def with_batch_size(self, examples: int) -> "Predictor":
        """Returns the predictor, computing at most so many examples at once."""
        return dataclasses.replace(self, state=self.state.with_batch_size(examples))

    def records(self, dataset: Dataset) -> list[dict[str, Any]]:
        """Returns what is predicted of each example, ready for JSON.

        Where that is a mask, 'mask' is one of class indices, uint8 [H, W], as large as the
        model's images.
        """
        outputs = self.state.outputs(dataset)
        records = self.setup.task.records(outputs, dataset.on_host())
        masks = self.setup.task.masks(outputs)
        if masks is None:
            return records
        return [{"mask": mask, **record} for mask, record in zip(masks, records)]


def open_predictor(config: Config, workdir: pathlib.Path) -> Predictor:
    """Returns the best checkpoint of a run, ready for inputs.

    Args:
        config: Of the run, resolved.
        workdir: The run's.

    Of several domains it is the last one's model that predicts.

    Raises:
        UserError: There is no checkpoint yet, the run does not say what it takes, or its
            tokenizer is gone.
    """
    spec, encoder = _whole_spec(config, workdir), None
    setup = make_setup(config, no_data(spec))
    if spec.text is not None:
        tokenizer = find_tokenizer(f"file:{workdir}", None)
        assert tokenizer is not None
        encoder = make_encoder(tokenizer, spec.text.options.max_tokens)
    state, step = best_state(setup, workdir)
    if isinstance(setup.task, Several):
        domain = list(setup.task.parts)[-1]
        task, own = setup.task.parts[domain], spec.domains[domain]
        placed = state.placed
        params, stats = setup.task.gather(domain, state.params, placed.batch_stats)
        placed = placed.replace(params=params, batch_stats=stats, opt_state={}, ema={})
        setup = dataclasses.replace(setup, task=task, data=no_data(own))
        evaluator = dataclasses.replace(
            state.evaluator, task=task, ema=False, chosen_ema=False
        )
        state = EvaluatedState(evaluator=evaluator, placed=placed, prefix=None)
    return Predictor(setup=setup, state=state, step=step, encoder=encoder)


def run_spec(config: Config, workdir: pathlib.Path) -> DataSpec:
    """Returns what the inputs of a run's predictions look like, without its data.

    Raises:
        UserError: The run does not say.
    """
    spec = _whole_spec(config, workdir)
    return list(spec.domains.values())[-1] if spec.domains else spec


def _whole_spec(config: Config, workdir: pathlib.Path) -> DataSpec:
    """Returns what the data of a run look like, without the data.

    Raises:
        UserError: The run does not say.
    """
    looks = (read_manifest(workdir) or {}).get("data")
    try:
        return spec_from_json(looks or {}, config.data)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"--workdir: {workdir}/manifest.json does not say what the data look like; "
            "it is of an older version, or damaged"
        ) from error


def takes_files(spec: DataSpec) -> bool:
    """Returns whether inputs are images that lie in files."""
    return len(spec.shape) == 3 and spec.dtype == "uint8"


def fitted(
    images: Sequence[Any], spec: DataSpec
) -> tuple[Dataset | None, list[UserError | None]]:
    """Returns those images that can be read, as the model takes them, and errors.

    Args:
        images: Paths or Pillow's images.
        spec: Of the run.

    Returns:
        The examples, None where there are none; and of each image its error, or None.
    """
    geometry = spec.geometry(training=False)
    found = attempts(lambda image: read_image(image, geometry), images)
    errors = [error for _, error in found]
    good = [values for values, error in found if error is None]
    if not good:
        return None, errors
    # They are resized already.
    return examples(np.stack(good), dataclasses.replace(spec, resize=None)), errors


def examples(inputs: np.ndarray, spec: DataSpec) -> Dataset:
    """Returns inputs [N, ...], as the model takes them, as a split without labels."""
    label = np.zeros(len(inputs), np.int32)
    source = Source(
        name="inputs",
        splits={"all": ArrayExamples(values=inputs, label=label)},
        class_names=(),
        fingerprint=str,
    )
    return dataset_of(source, spec, np.arange(len(inputs)), label)


def text_examples(
    rows: Rows, spec: DataSpec, encoder: Any, counts: TokenCounts | None = None
) -> Dataset:
    """Returns texts as a split without labels, in groups where they are passages.

    Args:
        rows: That have texts.
        spec: Of the run.
        encoder: `Predictor.encoder`.
        counts: The tokens are added.

    Raises:
        UserError: Lists the questions that leave no room for a passage.
    """
    assert spec.text is not None
    options, notes = spec.text.options, None
    counts = counts or counts_for(encoder, options.max_tokens)
    if options.labels == "answers":
        asked = asked_in(rows, options, answered=False)
        windows = encode_questions(encoder, asked, options)
        tokens, label, notes = windows.tokens, windows.label, windows.notes
        counts.add_windows(ids for ids, _ in tokens)
        length = _length(tokens, options)
    elif options.labels == "tags":
        words = [words_of(row[options.text[0]]) or [] for row in rows.cells]
        tokens, begins = encode_words(encoder, words, counts)
        length = _length(tokens, options)
        # Words are known by having a label, whichever.
        tag = spec.class_names[0]
        tags = {"all": [[tag] * len(row) for row in words]}
        label = tag_labels({"all": begins}, tags, length, {tag: 0})["all"]
    else:
        texts = [tuple(row[column] for column in options.text) for row in rows.cells]
        tokens, label = encode(encoder, texts, counts), np.zeros(len(texts), np.int32)
        length = _length(tokens, options)
    source = Source(
        name=rows.where,
        splits={"all": ArrayExamples(values=packed(tokens, length), label=label)},
        class_names=(),
        fingerprint=str,
        notes=notes,
    )
    spec = dataclasses.replace(spec, shape=(2, length))
    return dataset_of(source, spec, np.arange(len(tokens)), label)


def _length(tokens: Sequence[tuple[Any, Any]], options: TextOptions) -> int:
    return options.padded(max(len(ids) for ids, _ in tokens))


def read_array(path: pathlib.Path, spec: DataSpec) -> np.ndarray:
    """Returns inputs [N, ...] of an `.npy` file, or the array `x` of an `.npz` file.

    Raises:
        UserError: Names the file, and what is wrong with it.
    """
    arrays = read_arrays(path, "x")
    array = arrays.get("", arrays.get("x"))
    if array is None:
        raise UserError(
            f"{path}: no array 'x' in it, but {', '.join(arrays) or 'nothing'}; save the "
            "inputs as x: np.savez('inputs.npz', x=x)"
        )
    return checked(array, spec, str(path))


def checked(
    array: np.ndarray, spec: DataSpec, name: str, *, alone: bool = False
) -> np.ndarray:
    """Returns inputs [N, ...] as the model takes them.

    Images are read as the run has read its own; a conversion is told by a warning.

    Args:
        array: Inputs of any numbers.
        spec: What the run's data look like.
        name: For messages.
        alone: Whether a single input was given, to which an axis was added.

    Raises:
        UserError: The model does not take them.
    """
    fits = (
        array.ndim in (3, 4) if len(spec.shape) == 3 else array.shape[1:] == spec.shape
    )
    if not array.size or not fits:
        raise UserError(f"{name}: {array.shape}, but the model takes {spec.shape} each")
    if array.dtype.kind not in "uifb":
        raise UserError(f"{name}: {array.dtype}, but the model takes {spec.dtype}")
    if array.dtype.kind == "f" and len(bad := not_finite(array)):
        raise UserError(
            f"{name}: {len(bad)} examples have NaN or infinity (in float32), the first is "
            f"number {int(bad[0])}"
        )
    if len(spec.shape) == 3:
        array, lines = to_predict(array, spec.pixels, spec.dtype, name, alone=alone)
        for line in lines:
            warnings.warn(line, stacklevel=2)
    elif array.dtype != np.uint8:
        array = array.astype(np.float32)
    if array.dtype != np.dtype(spec.dtype):
        raise UserError(f"{name}: {array.dtype}, but the model takes {spec.dtype}")
    return array
