"""Tasks: `task.py` is the contract, every other file one task, found by its name."""

import sys
from collections.abc import Mapping
from typing import Any

from finetune_jax.config import Config
from finetune_jax.config.members import member_models, member_problems
from finetune_jax.core import registry
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.accepts import check_accepts
from finetune_jax.tasks.task import Task

# A folder `finetune_jax/tasks/` elsewhere on the module path adds its tasks.
__path__ = registry.open_path(__name__, __path__)


def make_task(
    task: Mapping[str, Any], model: Mapping[str, Any], precision: str, spec: DataSpec
) -> Task:
    """Returns the task that a config describes, for data that look like `spec`.

    Args:
        task: The section `config.task`.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        spec: Description of the data.

    Raises:
        UserError: Unknown names or arguments in `config.task` or `config.model`.
    """
    arguments = dict(task)
    module = task_module(name := arguments.pop("name"))
    check_accepts(module, name, spec)
    given: dict[str, Any] = {"data": spec, "precision": precision}
    given["model"] = {key: model[key] for key in model if key != "members"}
    role = role_of_members(module)
    if role is not None:
        given[role] = member_models(model)
    if role == "teachers":
        for described, entry in zip(given[role].values(), model["members"]):
            described["pretrained"] = entry["pretrained"]
            described["entry"] = entry["entry"]
    return registry.call(module.make, arguments, "config.task", **given)


def role_of_members(module: Any) -> str | None:
    """Returns the role of `config.model.members` in the task of a module.

    'members' are trained together, 'teachers' teach config.model; None if the task has
    one model.
    """
    return getattr(module, "MEMBERS", None)


def check_members(config: Config) -> list[str]:
    """Returns the problems of `config.model.members`, before data is opened.

    Raises:
        UserError: No such task.
    """
    name, members = config.task["name"], config.model.members
    role = role_of_members(task_module(name))
    if members and role is None:
        return [
            f"config.model.members: {len(members)} of them, but the task {name!r} has "
            "one model, which config.model describes; remove them, or choose a task "
            "of several models, such as 'mutual'"
        ]
    return member_problems(config, learn=role == "members")


def task_module(name: str) -> Any:
    """Returns the module of a task.

    Raises:
        UserError: No such task.
    """
    module = registry.module(sys.modules[__name__], name, "config.task.name")
    if not hasattr(module, "make"):
        registry.choose({}, name, "config.task.name")
    return module
