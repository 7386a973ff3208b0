"""Mutual learning: models are trained on labels and on each other's predictions.

The parameters of a member begin with its label, `LABEL/stage/...`. Metrics without a
label are those of the averaged probabilities, `LABEL/name` those of one member.

Source: Zhang et al. 2018, "Deep mutual learning", equations 6 and 7.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.members import labels_of
from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.image_inputs import ImageInputs, check_classified
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.supervised import SupervisedTask
from finetune_jax.tasks.components.targets import (
    ClassTarget,
    TargetOptions,
    class_target,
    model_for,
)
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.task import ExampleScores, LossOutput

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
MEMBERS = "members"
METRICS = ("accuracy", "loss")
OPTIONS = TargetOptions()


def measured(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the metrics of a split: of all members together, and of each."""
    labels = labels_of(config.model)
    return names + tuple(f"{label}/{name}" for label in labels for name in names)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MutualTarget:
    """One class per example, predicted by several models that teach one another.

    The output of the models is a dict of logits by label of the member.

    Attributes:
        target: The target of each member.
        weight: Weight of the other members' predictions in the loss; labels have 1.
        temperature: Divisor of the logits where predictions are compared.
    """

    target: ClassTarget
    weight: float
    temperature: float

    head_kind = "classes"

    @property
    def logits(self) -> int:
        """Logits of each member."""
        return self.target.logits

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """A class index."""
        return self.target.label

    def loss(self, output: Mapping[str, jax.Array], batch: Mapping) -> LossOutput:
        """Returns the sum of the members' losses, and metrics of each.

        A member's loss is that of the labels plus `weight` times the mean over the others
        of KL(other || member) T^2, where T is the temperature; no gradient flows through
        the other.
        """
        total, count, found = jnp.zeros(()), jnp.zeros(()), {}
        for label, logits_BxK in output.items():
            labels = self.target.loss(logits_BxK, batch)
            count, weight_B = labels.weight, self.target.weights(logits_BxK, batch)
            apart_B = sum(
                losses.divergence(
                    jax.lax.stop_gradient(other_BxK),
                    logits_BxK,
                    temperature=self.temperature,
                )
                for other, other_BxK in output.items()
                if other != label
            ) / (len(output) - 1)
            apart = jnp.sum(apart_B * weight_B)
            total += labels.total + self.weight * apart
            found |= {f"{label}/{name}": pair for name, pair in labels.metrics.items()}
            found[f"{label}/divergence"] = apart, count
        found["loss"] = total, count
        found["accuracy"] = self.target.loss(_mean(output), batch).metrics["accuracy"]
        return LossOutput(total, count, found)

    def outputs(self, output: Mapping[str, jax.Array], batch: Mapping) -> dict:
        """Returns the logits of the averaged probabilities, and `LABEL/logits` of each."""
        each = {f"{label}/logits": values for label, values in output.items()}
        return {**self.target.outputs(_mean(output), batch), **each}

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns logits and averaged probabilities."""
        return self.target.serving_outputs(outputs)

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns the metrics of all members together and of each."""
        found = dict(self.target.metrics(outputs, batch))
        for label, logits in _by_label(outputs):
            own = self.target.metrics({"logits": logits}, batch)
            found |= {f"{label}/{metric}": value for metric, value in own.items()}
        return found

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns the scores of single examples, of all members together and of each."""
        together = self.target.example_scores(outputs, batch)
        found = dict(together.scores)
        for label, logits in _by_label(outputs):
            own = self.target.example_scores({"logits": logits}, batch).scores
            found |= {f"{label}/{metric}": value for metric, value in own.items()}
        return dataclasses.replace(together, scores=found)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the metrics that are undefined on some splits."""
        return self.target.check_splits(labels)

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the classes of the highest averaged probabilities."""
        return self.target.records(outputs, batch)


def _by_label(outputs: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the label of each member and its logits."""
    for name, values in outputs.items():
        label, _, kind = name.rpartition("/")
        if label and kind == "logits":
            yield label, values


def _mean(logits: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the log [B, K] of the members' mean probabilities."""
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
    options: TargetOptions = OPTIONS,
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        members: Section of each model, by label.
        model: The section `config.model`; not used beyond the members.
        precision: 'float32', 'bfloat16' or 'float64'.
        weight: Weight of the other members' predictions in the loss; labels have 1.
        temperature: Divisor of the logits where predictions are compared.
        options: Loss of the labels, and metrics.

    Raises:
        UserError: Fewer than two members, or members with different classes.
    """
    del model
    check_classified(data)
    if options.threshold_rule is not None:
        raise UserError(
            f"config.task.threshold_rule: {options.threshold_rule!r}, but the task has "
            "several models; leave it at None"
        )
    target = class_target(data, options, METRICS)
    if not weight >= 0 or not temperature > 0:
        raise UserError(
            f"config.task: weight={weight}, temperature={temperature}; weight is 0 or "
            "more, temperature above 0"
        )
    modules = _modules(members, target, precision)
    dtype = next(iter(modules.values())).param_dtype
    return SupervisedTask(
        models=ModelSet(modules=modules),
        inputs=ImageInputs(data=data, dtype=dtype),
        target=MutualTarget(target=target, weight=weight, temperature=temperature),
    )


def _modules(
    members: Mapping[str, Mapping[str, Any]], target: ClassTarget, precision: str
) -> dict[str, Any]:
    """Returns the models by label.

    Raises:
        UserError: Fewer than two, or models with different classes.
    """
    if len(members) < 2:
        raise UserError(
            f"config.model.members: {len(members)} of them ({', '.join(members)}), and 2 "
            "at least learn from one another; task.name='classify' trains one model"
        )
    modules = {
        label: model_for(target, section, precision=precision)
        for label, section in members.items()
    }
    classes = {k: of["classes"] or target.logits for k, of in members.items()}
    if len(set(classes.values())) > 1:
        raise UserError(
            "config.model.members: different numbers of classes, which cannot be compared: "
            + ", ".join(f"{label} {count}" for label, count in classes.items())
        )
    return modules
