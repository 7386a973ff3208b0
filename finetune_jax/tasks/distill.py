"""Distillation: a model learns from labels and from what teachers make of the examples.

The teachers are `config.model.members`, each with the address of its weights; they are
read and never updated. `config.model` is the student, whose parameters are named as if it
learned alone. Where features of other widths are compared, `regressor/NAME/...` learns
maps between them.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import problems_error
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.image_inputs import (
    Mixed,
    check_classified,
    random_variables,
)
from finetune_jax.tasks.components.single_model import Answering
from finetune_jax.tasks.components.targets import Classes, logits_asked, make_classes
from finetune_jax.tasks.components.teachers import (
    HEADS,
    REGRESSOR,
    START,
    Teacher,
    class_problems,
    compared,
    make_teachers,
    own_variables,
    range_problems,
    stage_shapes,
    tapped,
)
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.objectives.feature_losses import (
    Pair,
    attention_apart,
    half_square,
)
from finetune_jax.tasks.task import Mode, Task, apply, key_of

# Kinds of data and of labels.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
METRICS = ("accuracy", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Mixed, Answering):
    """A classifier that has teachers.

    Attributes:
        models: The student under '', and under 'regressor' what maps its features.
        data: What the examples look like.
        answer: Has the loss of labels, and metrics.
        teachers: By label.
        alpha: Share of the teachers' predictions in the loss; that of labels is the rest.
        temperature: By which logits are divided where predictions are compared.
        head: 'own' or 'teacher': which head's logits are compared with a teacher's.
        hints: Stages whose features are compared, each multiplied by `hints_weight`.
        hints_weight: See `hints`.
        attention: Stages whose attention is compared.
        attention_weight: See `attention`.
    """

    answer: Classes
    teachers: Mapping[str, Teacher]
    alpha: float
    temperature: float
    head: str
    hints: tuple[Pair, ...]
    hints_weight: float
    attention: tuple[Pair, ...]
    attention_weight: float

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        student = {"": self.models[""]}
        params, stats = random_variables(student, self.data.shape, rng, self.kind)
        if REGRESSOR in self.models:
            shapes = stage_shapes(self.models[""], self.data.shape)
            x = {
                pair.name: jnp.zeros(shapes[pair.own].shape, self.kind)
                for pair in self.hints
            }
            key, module = key_of(rng, REGRESSOR), self.models[REGRESSOR]
            params = {**params, REGRESSOR: module.init(key, x)["params"]}
        return params, stats

    def fixed(self, start: Any, *, training: bool = True) -> Any:
        """Returns the variables of the teachers by label; without training, nothing."""
        if not training:
            return {}
        return {
            label: own_variables(start)
            if teacher.address == START
            else teacher.variables(self.data.shape)
            for label, teacher in self.teachers.items()
        }

    def fixed_shapes(self, start: Any) -> Any:
        """Returns the shapes of what `fixed` returns."""
        del start
        return {
            label: teacher.shapes(self.data.shape)
            for label, teacher in self.teachers.items()
        }

    def check_fixed(self) -> list[str]:
        """Returns which teachers' predictions are not about the classes of the data."""
        if self.alpha == 0 or self.head == "teacher":
            return []
        return [
            problem
            for teacher in self.teachers.values()
            for problem in class_problems(teacher, self.data.class_names)
        ]

    def fixed_sha256(self) -> dict[str, str]:
        """Returns the digest of each file that teachers are read from, by path."""
        found: dict[str, str] = {}
        for teacher in self.teachers.values():
            found |= teacher.sha256()
        return found

    def fixed_layouts(self) -> dict[str, tuple[str, list[str]]]:
        """Returns the layout of each teacher's weights, and lines about it, by label."""
        return {
            label: teacher.layout(self.data.shape, self.data.class_names)
            for label, teacher in self.teachers.items()
            if teacher.address != START
        }

    def served(self) -> Task:
        """Returns the task of the student alone."""
        models = {"": self.models[""]}
        return dataclasses.replace(
            self, models=models, teachers={}, hints=(), attention=()
        )

    def first_learning(self, mode: Mode) -> str | None:
        """Returns what any task does; nothing where earlier features are compared."""
        pairs = self.hints or self.attention or self.head == "teacher"
        return None if pairs else super().first_learning(mode)

    @property
    def is_taught(self) -> bool:
        """It has teachers."""
        return True

    def taught(self, fixed: Any, batch: dict) -> dict:
        """Returns what each teacher says of a prepared batch."""
        return {
            label: teacher.says(fixed[label], batch["inputs"])
            for label, teacher in self.teachers.items()
        }

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
        """Returns the weighed loss; of its parts, as they are before that, metrics.

        What several teachers say is averaged, and what several pairs of stages do is
        summed.
        """
        del progress
        logits_BxK, features, batch_stats = self._student(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        (of_labels, count), found = self.answer.loss(logits_BxK, batch)
        found["label_loss"] = of_labels, count
        weight_B = self.answer.weights(logits_BxK, batch)
        total, taught = (1 - self.alpha) * of_labels, batch["taught"]
        parts = {}
        if self.alpha:
            apart_B = self._apart(logits_BxK, features, fixed, taught)
            parts["divergence"] = self.alpha, apart_B
        if self.hints:
            mapped = self._mapped(params, features, mode)
            parts["hints"] = (
                self.hints_weight,
                sum(
                    half_square(mapped[pair.name], taught[pair.label][pair.theirs])
                    for pair in self.hints
                ),
            )
        if self.attention:
            parts["attention"] = (
                self.attention_weight,
                sum(
                    attention_apart(features[pair.own], taught[pair.label][pair.theirs])
                    for pair in self.attention
                ),
            )
        for name, (share, each_B) in parts.items():
            value = jnp.sum(each_B * weight_B)
            total += share * value
            found[name] = value, count
        found["loss"] = total, count
        return (total, count), (batch_stats, found)

    def _student(
        self, params: Any, batch_stats: Any, batch: dict, *, mode: Mode,
        first: str | None, rng: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any], Any]:  # fmt: skip
        """Returns the student's logits, what its stages give, and batch statistics."""
        module: Any = self.models[""]
        wanted = {pair.own for pair in (*self.hints, *self.attention)}
        if self.head == "teacher":
            wanted.add(self._before_head)
        stats = batch_stats

        def run(x: Any, **stages: Any) -> Any:
            nonlocal stats
            variables = {"params": params, "batch_stats": stats}
            y, stats = apply(self, "", variables, x, mode=mode, rng=rng, **stages)
            return y

        x = batch["features" if first else "inputs"]
        logits_BxK, found = tapped(run, module.stages, tuple(wanted), x, first)
        return logits_BxK, found, stats

    def _apart(
        self, logits_BxK: jax.Array, features: dict, fixed: Any, taught: Mapping
    ) -> jax.Array:
        """Returns the mean over teachers of how far predictions are from theirs, [B]."""
        apart = []
        for label, teacher in self.teachers.items():
            own_BxK, their_BxK = logits_BxK, taught[label]["logits"]
            if self.head == "teacher":
                own_BxK = teacher.judges(fixed[label], features[self._before_head])
            else:
                names = self.data.class_names
                their_BxK = their_BxK[:, teacher.order(names)]
                own_BxK = own_BxK[:, : len(names)]
            apart.append(
                losses.divergence(their_BxK, own_BxK, temperature=self.temperature)
            )
        return jnp.stack(apart).mean(axis=0)

    @property
    def _before_head(self) -> str:
        module: Any = self.models[""]
        return module.stages[-2]

    def _mapped(self, params: Any, features: dict, mode: Mode) -> dict[str, Any]:
        """Returns features as they are compared with a teacher's, by name of the pair."""
        own = {pair.name: features[pair.own] for pair in self.hints}
        if REGRESSOR not in self.models:
            return own
        variables = {"params": params[REGRESSOR], "batch_stats": {}}
        mapped, _ = apply(self, REGRESSOR, variables, own, mode=mode)
        return own | mapped


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
    loss: str = "cross_entropy",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...] = METRICS,
) -> Distill:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`, of the student.
        teachers: What describes each teacher, `pretrained` among it, by label.
        precision: 'float32', 'bfloat16' or 'float64'.
        alpha: Share of the teachers' predictions in the loss; that of labels is the rest.
        temperature: By which logits are divided where predictions are compared.
        head: 'own', or 'teacher': the logits that are compared are those of the teacher's
            own head on the features that the student's has, so that what the features
            said of a former data set's classes is not forgotten.
        hints: (stage of the student, stage of the teacher), whose features are compared;
            with several teachers the other is 'LABEL/stage'.
        hints_weight: By which their distance is multiplied.
        attention: Likewise, whose attention is compared.
        attention_weight: By which that is multiplied; the default is that of the source.
        loss: Of labels, a name in `losses.CLASSIFICATION`.
        loss_args: Its arguments by name.
        label_smoothing: As in `classify`.
        class_weights: As in `classify`.
        top_k: Classes that a prediction names.
        metrics: As in `classify`.

    Raises:
        UserError: Teachers or stages that there are not or that do not fit.

    Source: Hinton et al. 2015 (logits); Romero et al. 2015 (features); Zagoruyko &
    Komodakis 2017 (attention); Li & Hoiem 2016 (the teacher's head, which there learns on
    and here stays as it is).
    """
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
    registry.choose(dict.fromkeys(HEADS), head, "config.task.head")
    if problems := range_problems(
        alpha=alpha, temperature=temperature, hints_weight=hints_weight,
        attention_weight=attention_weight, something=alpha or hints or attention,
    ):  # fmt: skip
        raise problems_error("config.task does not fit:", problems)
    classes = logits_asked(model["classes"], answer)
    student = model_of(model, classes=classes, precision=precision)
    made = make_teachers(teachers, data_names=answer.names, precision=precision)
    return Distill(
        **compared(student, made, data.shape, head, hints, attention),
        data=data, answer=answer, alpha=alpha, temperature=temperature, head=head,
        hints_weight=hints_weight, attention_weight=attention_weight,
    )  # fmt: skip
