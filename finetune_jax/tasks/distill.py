"""Distillation: a model is trained on labels and on the outputs of teachers.

The teachers are `config.model.members`, each with the address of its weights; they are
never updated. `config.model` is the student, whose parameters have the same names as
without teachers. Where compared features have other widths, `regressor/NAME/...` are
linear maps between them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import raise_if
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
from finetune_jax.tasks.components.teachers import (
    HEADS,
    REGRESSOR,
    Teacher,
    Teachers,
    compare,
    make_teachers,
    range_problems,
    tapped,
)
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.objectives.feature_losses import (
    Pair,
    attention_apart,
    half_square,
)
from finetune_jax.tasks.task import TEACHER_OUTPUTS, LossOutput, StepContext

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
MEMBERS = "teachers"
METRICS = ("accuracy", "loss")
OPTIONS = TargetOptions()


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """The training loss of a student.

    Attributes:
        teachers: Teachers by label.
        class_names: Class names of the data.
        alpha: Share of the teachers' predictions in the loss; the labels have the rest.
        temperature: Divisor of the logits where predictions are compared.
        head: 'own' or 'teacher': the head whose logits are compared with a teacher's.
        hints: Stages whose features are compared.
        hints_weight: Factor of their distance.
        attention: Stages whose attention maps are compared.
        attention_weight: Factor of their distance.
    """

    teachers: Mapping[str, Teacher]
    class_names: tuple[str, ...]
    alpha: float
    temperature: float
    head: str
    hints: tuple[Pair, ...]
    hints_weight: float
    attention: tuple[Pair, ...]
    attention_weight: float

    def loss(
        self,
        models: ModelSet,
        target: ClassTarget,
        variables: Mapping[str, Any],
        batch: dict,
        context: StepContext,
    ) -> LossOutput:
        """Returns the weighted loss; the metrics are its terms before weighting.

        Terms are averaged over teachers and summed over pairs of stages.
        """
        logits_BxK, features, batch_stats = self.student(
            models, variables, batch["inputs"], context
        )
        labels = target.loss(logits_BxK, batch)
        count, taught = labels.weight, batch[TEACHER_OUTPUTS]
        found = {**labels.metrics, "label_loss": (labels.total, count)}
        weight_B = target.weights(logits_BxK, batch)
        total, terms = (1 - self.alpha) * labels.total, {}
        if self.alpha:
            terms["divergence"] = (
                self.alpha,
                self._divergence(models, logits_BxK, features, context.fixed, taught),
            )
        if self.hints:
            mapped = self.mapped(models, variables, features, context)
            terms["hints"] = (
                self.hints_weight,
                sum(
                    half_square(mapped[pair.name], taught[pair.label][pair.theirs])
                    for pair in self.hints
                ),
            )
        if self.attention:
            terms["attention"] = (
                self.attention_weight,
                sum(
                    attention_apart(features[pair.own], taught[pair.label][pair.theirs])
                    for pair in self.attention
                ),
            )
        for name, (share, each_B) in terms.items():
            value = jnp.sum(each_B * weight_B)
            total += share * value
            found[name] = value, count
        found["loss"] = total, count
        return LossOutput(total, count, found, batch_stats)

    def student(
        self,
        models: ModelSet,
        variables: Mapping[str, Any],
        x: Any,
        context: StepContext,
    ) -> tuple[jax.Array, dict[str, Any], Any]:
        """Returns the student's logits, compared features, and batch statistics."""
        wanted = {pair.own for pair in (*self.hints, *self.attention)}
        if self.head == "teacher":
            wanted.add(_before_head(models))
        stats = variables["batch_stats"]

        def run(x: Any, **stages: Any) -> Any:
            nonlocal stats
            y, stats = models.apply(
                {"params": variables["params"], "batch_stats": stats},
                x,
                mode=context.mode,
                rng=context.rng,
                **stages,
            )
            return y

        logits_BxK, found = tapped(
            run, models[""].stages, tuple(wanted), x, context.first
        )
        return logits_BxK, found, stats

    def _divergence(
        self,
        models: ModelSet,
        logits_BxK: jax.Array,
        features: dict,
        fixed: Any,
        taught: Mapping,
    ) -> jax.Array:
        """Returns the mean over teachers of the divergence of predictions, [B]."""
        apart = []
        for label, teacher in self.teachers.items():
            own_BxK, their_BxK = logits_BxK, taught[label]["logits"]
            if self.head == "teacher":
                own_BxK = teacher.head_logits(
                    fixed[label], features[_before_head(models)]
                )
            else:
                their_BxK = their_BxK[:, teacher.order(self.class_names)]
                own_BxK = own_BxK[:, : len(self.class_names)]
            apart.append(
                losses.divergence(their_BxK, own_BxK, temperature=self.temperature)
            )
        return jnp.stack(apart).mean(axis=0)

    def mapped(
        self,
        models: ModelSet,
        variables: Mapping[str, Any],
        features: dict,
        context: StepContext,
    ) -> dict[str, Any]:
        """Returns features mapped to the width of a teacher's, by name of the pair."""
        own = {pair.name: features[pair.own] for pair in self.hints}
        if REGRESSOR not in models.modules:
            return own
        mapped, _ = models.apply(variables, own, prefix=REGRESSOR, mode=context.mode)
        return own | mapped


def _before_head(models: ModelSet) -> str:
    return models[""].stages[-2]


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    teachers: Mapping[str, Mapping[str, Any]],
    precision: str,
    alpha: float = 0.5,
    temperature: float = 4.0,
    head: str = "own",
    hints: tuple[tuple[str, str], ...] = (),
    hints_weight: float = 1.0,
    attention: tuple[tuple[str, str], ...] = (),
    attention_weight: float = 1000.0,
    options: TargetOptions = OPTIONS,
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`, of the student.
        teachers: Section of each teacher with its `pretrained`, by label.
        precision: 'float32', 'bfloat16' or 'float64'.
        alpha: Share of the teachers' predictions in the loss; the labels have the rest.
        temperature: Divisor of the logits where predictions are compared.
        head: 'own', or 'teacher': compares the logits of the teacher's own head on the
            student's features, so that features keep what they meant for the classes of
            an earlier data set.
        hints: (stage of the student, stage of the teacher) whose features are compared;
            with several teachers the second is 'LABEL/stage'.
        hints_weight: Factor of their distance.
        attention: (stage of the student, stage of the teacher) whose attention maps are
            compared.
        attention_weight: Factor of their distance; the default is that of the source.
        options: Loss of the labels, and metrics.

    Raises:
        UserError: Unknown teachers or stages, or some that do not fit.

    Source: Hinton et al. 2015 (logits); Romero et al. 2015 (features); Zagoruyko &
    Komodakis 2017 (attention); Li & Hoiem 2016 (the teacher's head, which is trained there
    and fixed here).
    """
    check_classified(data)
    target = class_target(data, options, METRICS)
    registry.choose(dict.fromkeys(HEADS), head, "config.task.head")
    problems = range_problems(
        alpha=alpha, temperature=temperature, hints_weight=hints_weight,
        attention_weight=attention_weight, something=alpha or hints or attention,
    )  # fmt: skip
    raise_if(problems, "config.task does not fit:")
    student: Any = model_for(target, model, precision=precision)
    made = make_teachers(teachers, data_names=target.names, precision=precision)
    found = compare(student, made, data.shape, head, hints, attention)
    return SupervisedTask(
        models=found.models,
        inputs=ImageInputs(data=data, dtype=student.param_dtype),
        target=target,
        objective=Distillation(
            teachers=found.teachers, class_names=data.class_names, alpha=alpha,
            temperature=temperature, head=head, hints=found.hints,
            hints_weight=hints_weight, attention=found.attention,
            attention_weight=attention_weight,
        ),
        teachers=Teachers(
            members=found.teachers, shape=data.shape, class_names=data.class_names,
            compares_classes=alpha > 0 and head != "teacher",
        ),
    )  # fmt: skip
