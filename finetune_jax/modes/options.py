"""Flags of the command line besides the config."""

import dataclasses
import pathlib


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
    """

    config: str
    workdir: pathlib.Path | None
    inputs: tuple[str, ...] = ()
    output: str | None = None
    formats: tuple[str, ...] = ()
    layout: str | None = None
