"""Starts workers as a job array of SLURM."""

import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.core.files import write_text
from finetune_jax.sweeps.launchers.launch import Launch

# Lines of the shell before the workers, such as `module load cuda`; no option of sbatch.
SETUP = "setup"
# Options that follow from the sweep.
_OWN = {
    "array": "--jobs gives the number of workers",
    "output": "the logs are in the folder of the sweep",
    "error": "the logs are in the folder of the sweep",
    "wrap": "the script is generated",
    "parsable": "the script is generated",
}
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_SCRIPT = """\
#!/bin/bash
{options}

{setup}
srun --kill-on-bad-exit=1 \\
  {worker}
status=$?
if [ $status = 75 ]; then        # stopped and saved; it goes on in the queue
  # The number of the job alone may mean all workers.
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  sleep 60                       # SLURM ends this script meanwhile
fi
exit $status
"""


def lines(launch: Launch) -> list[str]:
    """Returns the lines of the job script.

    Args:
        launch: Workers; `options` are those of sbatch, such as `partition`, and `setup`.

    Raises:
        UserError: Lists all options that cannot be used.
    """
    raise_if([*launch.problems(), *_problems(launch)])
    options = {
        "job-name": launch.name,
        "array": f"0-{launch.jobs - 1}",
        "output": launch.logs.absolute() / "worker-%A_%a.txt",
        "ntasks": launch.processes,
        "cpus-per-task": launch.threads,
        "signal": "USR1@60",
        "requeue": True,
        "open-mode": "append",
    } | _options(launch.options)
    setup = [
        f"cd {shlex.quote(str(pathlib.Path.cwd()))} || exit",
        *_setup(launch.options),
        # srun does not take it from the job by itself.
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
    ]
    text = _SCRIPT.format(
        options="\n".join(
            f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={_word(value)}"
            for name, value in options.items()
            if value is not None and value is not False
        ),
        setup="\n".join(setup),
        worker=launch.command(),
    )
    return text.splitlines()


def run(launch: Launch) -> int:
    """Submits the workers, prints what was submitted, and returns 0.

    Args:
        launch: Workers; `options` are those of sbatch, such as `partition`, and `setup`.

    Raises:
        UserError: sbatch is missing or refuses the job, or options cannot be used.
    """
    check(launch)
    path = launch.logs / "workers.sbatch"
    launch.logs.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines(launch)))
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"sbatch: {done.stderr.strip()}; the options of the sweep are slurm={{...}} in "
            f"its file, the script is {path}"
        )
    job = done.stdout.strip().partition(";")[0]
    print(
        *done.stderr.strip().splitlines(),
        f"job {job}: {launch.jobs} workers, logs in {launch.logs}/worker-{job}_*.txt",
        f"squeue --job={job} shows them, scancel {job} ends them",
        sep="\n",
    )
    return 0


def threads(options: Mapping[str, Any]) -> int:
    """Returns the host threads of a worker: its CPUs, or one.

    The cores of a login node say nothing.
    """
    text = str(_options(options).get("cpus-per-task"))
    return max(int(text), 1) if text.isdecimal() else 1


def check(launch: Launch) -> None:
    """Checks that the workers can be submitted.

    Raises:
        UserError: Lists all problems.
    """
    problems = [*launch.problems(), *_problems(launch)]
    if shutil.which("sbatch") is None:
        problems.append(
            Problem(
                "--launcher=slurm",
                "sbatch is missing; run this on a login node of the cluster, or look at "
                "the script with --dry-run",
            )
        )
    raise_if(problems)


def _problems(launch: Launch) -> list[Problem]:
    """Returns the options that cannot be used."""
    problems = list[Problem]()
    for name, value in launch.options.items():
        key, option = f"slurm[{name!r}]", str(name).replace("_", "-")
        if name == SETUP:
            if not all(isinstance(line, str) for line in _setup(launch.options)):
                problems.append(Problem(key, f"{value!r}; lines of a shell are needed"))
        elif option in _OWN:
            problems.append(Problem(key, f"leave it out: {_OWN[option]}"))
        elif not _NAME.fullmatch(option):
            text = "no option of sbatch; give its long name without the dashes"
            problems.append(Problem(key, text))
        elif "\n" in str(value):
            problems.append(Problem(key, f"{value!r}; one line is needed"))
    return problems


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of sbatch by their names in the script."""
    return {
        name.replace("_", "-"): value for name, value in given.items() if name != SETUP
    }


def _setup(given: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the shell before the workers."""
    found = given.get(SETUP, ())
    return [found] if isinstance(found, str) else list(found)


def _word(value: Any) -> str:
    """Returns a value as sbatch reads it in a script, where quotes are those of a shell.

    >>> _word("04:00:00"), _word("a b")
    ('04:00:00', "'a b'")
    """
    text = str(value)
    return shlex.quote(text) if re.search(r"[\s#'\"\\]", text) else text
