"""Mutual learning: models learn from labels and from what the others predict.

The parameters of a member begin with its label, `LABEL/stage/...`. Metrics are those of
all members together, whose probabilities are averaged, and `LABEL/name` those of one.

Source: Zhang et al. 2018, "Deep mutual learning", equations 6 and 7.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.members import labels_of
from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.image_inputs import Mixed, check_classified
from finetune_jax.tasks.components.single_model import Answering
from finetune_jax.tasks.components.targets import Classes, logits_asked, make_classes
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.task import Mode

# Kinds of data and of labels.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
METRICS = ("accuracy", "loss")


def measured(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns what is measured on a split: of all members together, and of each."""
    labels = labels_of(config.model)
    return names + tuple(f"{label}/{name}" for label in labels for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutual(Mixed, Answering):
    """Classifiers that teach one another.

    Attributes:
        models: By label.
        data: What the examples look like.
        answer: Has the losses of labels, and metrics.
        weight: Of what the others predict, beside that of labels, 1.
        temperature: By which logits are divided where predictions are compared.
    """

    answer: Classes
    weight: float
    temperature: float

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
        """Returns the sum of the members' losses, and metrics of each.

        A member's loss is that of the labels and `weight` times the mean over the others
        of KL(other || member) T^2, T being the temperature; no gradient goes through the
        other.
        """
        del fixed, progress, first
        logits, total, count, found = {}, jnp.zeros(()), jnp.zeros(()), {}
        for label in self.models:
            logits[label], batch_stats = self.given(
                params, batch_stats, batch, prefix=label, mode=mode, rng=rng
            )
        for label, logits_BxK in logits.items():
            (of_labels, count), metrics = self.answer.loss(logits_BxK, batch)
            weight_B = self.answer.weights(logits_BxK, batch)
            apart_B = sum(
                losses.divergence(
                    jax.lax.stop_gradient(other_BxK),
                    logits_BxK,
                    temperature=self.temperature,
                )
                for other, other_BxK in logits.items()
                if other != label
            ) / (len(logits) - 1)
            apart = jnp.sum(apart_B * weight_B)
            total += of_labels + self.weight * apart
            found |= {f"{label}/{name}": pair for name, pair in metrics.items()}
            found[f"{label}/divergence"] = apart, count
        found["loss"] = total, count
        found["accuracy"] = self.answer.loss(_mean(logits), batch)[1]["accuracy"]
        return (total, count), (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns logits of all members together, and `LABEL/logits` of each."""
        del fixed, first
        logits = {
            label: self.given(params, batch_stats, batch, prefix=label)[0]
            for label in self.models
        }
        each = {f"{label}/logits": values for label, values in logits.items()}
        return {**self.answer.outputs(_mean(logits)), **each}

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured, of all members together and of each."""
        found = dict(self.answer.metrics(outputs, batch))
        for label in self.models:
            own = {"logits": outputs[f"{label}/logits"]}
            metrics = self.answer.metrics(own, batch)
            found |= {f"{label}/{name}": value for name, value in metrics.items()}
        return found


def _mean(logits: Mapping[str, jax.Array]) -> jax.Array:
    """Returns logarithms [B, K] of the members' mean probabilities."""
    each_MxBxK = jnp.stack([jax.nn.log_softmax(own) for own in logits.values()])
    return jax.nn.logsumexp(each_MxBxK, axis=0) - np.log(len(logits))


def make(
    *,
    data: DataSpec,
    members: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    precision: str,
    weight: float = 1.0,
    temperature: float = 1.0,
    loss: str = "cross_entropy",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...] = METRICS,
) -> Mutual:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        members: What describes each model, by label.
        model: What describes a model alone, which nobody asks for.
        precision: 'float32', 'bfloat16' or 'float64'.
        weight: Of what the others predict, beside that of labels, 1.
        temperature: By which logits are divided where predictions are compared.
        loss: Of labels, a name in `losses.CLASSIFICATION`.
        loss_args: Its arguments by name.
        label_smoothing: As in `classify`.
        class_weights: As in `classify`.
        top_k: Classes that a prediction names.
        metrics: As in `classify`.

    Raises:
        UserError: Fewer members than two, or members that have other classes.
    """
    del model
    check_classified(data)
    answer = make_classes(
        data,
        loss=loss,
        loss_args=loss_args,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        top_k=top_k,
        metrics=metrics,
    )
    if not weight >= 0 or not temperature > 0:
        raise UserError(
            f"config.task: weight={weight}, temperature={temperature}; weight is 0 or "
            "more, temperature above 0"
        )
    return Mutual(
        models=_modules(members, answer, precision),
        data=data,
        answer=answer,
        weight=weight,
        temperature=temperature,
    )


def _modules(
    members: Mapping[str, Mapping[str, Any]], answer: Classes, precision: str
) -> dict[str, nn.Module]:
    """Returns the models by label.

    Raises:
        UserError: Fewer than two, or models that have other classes.
    """
    if len(members) < 2:
        raise UserError(
            f"config.model.members: {len(members)} of them ({', '.join(members)}), and 2 "
            "at least learn from one another; task.name='classify' trains one model"
        )
    classes = {
        label: logits_asked(described["classes"], answer)
        for label, described in members.items()
    }
    if len(set(classes.values())) > 1:
        raise UserError(
            "config.model.members: they have other numbers of classes, so that they "
            "cannot be compared: "
            + ", ".join(f"{label} {count}" for label, count in classes.items())
        )
    return {
        label: model_of(described, classes=classes[label], precision=precision)
        for label, described in members.items()
    }
