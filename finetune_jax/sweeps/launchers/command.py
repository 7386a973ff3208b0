"""Starts workers by a command of the user's, such as ssh, gcloud or kubectl."""

import contextlib
import functools
import pathlib
import shlex
import string
from collections.abc import Iterator

from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.core.registry import closest
from finetune_jax.parallel import launch as processes
from finetune_jax.sweeps.launchers import local
from finetune_jax.sweeps.launchers.launch import Launch

KEY = "Sweep.command"
FIELDS = ("worker", "index", "name")


def lines(launch: Launch) -> list[str]:
    """Returns a line for a shell for each worker.

    In the template, `{worker}` is the command of the worker as one word for another shell,
    `{index}` its index and `{name}` the name of the sweep.

    Args:
        launch: Workers; `options` has the template `command`, such as
            'ssh worker-{index} {worker}'.

    Raises:
        UserError: Lists all problems of the template.
    """
    check(launch)
    here = shlex.quote(str(pathlib.Path.cwd()))
    worker = shlex.quote(f"cd {here} && exec {launch.command()}")
    name = shlex.quote(launch.name)
    template = launch.options["command"]
    return [
        template.format(worker=worker, index=index, name=name)
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
    """Yields what is wrong with the template."""
    template = launch.options.get("command")
    if template is None:
        text = (
            "missing; give a template such as 'ssh worker-{index} {worker}'. {worker} is "
            "the command of the worker, {index} its index from 0, {name} the name of the "
            "sweep"
        )
        yield Problem(KEY, text)
        return
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        yield Problem(KEY, f"{template!r}: {error}; {{{{ and }}}} are braces")
        return
    fields = [field for field in found if field is not None]
    for field in fields:
        if field not in FIELDS:
            text = f"unknown field {{{field}}}{closest(field, FIELDS)}"
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            yield Problem(KEY, f"{text}; there are {known}; write {{{{ for a brace")
    if "worker" not in fields:
        yield Problem(KEY, f"{template!r} has no {{worker}}, so it starts none")
