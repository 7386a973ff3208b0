"""Starts workers by a command of the user's, such as ssh, gcloud or kubectl."""

import contextlib
import functools
import pathlib
import shlex
import string
from collections.abc import Iterator
from typing import Any

from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.core.registry import closest
from finetune_jax.parallel import launch as processes
from finetune_jax.sweeps.launchers import local
from finetune_jax.sweeps.launchers.launch import Launch

# Option that has the template; each other one is a field with a value for each worker.
TEMPLATE = "command"
FIELDS = ("worker", "index", "name")


def lines(launch: Launch) -> list[str]:
    """Returns a line for a shell for each worker.

    In the template, `{worker}` is the command of the worker as one word for another shell,
    `{index}` its index and `{name}` the name of the sweep. Other options are fields too.

    Args:
        launch: Workers; `options` has the template `command`, such as
            'ssh {host} {worker}', and a sequence for each other field, such as `host`.

    Raises:
        UserError: Lists all problems of the template.
    """
    check(launch)
    template, others = _split(launch)
    here = shlex.quote(str(pathlib.Path.cwd()))
    worker = shlex.quote(f"cd {here} && exec {launch.command()}")
    return [
        template.format(
            worker=worker,
            index=index,
            name=shlex.quote(launch.name),
            **{field: values[index] for field, values in others.items()},
        )
        for index in range(launch.jobs)
    ]


def run(launch: Launch) -> int:
    """Runs the line of each worker, and returns 0, 75 if they were stopped, or 1.

    Args:
        launch: Workers, as for `lines`.

    Raises:
        UserError: Lists all problems of the template.
    """
    starts = [
        functools.partial(_started, ("bash", "-c", line)) for line in lines(launch)
    ]
    return local.supervise(starts, restarts=0)


def _started(
    program: tuple[str, ...], prefix: str
) -> contextlib.AbstractContextManager[processes.Job]:
    """Returns the context of a process with a prefix before its lines."""
    return processes.start(
        (), program=program, processes=1, devices=None, echo=True, prefix=prefix
    )


def check(launch: Launch) -> None:
    """Checks that the workers can be started.

    Raises:
        UserError: Lists all problems.
    """
    raise_if([*launch.problems(), *_problems(launch)])


def _problems(launch: Launch) -> Iterator[Problem]:
    """Yields what is wrong with the template and the values of its fields."""
    template, others = _split(launch)
    if not isinstance(template, str):
        text = "missing; give a template such as 'ssh {host} {worker}'"
        yield Problem(TEMPLATE, text)
        return
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        yield Problem(TEMPLATE, f"{template!r}: {error}; {{{{ and }}}} are braces")
        return
    fields = [field for field in found if field is not None]
    known = (*FIELDS, *others)
    for field in fields:
        if field not in known:
            text = f"unknown field {{{field}}}{closest(field, known)}"
            yield Problem(TEMPLATE, f"{text}; write {{{{ for a brace")
    if "worker" not in fields:
        yield Problem(TEMPLATE, f"{template!r} has no {{worker}}, so it starts none")
    for field, values in others.items():
        if field in FIELDS:
            yield Problem(field, "every template has this field; use another name")
        elif field not in fields:
            yield Problem(field, f"the template has no {{{field}}}")
        elif isinstance(values, str) or len(values) < launch.jobs:
            count = "one value" if isinstance(values, str) else f"{len(values)} values"
            yield Problem(field, f"{count} for {launch.jobs} workers (--jobs)")


def _split(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """Returns the template, and the other options."""
    others = {key: value for key, value in launch.options.items() if key != TEMPLATE}
    return launch.options.get(TEMPLATE), others
