"""Teachers: models that a loss reads and no update changes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core import pytrees
from finetune_jax.core.errors import UserError, raise_if, under
from finetune_jax.models import model_of
from finetune_jax.models.modes import EVALUATION, apply_model
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.objectives.feature_losses import (
    Pair,
    Regressors,
    make_pairs,
    regressor_widths,
)
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.layout import recognise
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata.labels import are_places, keys, names_at
from finetune_jax.weights.prefixes import without_prefix

# Address of the model before the first update.
START = "start"
# Prefix of the linear maps from the student's features to a teacher's.
REGRESSOR = "regressor"
# The head whose logits are compared with a teacher's.
HEADS = ("own", "teacher")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that is read and never updated.

    Attributes:
        module: The model.
        address: Address of its weights, or 'start'.
        entry: Entry of the checkpoint there; None is the usual one.
        where: Its key in the config, for messages.
        class_names: Class names of its logits, if known.
        classes: Number of its logits.
        taps: Stages whose outputs are returned.
    """

    module: nn.Module
    address: str
    where: str
    class_names: tuple[str, ...] | None
    classes: int
    entry: str | None = None
    taps: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the module."""
        module: Any = self.module
        return module.stages

    def order(self, names: Sequence[str]) -> np.ndarray:
        """Returns the index of the logit of each class in `names`."""
        wanted, own = keys(names, self.class_names or names)
        return np.array([own.index(n) if n in own else k for k, n in enumerate(wanted)])

    def shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns the shapes of its variables, for inputs of a shape."""
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        init = ModelSet(modules={"": self.module}).init
        params, batch_stats = jax.eval_shape(init, jax.random.key(0), x)
        return {"params": params, "batch_stats": batch_stats}

    def variables(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns its variables as stored in the weights, on the host.

        Raises:
            UserError: The weights cannot be read, or do not fit.
        """
        zeros = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.shapes(shape)
        )
        with under(self.where), under(self.where, instead_of="config.init"):
            weights = read_weights(self.address, self.entry)
            weights = without_prefix(weights, dict(pytrees.named(zeros)))
            return load_weights(zeros, weights, accept=None)

    def layout(
        self, shape: tuple[int, ...], names: Sequence[str]
    ) -> tuple[str, list[str]]:
        """Returns the name of the layout of its weights, and lines about them.

        Args:
            shape: Shape of one input.
            names: Class names of the data.
        """
        weights = read_weights(self.address, self.entry)
        leaves = dict(pytrees.named(self.shapes(shape)))
        weights = without_prefix(weights, leaves)
        found = recognise(leaves, weights.tensors, self.address).name
        line = f"{self.where}, a teacher: {self.address} (layout: {found})"
        if self.class_names is None:
            line += (
                "; its classes are not named and are taken in order for "
                f"{', '.join(names[:20])}"
            )
        return found, [line, *weights.notes]

    def sha256(self) -> dict[str, str]:
        """Returns the digest of each file of its weights, by path."""
        if self.address == START:
            return {}
        return dict(read_weights(self.address, self.entry).sha256)

    def outputs(self, variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        """Returns 'logits', and the output of each tapped stage."""

        def run(x: Any, **stages: Any) -> Any:
            return _run(self.module, variables, x, **stages)

        logits, found = tapped(run, self.stages, self.taps, inputs)
        return {"logits": logits, **found}

    def head_logits(self, variables: Mapping[str, Any], features: Any) -> jax.Array:
        """Returns the logits of its last stage for features of another model."""
        return _run(self.module, variables, features, first=self.stages[-1])


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teachers of a task.

    Attributes:
        members: Teachers by label.
        shape: Shape of one input.
        class_names: Class names of the data.
        compares_classes: Whether their own logits are compared, class by class.
    """

    members: Mapping[str, Teacher]
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    compares_classes: bool

    def variables(self, start: Any) -> dict[str, Any]:
        """Returns the variables of each teacher, on the host.

        Args:
            start: The state before the first update; no buffer of it is returned.
        """
        return {
            label: own_variables(start)
            if teacher.address == START
            else teacher.variables(self.shape)
            for label, teacher in self.members.items()
        }

    def shapes(self) -> dict[str, Any]:
        """Returns the shapes of `variables`, without reading any weights."""
        return {k: teacher.shapes(self.shape) for k, teacher in self.members.items()}

    def problems(self) -> list[str]:
        """Returns the teachers whose classes are not those of the data."""
        if not self.compares_classes:
            return []
        return [
            problem
            for teacher in self.members.values()
            for problem in class_problems(teacher, self.class_names)
        ]

    def sha256(self) -> dict[str, str]:
        """Returns the digest of each weight file, by path."""
        digests = [teacher.sha256() for teacher in self.members.values()]
        return {path: sha256 for of in digests for path, sha256 in of.items()}

    def layouts(self) -> dict[str, tuple[str, list[str]]]:
        """Returns the layout of each teacher's weights, and lines about it, by label.

        Raises:
            UserError: The weights cannot be read, or do not fit.
        """
        return {
            label: teacher.layout(self.shape, self.class_names)
            for label, teacher in self.members.items()
            if teacher.address != START
        }

    def outputs(self, variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        """Returns the outputs of each teacher, arrays of one row per example.

        They are cached if the examples are the same in every update.
        """
        return {
            label: teacher.outputs(variables[label], inputs)
            for label, teacher in self.members.items()
        }


def own_variables(state: Any) -> dict[str, Any]:
    """Returns the student's variables in a state, copied to the host."""
    params = {name: of for name, of in state.params.items() if name != REGRESSOR}
    trees = {"params": params, "batch_stats": state.batch_stats}
    return jax.tree.map(np.array, trees)


def _run(module: nn.Module, variables: Mapping[str, Any], x: Any, **stages: Any) -> Any:
    """Returns the output of a model or of some of its stages, in evaluation."""
    return apply_model(module, "", variables, x, mode=EVALUATION, **stages)[0]


def tapped(
    run: Callable,
    stages: Sequence[str],
    wanted: Sequence[str],
    x: Any,
    first: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the output of a model, and the outputs of some of its stages.

    Args:
        run: Returns the output of stages `first` to `last` from the input of `first`.
        stages: Stages of the model.
        wanted: Stages, none of them the last or before `first`.
        x: Input of `first`.
        first: The stage to begin with; None is the first.
    """
    found: dict[str, Any] = {}
    for stage, following in zip(stages, stages[1:]):
        if stage in wanted:
            x = found[stage] = run(x, first=first, last=stage)
            first = following
    return run(x, first=first, last=None), found


def stage_shapes(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the output shapes of a model's stages for one input."""

    def outputs(x: Any) -> dict[str, Any]:
        variables = module.init(jax.random.key(0), x, train=False)

        def run(x: Any, **stages: Any) -> Any:
            return _run(module, variables, x, **stages)

        return tapped(run, module.stages, module.stages[:-1], x)[1]

    return jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def make_teachers(
    members: Mapping[str, Mapping[str, Any]],
    *,
    data_names: tuple[str, ...],
    precision: str,
) -> dict[str, Teacher]:
    """Returns the teachers by label. Their weights are not read yet.

    Args:
        members: Section of each model, with `pretrained` and `entry`, the address of its
            weights and the entry there.
        data_names: Class names of the data; a teacher without known classes has as many.
        precision: 'float32', 'bfloat16' or 'float64'.

    Raises:
        UserError: No members, or unknown models.
    """
    if not members:
        raise UserError(
            "config.model.members: empty, and one teacher at least is needed: an entry "
            "with what config.model says of a model, and the address of its weights as "
            "`pretrained`"
        )
    found = {}
    for index, (label, described) in enumerate(members.items()):
        own = ("pretrained", "entry")
        model = {key: value for key, value in described.items() if key not in own}
        address = described["pretrained"]
        names = None if address == START else saved_class_names(address, data_names)
        count = described["classes"] or len(names or data_names)
        found[label] = Teacher(
            module=model_of(model, classes=count, precision=precision),
            address=address,
            entry=described["entry"],
            where=f"config.model.members[{index}]",
            class_names=names if names and len(names) == count else None,
            classes=count,
        )
    return found


def saved_class_names(
    address: str, data_names: Sequence[str]
) -> tuple[str, ...] | None:
    """Returns the class names of the weights at an address; None if unknown.

    Args:
        address: Address of a former run with a manifest, or of weights with a file of
            class names beside them.
        data_names: Class names of the data. If they are numbers and no name is the same,
            they may stand for the classes of the weights.
    """
    found = names_at(address)
    if not found or address.startswith("orbax:"):
        return found or None
    ours, theirs = keys(data_names, found)
    are_others = are_places(data_names) and not set(ours) & set(theirs)
    return None if are_others else found


def class_problems(teacher: Teacher, names: Sequence[str]) -> list[str]:
    """Returns the differences between a teacher's classes and those of the data."""
    advice = (
        "; task.head='teacher' compares the logits of its own head, and alpha=0.0 only "
        "its features"
    )
    theirs = teacher.class_names
    if theirs is None:
        if teacher.classes == len(names):
            return []
        return [
            f"{teacher.where}: a teacher of {teacher.classes} classes, and the data has "
            f"{len(names)}{advice}"
        ]
    our_keys, their_keys = keys(names, theirs)
    lacks = [n for n, key in zip(names, our_keys) if key not in their_keys]
    more = [n for n, key in zip(theirs, their_keys) if key not in our_keys]
    if not lacks and not more:
        return []
    said = [f"it does not know {', '.join(lacks[:20])}"] if lacks else []
    said += [f"the data has no {', '.join(more[:20])}"] if more else []
    return [f"{teacher.where}: a teacher of other classes: {'; '.join(said)}{advice}"]


def range_problems(*, something: Any, **values: float) -> list[str]:
    """Returns the values out of range, and a problem if the teachers are not used."""
    problems = [
        f"config.task.{name}: {value}; 0 or more is needed"
        for name, value in values.items()
        if not value >= 0
    ]
    if values["alpha"] > 1:
        problems.append(f"config.task.alpha: {values['alpha']}; at most 1 is possible")
    if values["temperature"] == 0:
        problems.append("config.task.temperature: 0; more than 0 is needed")
    if not something:
        problems.append(
            "config.task.alpha: 0, and there are neither hints nor attention, so that "
            "nothing is learned from teachers; task.name='classify' has none"
        )
    return problems


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student, its teachers, and the stages that are compared.

    Attributes:
        models: The student, and the maps from its features to a teacher's.
        teachers: Teachers by label, with the tapped stages.
        hints: Stages whose features are compared.
        attention: Stages whose attention maps are compared.
    """

    models: ModelSet
    teachers: Mapping[str, Teacher]
    hints: tuple[Pair, ...] = ()
    attention: tuple[Pair, ...] = ()


def compare(
    student: Any, teachers: Mapping[str, Teacher], shape: tuple[int, ...],
    head: str, hints: Any, attention: Any,
) -> Comparison:  # fmt: skip
    """Returns the models of a student, and the stages that are compared.

    Args:
        student: The model that is trained.
        teachers: Teachers by label.
        shape: Shape of one input.
        head: One of `HEADS`.
        hints: (stage of the student, stage of a teacher) whose features are compared.
        attention: (stage of the student, stage of a teacher) whose attention is compared.

    Raises:
        UserError: Lists unknown stages, and stages whose features do not fit.
    """
    problems = [
        f"{teacher.where}: the model before the first update is config.model's; remove "
        "its other keys"
        for teacher in teachers.values()
        if teacher.address == START and teacher.module != student
    ]
    plain = not (hints or attention or head == "teacher")
    found: dict[str, Any] = {"hints": (), "attention": ()}
    modules: dict[str, nn.Module] = {"": student}
    own: dict[str, Any] = {}
    if not plain:
        own = stage_shapes(student, shape)
        theirs = {k: stage_shapes(t.module, shape) for k, t in teachers.items()}
        for key, entries in (("hints", hints), ("attention", attention)):
            found[key], wrong = make_pairs(key, entries, own=own, theirs=theirs)
            problems += wrong
        if widths := regressor_widths(found["hints"], own, theirs):
            modules[REGRESSOR] = Regressors(
                widths=widths, dtype=student.dtype, param_dtype=student.param_dtype
            )
        problems += [
            f"config.task.head: 'teacher', but the input of the head is "
            f"{before.shape[1:]} in {label}, and {mine.shape[1:]} in the model"
            for label, shapes in theirs.items()
            for before, mine in [(list(shapes.values())[-1], list(own.values())[-1])]
            if head == "teacher" and before.shape != mine.shape
        ]
    raise_if(problems, "The teachers do not fit:")
    pairs = found["hints"] + found["attention"]
    taps = {
        label: tuple(p.theirs for p in pairs if p.label == label) for label in teachers
    }
    features = {
        pair.name: jax.ShapeDtypeStruct(own[pair.own].shape, student.param_dtype)
        for pair in found["hints"]
    }
    models = ModelSet(
        modules=modules,
        auxiliary=frozenset({REGRESSOR}),
        examples={REGRESSOR: features},
        # Features of earlier stages are compared, so they must be computed.
        cacheable=plain,
    )
    made = {k: dataclasses.replace(t, taps=taps[k]) for k, t in teachers.items()}
    return Comparison(models=models, teachers=made, **found)
