"""`--mode=export`: the best checkpoint of a run, for programs that do not have this one."""

import os
import pathlib
import shutil

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.files import write_json, write_text
from finetune_jax.core.paths import printable, user_path
from finetune_jax.core.registry import closest
from finetune_jax.inference.export import (
    jax_program,
    onnx_model,
    text_encoders,
    weights,
)
from finetune_jax.inference.export.model_card import make_card
from finetune_jax.inference.export.opened_run import trained_from
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.modes.options import Options
from finetune_jax.report.tables import checkpoint_line
from finetune_jax.report.workdir import read_json, read_manifest
from finetune_jax.tasks.components.decision import describe_threshold
from finetune_jax.weights.metadata.tokenizer import kept_files

# Each writes its files into a folder.
FORMATS = {
    "jax": jax_program.write,
    "safetensors": weights.write,
    "onnx": onnx_model.write,
}


def main(config: Config, options: Options) -> int:
    """Writes what is asked for, and a model card; returns the exit status.

    Raises:
        UserError: The folder has something in it, or a format cannot be written.
    """
    workdir = options.workdir
    assert workdir is not None
    formats = checked_formats(options.formats)
    folder = _empty(user_path(options.output or workdir / "export", "--output"))
    predictor = open_predictor(config, workdir)
    manifest = read_manifest(workdir) or {}
    trained = trained_from(predictor, manifest, options.layout, kept_files(workdir))
    print(checkpoint_line(trained.step))
    if note := describe_threshold(trained.task):
        print(printable(note))
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        advice = {}
        for name in formats:
            if text := FORMATS[name](trained, part):
                advice[name] = text
        for name, text in text_encoders.tokenizer_files(trained).items():
            write_text(part / name, text)
        about = trained.about()
        write_json(part / "model.json", about)
        card = make_card(
            manifest=manifest,
            result=read_json(workdir / "result.json"),
            about=about,
            step=trained.step,
            advice=advice,
            formats=formats,
        )
        write_text(part / "README.md", card)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:14,}  {path}")
    return 0


def checked_formats(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the formats that are asked for, each once.

    Raises:
        UserError: Lists those that there are not.
    """
    problems = [
        f"--formats: no {name!r}{closest(name, FORMATS)}"
        for name in formats
        if name not in FORMATS
    ]
    raise_if(problems, "The command line:", f"There are {', '.join(FORMATS)}.")
    return tuple(dict.fromkeys(formats))


def _empty(folder: pathlib.Path) -> pathlib.Path:
    """Returns where an export goes; at most an empty folder is there.

    Raises:
        UserError: Something is there, or no folder can be made.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"--output: {folder} is not empty, and an export overwrites nothing. Give "
            "another --output; to have several formats in one folder, name all of them "
            f"in one command: --formats={','.join(FORMATS)}."
        )
    if not folder.parent.is_dir():
        raise UserError(f"--output: no folder {str(folder.parent)!r}")
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"--output: {str(folder.parent)!r} cannot be written to")
    return folder
