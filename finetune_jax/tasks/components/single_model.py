"""What tasks of one model do alike with its logits: an answer makes all of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.targets import Answer, make_classes, make_numbers
from finetune_jax.tasks.task import Mode, Task

LOSSES = {"classes": "cross_entropy", "numbers": "mse"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(Task):
    """A task of one model.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        answer: Has losses and metrics.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    answer: Answer

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
        """Returns what is to be measured; 'loss' is that of labels alone, unsmoothed."""
        return self.answer.metrics(outputs, batch)

    def answers(self, outputs: dict) -> dict:
        """Returns what the labels are answered with."""
        return self.answer.answers(outputs)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what cannot be measured on some splits."""
        return self.answer.check_splits(labels)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the classes, best first, or the numbers of each example."""
        del batch
        return self.answer.records(outputs)


def make_answer(
    data: DataSpec,
    *,
    loss: str | None,
    loss_args: Mapping[str, Any],
    label_smoothing: float,
    class_weights: str,
    top_k: int,
    metrics: tuple[str, ...] | None,
    defaults: Mapping[str, tuple[str, ...]],
) -> Answer:
    """Returns the answer to labels that are classes or numbers, as the data has them.

    Args:
        data: Has them.
        loss: As `make_classes` or `make_numbers` takes it; None is one of `LOSSES`.
        loss_args: Its arguments by name.
        label_smoothing: Of classes.
        class_weights: Of classes.
        top_k: Of classes.
        metrics: What is measured; None is that of `defaults`.
        defaults: By kind of label, 'classes' or 'numbers'.

    Raises:
        UserError: Something unknown or out of range.
    """
    kind = data.labels
    shared: dict[str, Any] = {
        "loss": loss or LOSSES[kind],
        "loss_args": loss_args,
        "class_weights": class_weights,
        "metrics": defaults[kind] if metrics is None else metrics,
    }
    if kind == "numbers":
        return make_numbers(data, **shared)
    return make_classes(data, label_smoothing=label_smoothing, top_k=top_k, **shared)
