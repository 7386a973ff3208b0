"""Description of the workers that a launcher starts."""

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from finetune_jax.core.errors import Problem
from finetune_jax.sweeps import claims

# Environment variable of workers whose starter prints the table.
QUIET = "FINETUNE_JAX_SWEEP_QUIET"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """The workers of a sweep that are started together.

    Attributes:
        worker: Command of one worker.
        jobs: Number of workers.
        folder: Folder of the sweep, `runs/NAME`.
        threads: Host threads of each process (`NPROC`), which decide bits. So they do not
            depend on `jobs`.
        options: Options of the launcher, from the sweep file.
        processes: Processes of each worker.
    """

    worker: tuple[str, ...]
    jobs: int
    folder: pathlib.Path
    threads: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processes: int = 1

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.folder.name

    @property
    def logs(self) -> pathlib.Path:
        """Folder of the logs."""
        return self.folder / "logs"

    def problems(self) -> list[Problem]:
        """Returns the numbers that are too small."""
        numbers = (
            ("--jobs", self.jobs),
            ("threads", self.threads),
            ("processes", self.processes),
        )
        return [
            Problem(key, f"{value}; at least 1 is needed")
            for key, value in numbers
            if value < 1
        ]

    def environment(self) -> dict[str, str]:
        """Returns the environment variables of each process of a worker."""
        found = {"NPROC": str(self.threads)}
        if self.folder.is_dir():  # A dry run need not make it.
            found[claims.TOKEN] = claims.token(self.folder / "claims")
        return found

    def command(self, more: Mapping[str, str] | None = None) -> str:
        """Returns the command of a worker for a shell, with its environment.

        Args:
            more: More environment variables.
        """
        found = self.environment() | dict(more or {})
        variables = [f"{name}={value}" for name, value in found.items()]
        return shlex.join(["env", *variables, *self.worker])
