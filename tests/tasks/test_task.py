"""The contract of tasks, and the mode of their models' stages."""

import abc
import ast
import importlib
import pathlib
from typing import Generic, Protocol

import flax.linen as nn
import flax.struct
import jax
import numpy as np
import pytest
import small

from finetune_jax import tasks
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.models.modes import EVALUATION, Mode
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.task import Task

TWO = (("stage2/.*", 1.0), ("head/.*", 1.0), (".*", 0.0))


def moved(batch_stats, rules=TWO):
    """Returns the stages whose running averages an update moved, and its state."""
    task = small.task("cnn", convolutions=(4, 4), dense=(8,))
    phase = Phase(name="p", steps=1, rules=rules, batch_stats=batch_stats)
    trainer = small.Trainer(task, phase)
    before = named(trainer.state.batch_stats)
    before = {name: np.asarray(leaf) for name, leaf in before.items()}
    trainer.update(small.batch())
    after = named(trainer.state.batch_stats)
    return {n.split("/")[0] for n in before if (before[n] != after[n]).any()}


@pytest.mark.slow
def test_hold_moves_nothing_update_what_learns_update_all_everything():
    assert moved("hold") == set()
    assert moved("update") == {"stage2"}
    assert moved("update_all") == {"stage1", "stage2"}
    assert moved("update", small.HEAD) == set()


class Dropping(nn.Module):
    """Two stages that only drop and normalise, by flax's own layers."""

    stages = ("one", "two")

    def setup(self):
        self.one, self.two = Stage(), Stage()

    def __call__(self, x, *, first=None, last=None, train):
        return self.two(self.one(x, train=train), train=train)


class Stage(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm()(x, use_running_average=not train)
        return nn.Dropout(0.5)(x, deterministic=not train)


# Two models of the same paths.
TWO_MODELS = ModelSet(modules={"student": Dropping(), "teacher": Dropping()})


def applied(prefix, mode):
    x = np.random.default_rng(0).normal(3.0, 1.0, (16, 50)).astype(np.float32)
    params, before = TWO_MODELS.init(jax.random.key(0), x)
    y, stats = TWO_MODELS.apply(
        {"params": params, "batch_stats": before},
        x,
        prefix=prefix,
        mode=mode,
        rng=jax.random.key(1),
    )
    before = named(before)
    stages = {
        n.split("/")[1] for n, v in named(stats).items() if (v != before[n]).any()
    }
    return np.asarray(y), stages


def test_the_mode_of_a_stage_is_that_of_its_model():
    mode = Mode(frozenset({"student/two"}), "update")
    y, stages = applied("student", mode)
    assert stages == {"two"} and (y == 0).mean() == pytest.approx(0.5, abs=0.06)
    y, stages = applied("teacher", mode)
    assert stages == set() and (y == 0).mean() == 0
    y, stages = applied("student", Mode(frozenset({"student/two"}), "hold"))
    assert stages == set() and (y == 0).mean() == pytest.approx(0.5, abs=0.06)
    _, stages = applied("student", EVALUATION)
    assert stages == set()
    y, stages = applied("student", Mode(frozenset(), "update_all"))
    assert stages == {"one", "two"} and (y == 0).mean() > 0.4


def test_records_name_the_most_probable_classes():
    task = small.task("mlp")
    logits = np.zeros((1, 10), np.float32)
    logits[0, [3, 7]] = np.log([4, 2])
    record = task.records({"logits": logits}, {})[0]
    assert record["class"] == "3"
    assert [entry["class"] for entry in record["top"][:2]] == ["3", "7"]
    assert record["top"][0]["probability"] == pytest.approx(4 / 14)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("task.loss", "cross_entropi", "did you mean 'cross_entropy'"),
        ("task.label_smoothing", "1.5", "0 to 1"),
        ("task.label_smothing", "0.1", "did you mean 'label_smoothing'"),
        ("task.name", "clasify", "did you mean 'classify'"),
        ("task.name", "task", "config.task.name"),
        ("model.name", "resnet21", "did you mean 'resnet"),
        ("model.widht", "3", "config.model.widht: unknown"),
        ("model.classes", "3", "the data has 10 classes"),
        ("model.head.dropout", "1.0", "not in"),
        ("model.head.hidden", "(0,)", "widths"),
        ("model.head.activation", "rellu", "did you mean 'relu'"),
        ("model.head.initialiser", "zeroes", "did you mean 'zeros'"),
    ],
)
def test_what_a_task_or_model_does_not_know_is_refused(key, text, message):
    with pytest.raises(UserError, match=message):
        task = small.task(overrides=[(key, text)])
        jax.eval_shape(task.init, jax.random.key(0))


def modules_of_tasks():
    folder = pathlib.Path(tasks.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder.parents[1]).with_suffix("").parts)
        yield importlib.import_module(name.removesuffix(".__init__")), path


def test_a_task_has_few_members():
    members = {*vars(Task), *vars(Task).get("__annotations__", {})}
    assert len([name for name in members if not name.startswith("_")]) <= 15


def test_nothing_in_tasks_inherits_an_implementation():
    """Task classes are final and frozen, and no class extends another concrete one."""
    contracts = {Task, Protocol, object, nn.Module, flax.struct.PyTreeNode}
    classes, wrong = set(), []
    for module, path in modules_of_tasks():
        if "super()" in path.read_text():
            wrong.append(f"{module.__name__} calls super()")
        for found in vars(module).values():
            if isinstance(found, type) and found.__module__ == module.__name__:
                classes.add(found)
    for found in classes - {Task}:
        is_abstract = abc.ABC in found.__bases__ or getattr(
            found, "_is_protocol", False
        )
        if not is_abstract and not set(found.__bases__) <= contracts | {Generic}:
            wrong.append(f"{found.__qualname__} extends {found.__bases__}")
        if issubclass(found, Task) and not (
            getattr(found, "__final__", False) and found.__dataclass_params__.frozen
        ):
            wrong.append(f"{found.__qualname__} is not a final frozen dataclass")
    assert {"SupervisedTask", "MultiDomainTask"} <= {c.__name__ for c in classes}
    assert not wrong


def test_public_functions_of_tasks_take_few_arguments():
    """But for constructors and `make`, which unpack a section of the config."""
    wrong = [
        f"{module.__name__}.{node.name}"
        for module, path in modules_of_tasks()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name not in ("make", "__init__")
        and not node.name.startswith("_")
        and len([*node.args.args, *node.args.kwonlyargs]) > 8
    ]
    assert not wrong
