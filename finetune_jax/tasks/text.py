"""Texts of one or two sentences: one class, or one number, each."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.answers import Answer, logits_asked, make_classes, make_numbers
from finetune_jax.data.spec import DataSpec
from finetune_jax.encoders import check_encoder, initial, tokens
from finetune_jax.models import make_model
from finetune_jax.tasks.task import Mode, Task

# By what `config.data.labels` says.
METRICS = {"classes": ("accuracy", "loss"), "numbers": ("mse", "mae", "r2")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Answers texts.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        answer: Has losses and metrics.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    answer: Answer

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

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns the weighed loss and its metrics as (total, weight) pairs."""
        del fixed, progress
        logits_BxK, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        loss, found = self.answer.loss(logits_BxK, batch)
        return loss, (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns what metrics and records are made of."""
        del fixed
        logits_BxK, _ = self.given(params, batch_stats, batch, first=first)
        return self.answer.outputs(logits_BxK)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured."""
        return self.answer.metrics(outputs, batch)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what cannot be measured on some splits."""
        return self.answer.check_splits(labels)

    def answers(self, outputs: dict) -> dict:
        """Returns what the labels are answered with."""
        return self.answer.answers(outputs)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the classes, best first, or the number of each text."""
        del batch
        return self.answer.records(outputs)


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
    kind = "numbers" if data.targets else "classes"
    shared = {
        "loss": loss or {"numbers": "mse", "classes": "cross_entropy"}[kind],
        "loss_args": loss_args,
        "class_weights": class_weights,
        "metrics": METRICS[kind] if metrics is None else metrics,
    }
    answer: Answer
    if kind == "numbers":
        answer = make_numbers(data, **shared)
    else:
        answer = make_classes(
            data, label_smoothing=label_smoothing, top_k=top_k, **shared
        )
    arguments = {**model}
    name = arguments.pop("name")
    module = make_model(
        name,
        arguments,
        classes=logits_asked(arguments.pop("classes"), answer),
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    check_encoder(module, name, data)
    return Text(models={"": module}, data=data, answer=answer)
