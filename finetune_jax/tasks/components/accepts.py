"""The one check that a task is for data of a kind, with its kind of labels."""

from typing import Any

from finetune_jax import tasks
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, listed
from finetune_jax.data.kind import kind_named
from finetune_jax.data.spec import DataSpec


def check_accepts(module: Any, name: str, spec: DataSpec) -> None:
    """Checks that a task takes such data.

    Args:
        module: Module of the task. `ACCEPTS` lists pairs (kind of data, kind of labels);
            a module without it makes other tasks, which are checked.
        name: Name of the task.
        spec: Description of the data.

    Raises:
        UserError: The task does not take the data; names the tasks that do.
    """
    found = spec.kind, spec.labels
    accepted = getattr(module, "ACCEPTS", (found,))
    if found in accepted:
        return
    others = sorted(
        other
        for other, known in registry.modules(tasks).items()
        if found in getattr(known, "ACCEPTS", ())
    )
    taken = listed(map(_named, accepted))
    advice = f"such data is for {listed(map(repr, others))}" if others else "no task is"
    raise UserError(
        f"config.task.name: {name!r} takes {taken}, but the data is {_named(found)}; "
        f"{advice}{kind_named(spec.kind).hint}"
    )


def _named(pair: tuple[str, str]) -> str:
    return f"{pair[0]} with {pair[1]}"
