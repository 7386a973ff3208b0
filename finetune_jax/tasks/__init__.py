"""Tasks: `task.py` is the contract, every other file one task, found by its name."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from finetune_jax.config import Config
from finetune_jax.config.members import member_models, member_problems
from finetune_jax.core import registry
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.accepts import check_accepts
from finetune_jax.tasks.task import Task


def make_task(config: Config, spec: DataSpec) -> Task:
    """Returns the task that a config describes, for data that look like `spec`.

    Raises:
        UserError: Unknown names or arguments in `config.task` or `config.model`.
    """
    arguments = dict(config.task)
    module = task_module(name := arguments.pop("name"))
    check_accepts(module, name, spec)
    make = module.make
    given = {"data": spec, "precision": config.precision}
    given["model"] = {k: config.model[k] for k in config.model if k != "members"}
    role = role_of_members(make)
    if role is not None:
        given[role] = member_models(config.model)
    if role == "teachers":
        for described, entry in zip(given[role].values(), config.model["members"]):
            described["pretrained"] = entry["pretrained"]
            described["entry"] = entry["entry"]
    return registry.call(make, arguments, "config.task", **given)


def role_of_members(make: Callable) -> str | None:
    """Returns what a task takes `config.model.members` for.

    They are 'members', which learn, or 'teachers', from which config.model learns; None
    where a task has one model.
    """
    names = inspect.signature(make).parameters
    return next((role for role in ("members", "teachers") if role in names), None)


def check_members(config: Config) -> list[str]:
    """Returns what is wrong with `config.model.members`, before data is opened.

    Raises:
        UserError: No such task.
    """
    name, members = config.task["name"], config.model.members
    role = role_of_members(task_module(name).make)
    if members and role is None:
        return [
            f"config.model.members: {len(members)} of them, but the task {name!r} has "
            "one model, which config.model describes; leave them out, or choose a task "
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
