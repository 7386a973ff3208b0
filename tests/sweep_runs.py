"""Small sweeps of iris, started by their command, and what came of them."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = (sys.executable, "-m", "finetune_jax.sweep")
# Arms differ in a rate only, so they share programs.
FILE = """
from finetune_jax import sweeps

def get_sweep(arg=""):
    steps, rates, seeds, processes = map(int, arg.split(","))
    overrides = {{
        "plan[0].epochs": None, "plan[0].steps": steps,
        "evaluate.every_epochs": None, "evaluate.every_steps": max(steps // 2, 1),
        "report.every_steps": 5,
    }}
    arms = {{
        f"rate {{k}}": {{**overrides, "plan[0].peak_lr": 0.01 * (k + 1)}}
        for k in range(rates)
    }}
    return sweeps.Sweep(
        base={base!r}, arms=arms, seeds=seeds, pages=False, threads={threads!r},
        processes=processes, slurm={slurm!r},
    )
"""
DIGESTS = ("params_sha256", "state_sha256", "final", "best", "best_step", "sweep")


class SweepRun:
    """A sweep of iris and its folder.

    Attributes:
        folder: Folder of the sweep.
    """

    def __init__(
        self, folder, *, steps=4, rates=3, seeds=2, processes=1, slurm=None, threads=1
    ):
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".py")
        base = str(ROOT / "configs" / "iris_mlp.py")
        file.write_text(FILE.format(base=base, slurm=slurm or {}, threads=threads))
        self.address = f"--sweep={file}:{steps},{rates},{seeds},{processes}"

    def arguments(self, *arguments):
        return [self.address, f"--dir={self.folder}", *arguments]

    def run(self, *arguments, environment=None, status=0):
        """Runs a command and returns what it has printed."""
        done = subprocess.run(
            [*PROGRAM, *self.arguments(*arguments)], cwd=self.folder.parent,
            env=environment or environment_of_users(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def keys(self):
        return sorted(json.loads((self.folder / "sweep.json").read_text())["members"])

    def results(self):
        """Returns the digests of all members by the names of their folders."""
        return {
            path.parent.name: {
                name: json.loads(path.read_text())[name] for name in DIGESTS
            }
            for path in self.folder.glob("*/result.json")
        }

    def failures(self):
        return list(self.folder.glob("claims/*/failure.*"))

    def table(self):
        return (self.folder / "table.csv").read_bytes()

    def outcome(self):
        """Returns everything that must not depend on who has worked on the sweep."""
        results = self.results()
        for result in results.values():
            result["sweep"].pop("name")
        return self.table(), results


def environment_of_users():
    """Returns the environment of a user with one CPU device."""
    found = dict(os.environ) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found.pop("XLA_FLAGS", None)  # The eight devices of the tests.
    return found
