"""Models that teach: where they come from, and what they say of a batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core import pytrees
from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.models import model_of
from finetune_jax.tasks.objectives.feature_losses import (
    Regressors,
    make_pairs,
    regressor_widths,
)
from finetune_jax.tasks.task import EVALUATION, apply_model
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.layout import recognise
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata.labels import are_places, keys, names_at
from finetune_jax.weights.prefixes import without_prefix

# The address of the model as the run begins with it.
START = "start"
# The prefix of what maps a student's features to a teacher's.
REGRESSOR = "regressor"
# Whose logits are compared with a teacher's.
HEADS = ("own", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that is read and never updated.

    Attributes:
        module: The model.
        address: Of its weights, or 'start'.
        entry: Entry of the checkpoint there; None is the usual one.
        where: In the config, for messages.
        class_names: Of its logits, where the address tells.
        classes: How many logits it has.
        taps: Stages whose output is asked for.
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
        """Of the module."""
        module: Any = self.module
        return module.stages

    def order(self, names: Sequence[str]) -> np.ndarray:
        """Returns which logits are those of some classes, in the order of these."""
        wanted, own = keys(names, self.class_names or names)
        return np.array([own.index(n) if n in own else k for k, n in enumerate(wanted)])

    def shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns the shapes of its variables.

        Args:
            shape: Of one input.
        """
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        init = jax.eval_shape(
            lambda x: self.module.init(jax.random.key(0), x, train=False), x
        )
        module: Any = self.module
        averages = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, module.param_dtype),
            init.get("batch_stats", {}),
        )
        return {"params": init["params"], "batch_stats": averages}

    def variables(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns its variables as the weights have them, on the host.

        Raises:
            UserError: The weights cannot be read, or do not fit.
        """
        zeros = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.shapes(shape)
        )
        with_address = f"{self.where}.pretrained"
        try:
            weights = read_weights(self.address, self.entry)
            weights = without_prefix(weights, dict(pytrees.named(zeros)))
            return load_weights(zeros, weights, accept=None)
        except UserError as error:
            # What reads weights blames the key that they mostly come from.
            text = str(error).replace("config.init.pretrained", with_address)
            text = text.replace("config.init.entry", f"{self.where}.entry")
            raise UserError(f"{self.where}, a teacher: {text}") from error

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
                "; nothing says what its classes are: in their order they are taken for "
                f"{', '.join(names[:20])}"
            )
        return found, [line, *weights.notes]

    def sha256(self) -> dict[str, str]:
        """Returns the digest of each file of its weights, by path."""
        if self.address == START:
            return {}
        return dict(read_weights(self.address, self.entry).sha256)

    def says(self, variables: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        """Returns 'logits', and the output of each stage that is asked for."""

        def run(x: Any, **stages: Any) -> Any:
            return apply_model(
                self.module, "", variables, x, mode=EVALUATION, **stages
            )[0]

        logits, found = tapped(run, self.stages, self.taps, inputs)
        return {"logits": logits, **found}

    def judges(self, variables: Mapping[str, Any], features: Any) -> jax.Array:
        """Returns the logits that its last stage gives of features of another model."""
        last = self.stages[-1]
        return apply_model(
            self.module, "", variables, features, mode=EVALUATION, first=last
        )[0]


def own_variables(state: Any) -> dict[str, Any]:
    """Returns the variables of the model that learns in a state, copied to the host."""
    params = {name: of for name, of in state.params.items() if name != REGRESSOR}
    trees = {"params": params, "batch_stats": state.batch_stats}
    return jax.tree.map(np.array, trees)


def tapped(
    run: Callable,
    stages: Sequence[str],
    wanted: Sequence[str],
    x: Any,
    first: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns what a model gives, and the outputs of some of its stages on the way.

    Args:
        run: Returns the output of stages `first` to `last` from the input of `first`.
        stages: Of the model.
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
    """Returns the shapes that the stages of a model give for one input."""

    def outputs(x: Any) -> dict[str, Any]:
        variables = module.init(jax.random.key(0), x, train=False)

        def run(x: Any, **stages: Any) -> Any:
            return apply_model(module, "", variables, x, mode=EVALUATION, **stages)[0]

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
        members: What describes each model, and `pretrained` and `entry`, the address of
            its weights and the entry there.
        data_names: Of the data's classes; a teacher of which nothing else is known has
            as many.
        precision: 'float32', 'bfloat16' or 'float64'.

    Raises:
        UserError: There are none, or models that there are not.
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
    """Returns the classes that the model at an address learned, where something tells.

    Args:
        address: Address of a former run, whose manifest tells, or of weights with a file
            beside them.
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
    """Returns why a teacher's logits are not those of some classes; nothing if they are.

    Args:
        teacher: The teacher.
        names: Of the classes of the data.
    """
    advice = (
        "; task.head='teacher' compares what its own head says, and alpha=0.0 its "
        "features alone"
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
    """Returns what is out of range, and whether nothing is to be learned of teachers."""
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


def compared(
    student: nn.Module, teachers: Mapping[str, Teacher], shape: tuple[int, ...],
    head: str, hints: Any, attention: Any,
) -> dict[str, Any]:  # fmt: skip
    """Returns what a task has of models, and of stages that are compared.

    Args:
        student: The model that learns.
        teachers: By label.
        shape: Of one input.
        head: One of `HEADS`.
        hints: (stage of the student, stage of a teacher), whose features are compared.
        attention: Likewise, whose attention is.

    Returns:
        'models' by prefix, 'teachers' with the stages that are asked for, 'hints' and
        'attention'.

    Raises:
        UserError: Lists stages that there are not, or whose features do not fit.
    """
    problems = [
        f"{teacher.where}: the model as the run begins with it is config.model's; leave "
        "out what else is said of it"
        for teacher in teachers.values()
        if teacher.address == START and teacher.module != student
    ]
    models: dict[str, nn.Module] = {"": student}
    found: dict[str, Any] = {"hints": (), "attention": ()}
    if hints or attention or head == "teacher":
        module: Any = student
        own = stage_shapes(module, shape)
        theirs = {k: stage_shapes(t.module, shape) for k, t in teachers.items()}
        for key, entries in (("hints", hints), ("attention", attention)):
            found[key], wrong = make_pairs(key, entries, own=own, theirs=theirs)
            problems += wrong
        if widths := regressor_widths(found["hints"], own, theirs):
            models[REGRESSOR] = Regressors(
                widths=widths, dtype=module.dtype, param_dtype=module.param_dtype
            )
        problems += [
            f"config.task.head: 'teacher', but what comes before the head is "
            f"{before.shape[1:]} in {label}, and {mine.shape[1:]} in the model"
            for label, shapes in theirs.items()
            for before, mine in [(list(shapes.values())[-1], list(own.values())[-1])]
            if head == "teacher" and before.shape != mine.shape
        ]
    if problems:
        raise problems_error("The teachers do not fit:", problems)
    pairs = found["hints"] + found["attention"]
    taps = {
        label: tuple(p.theirs for p in pairs if p.label == label) for label in teachers
    }
    made = {k: dataclasses.replace(t, taps=taps[k]) for k, t in teachers.items()}
    return {"models": models, "teachers": made, **found}
