"""Flags of the command line besides the config."""

import dataclasses
import pathlib
import shlex
import sys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags, parsed.

    Attributes:
        config: FILE[:ARG]; empty where the workdir has the config.
        workdir: None where none was given.
        inputs: Files and folders to predict.
        output: Where predictions or exports go; None is a place in the workdir.
        formats: In which a run is exported.
        layout: Layout of the exported weights; None is the layout of the imported ones.
        arguments: All arguments of the command line, as given.
    """

    config: str
    workdir: pathlib.Path | None
    inputs: tuple[str, ...] = ()
    output: str | None = None
    formats: tuple[str, ...] = ()
    layout: str | None = None
    arguments: tuple[str, ...] = ()

    def command(self, workdir: pathlib.Path) -> str:
        """Returns the command that continues the run in a workdir, quoted for a shell.

        Args:
            workdir: Workdir of the run, added if the command line names none.
        """
        program, given = sys.orig_argv[:1] + ["-m", "finetune_jax.main"], self.arguments
        if given and sys.orig_argv[-len(given) :] == list(given):
            program = sys.orig_argv[: -len(given)]
        place = [] if self.workdir else [f"--workdir={workdir}"]
        return shlex.join([*program, *given, *place])

    def advice(self, workdir: pathlib.Path) -> str:
        """Returns where a run that stops now will continue, and with which command."""
        saved = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
        steps = [int(name) for name in saved if name.isdigit()]
        begun = f"step {max(steps)} is saved; go on with" if steps else "go on with"
        return f"{begun}:\n  {self.command(workdir)}"
