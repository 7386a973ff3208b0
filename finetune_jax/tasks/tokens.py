"""A tag for every word of a text, as in the recognition of named entities."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune_jax.core.errors import problems_error
from finetune_jax.core.registry import closest
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.text.tags import NONE
from finetune_jax.tasks.components.text_inputs import initial, token_model, tokens
from finetune_jax.tasks.objectives.entities import entity_scores
from finetune_jax.tasks.task import Mode, Task

# Kinds of data and of labels.
ACCEPTS = (("text", "tags"),)
METRICS = ("f1", "precision", "recall", "accuracy", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Task):
    """Tags words.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        metric_names: What is measured on a split; 'loss' always is.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    metric_names: tuple[str, ...] = METRICS

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Ids and sentences [2, T], and tags [T]; places without have -1."""
        kind = np.dtype(np.int32)
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, kind),
            "label": jax.ShapeDtypeStruct(self.data.shape[1:], kind),
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
        """Returns cross entropy and accuracy over words as (total, weight) pairs."""
        del fixed, progress
        logits_BxTxK, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        label_BxT = batch["label"]
        weight_BxT = (label_BxT != NONE) * batch["weight"][:, None]
        loss_BxT = _cross_entropy(logits_BxTxK, label_BxT)
        right_BxT = jnp.argmax(logits_BxTxK, axis=-1) == label_BxT
        weight = jnp.sum(weight_BxT)
        found = {
            "loss": (jnp.sum(loss_BxT * weight_BxT), weight),
            "accuracy": (jnp.sum(right_BxT * weight_BxT), weight),
        }
        return found["loss"], (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns the tag of every place, and the summed loss of each text."""
        del fixed
        logits_BxTxK, _ = self.given(params, batch_stats, batch, first=first)
        label_BxT = batch["label"]
        loss_BxT = _cross_entropy(logits_BxTxK, label_BxT) * (label_BxT != NONE)
        known_BxTxK = logits_BxTxK[..., : len(self.data.class_names)]
        tag_BxT = jnp.argmax(known_BxTxK, axis=-1).astype(jnp.int32)
        # Batches may be shorter than the longest text.
        absent = max(self.data.shape[-1] - tag_BxT.shape[1], 0)
        tag_BxT = jnp.pad(tag_BxT, ((0, 0), (0, absent)))
        return {"tag": tag_BxT, "loss": loss_BxT.sum(axis=1)}

    def answers(self, outputs: dict) -> dict:
        """Returns the tags, as places in the list of their names."""
        return {"tag": outputs["tag"]}

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns scores over entities, and accuracy and loss over words."""
        label, tag = batch["label"], outputs["tag"][:, : batch["label"].shape[1]]
        is_word = label != NONE
        words = max(int(is_word.sum()), 1)
        found = entity_scores(self._tags(tag, label), self._tags(label, label))
        found["accuracy"] = float((tag == label)[is_word].sum() / words)
        found["loss"] = float(outputs["loss"].astype(np.float64).sum() / words)
        names = dict.fromkeys((*self.metric_names, "loss"))
        return {name: found[name] for name in names}

    def _tags(self, tag: np.ndarray, label: np.ndarray) -> list[list[str]]:
        """Returns the names of the tags of each text's words."""
        names = self.data.class_names
        return [
            [names[k] for k in row[there != NONE]] for row, there in zip(tag, label)
        ]

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns a tag for every word of a text that was not cut off."""
        tag = outputs["tag"][:, : batch["label"].shape[1]]
        return [{"tags": tags} for tags in self._tags(tag, batch["label"])]


def _cross_entropy(logits_BxTxK: jax.Array, label_BxT: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BxTxK, jnp.maximum(label_BxT, 0)
    )


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    metrics: tuple[str, ...] = METRICS,
) -> Tokens:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`; its `pool` is 'none'.
        precision: 'float32', 'bfloat16' or 'float64'.
        metrics: Some of `METRICS`.

    Raises:
        UserError: Labels that are no tags, a metric that there is not, or a model that
            cannot read texts or makes one vector of a text.
    """
    problems = [
        f"config.task.metrics: no {name!r}{closest(str(name), METRICS)}"
        for name in metrics
        if name not in METRICS
    ]
    classes = model["classes"]
    if (classes or len(data.class_names)) < len(data.class_names):
        problems.append(
            f"config.model.classes: {classes}, but the data has "
            f"{len(data.class_names)} tags; None takes the data's number"
        )
    module, unfit = token_model(
        data, model, classes=classes or len(data.class_names), precision=precision
    )
    if problems := problems + unfit:
        raise problems_error("The task does not fit:", problems)
    return Tokens(models={"": module}, data=data, metric_names=metrics)
