"""Texts of one or two sentences: one class, or one number, each."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.single_model import Answering, make_answer
from finetune_jax.tasks.components.targets import logits_asked
from finetune_jax.tasks.components.text_inputs import check_encoder, initial, tokens
from finetune_jax.tasks.task import Mode

# Kinds of data and of labels.
ACCEPTS = (("text", "classes"), ("text", "numbers"))
# By what `config.data.labels` says.
METRICS = {"classes": ("accuracy", "loss"), "numbers": ("mse", "mae", "r2")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Answering):
    """Answers texts."""

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Ids and sentences [2, T], and what the label is."""
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(np.int32)),
            "label": self.answer.label,
        }

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters, and no batch statistics."""
        return initial(self.models[""], rng)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs as encoders take them."""
        del rng, mode
        return {**batch, "inputs": tokens(batch["inputs"])}


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str | None = None,
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...] | None = None,
) -> Text:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.CLASSIFICATION`, or in `losses.REGRESSION` where labels
            are numbers; None is cross entropy, or the squared error.
        loss_args: Its arguments by name.
        label_smoothing: As `tasks.classify` has it.
        class_weights: Likewise.
        top_k: Likewise.
        metrics: Names in `metrics.METRICS`; None is `METRICS`.

    Raises:
        UserError: Something unknown or out of range, or a model that cannot read texts.
    """
    answer = make_answer(
        data,
        loss=loss,
        loss_args=loss_args,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        top_k=top_k,
        metrics=metrics,
        defaults=METRICS,
    )
    classes = logits_asked(model["classes"], answer)
    module = model_of(model, classes=classes, precision=precision)
    check_encoder(module, model["name"], data)
    return Text(models={"": module}, data=data, answer=answer)
