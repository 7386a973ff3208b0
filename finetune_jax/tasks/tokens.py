"""Token classification: a tag for every word of a text, such as named entities."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune_jax.data.spec import DataSpec
from finetune_jax.data.text.tags import NONE
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.text_inputs import (
    TextInputs,
    token_model,
    unknown_metrics,
)
from finetune_jax.tasks.objectives.entities import entity_scores
from finetune_jax.tasks.task import ExampleScores, LossOutput

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("text", "tags"),)
METRICS = ("f1", "precision", "recall", "accuracy", "loss")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TagTarget:
    """A tag for every word.

    Attributes:
        names: Names of the tags.
        tokens: Length of the longest text; tags are padded to it.
        metric_names: Metrics of a split; 'loss' is always added.
    """

    names: tuple[str, ...]
    tokens: int
    metric_names: tuple[str, ...] = METRICS

    head_kind = "tags"

    @property
    def logits(self) -> int:
        """One logit for each tag."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """Tags [T]; -1 at tokens without a tag."""
        return jax.ShapeDtypeStruct((self.tokens,), np.dtype(np.int32))

    def loss(self, output: jax.Array, batch: Mapping) -> LossOutput:
        """Returns cross entropy and accuracy over words."""
        label_BxT = batch["label"]
        weight_BxT = (label_BxT != NONE) * batch["weight"][:, None]
        loss_BxT = _cross_entropy(output, label_BxT)
        right_BxT = jnp.argmax(output, axis=-1) == label_BxT
        weight = jnp.sum(weight_BxT)
        loss = jnp.sum(loss_BxT * weight_BxT), weight
        accuracy = jnp.sum(right_BxT * weight_BxT), weight
        return LossOutput(*loss, {"loss": loss, "accuracy": accuracy})

    def outputs(self, output: jax.Array, batch: Mapping) -> dict:
        """Returns the tag of every token and, with labels, the summed loss of a text."""
        known_BxTxK = output[..., : len(self.names)]
        tag_BxT = jnp.argmax(known_BxTxK, axis=-1).astype(jnp.int32)
        if "label" not in batch:
            return {"tag": tag_BxT}
        label_BxT = batch["label"]
        loss_BxT = _cross_entropy(output, label_BxT) * (label_BxT != NONE)
        # A batch may be shorter than the longest text.
        absent = max(self.tokens - tag_BxT.shape[1], 0)
        tag_BxT = jnp.pad(tag_BxT, ((0, 0), (0, absent)))
        return {"tag": tag_BxT, "loss": loss_BxT.sum(axis=1)}

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns the tags, as positions in the list of their names."""
        return {"tag": outputs["tag"]}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns scores over entities, and accuracy and loss over words."""
        label, tag = batch["label"], outputs["tag"][:, : batch["label"].shape[1]]
        is_word = label != NONE
        words = max(int(is_word.sum()), 1)
        found = entity_scores(self._tags(tag, label), self._tags(label, label))
        found["accuracy"] = float((tag == label)[is_word].sum() / words)
        found["loss"] = float(outputs["loss"].astype(np.float64).sum() / words)
        names = dict.fromkeys((*self.metric_names, "loss"))
        return {name: found[name] for name in names}

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns accuracy and loss of each text, scaled to means over all words."""
        label, tag = batch["label"], outputs["tag"][:, : batch["label"].shape[1]]
        is_word = label != NONE
        words = max(int(is_word.sum()), 1) / len(label)
        found = {"loss": outputs["loss"].astype(np.float64) / words}
        if "accuracy" in self.metric_names:
            found["accuracy"] = ((tag == label) & is_word).sum(axis=1) / words
        return ExampleScores(scores=found)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns nothing: every metric is defined on every split."""
        del labels
        return []

    def _tags(self, tag: np.ndarray, label: np.ndarray) -> list[list[str]]:
        """Returns the names of the tags of each text's words."""
        return [
            [self.names[k] for k in row[known != NONE]]
            for row, known in zip(tag, label)
        ]

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns a tag for every word that was not truncated."""
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
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`; its `pool` is 'none'.
        precision: 'float32', 'bfloat16' or 'float64'.
        metrics: Some of `METRICS`.

    Raises:
        UserError: Labels that are no tags, an unknown metric, or a model that cannot read
            texts or pools a text to one vector.
    """
    problems = unknown_metrics(metrics, METRICS)
    tags = len(data.class_names)
    classes = model["classes"] or tags
    if classes < tags:
        problems.append(
            f"config.model.classes: {classes}, but the data has {tags} tags; None takes "
            "the data's number"
        )
    module = token_model(
        data, model, classes=classes, precision=precision, problems=problems
    )
    target = TagTarget(
        names=data.class_names, tokens=data.shape[-1], metric_names=metrics
    )
    return one_model_task(module, TextInputs(data=data), target)
