"""`--mode=predict`: predictions of new files with the best checkpoint, as JSONL.

Where predictions are masks, a folder beside it has them as PNG files.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import printable, user_path
from finetune_jax.data.kind import FileRule, kind_named
from finetune_jax.data.reading.files import FileNotes, files_below
from finetune_jax.data.reading.threads import check_readable
from finetune_jax.inference.predictor import open_predictor, open_reader
from finetune_jax.modes.options import Options
from finetune_jax.report.tables import checkpoint_line
from finetune_jax.tasks.components.decision import describe_threshold


def main(config: Config, options: Options) -> int:
    """Writes a line for every input and returns the exit status.

    Raises:
        UserError: Inputs that cannot be read, after all others were predicted.
    """
    workdir = options.workdir
    assert workdir is not None
    reader = open_reader(config, workdir)
    paths, told = find_inputs(options.inputs, reader.files)
    output = _output(options.output or workdir / "predictions.jsonl")
    for line in told:
        print(printable(line))
    predictor = open_predictor(config, workdir, reader)
    print(checkpoint_line(predictor.step))
    if note := describe_threshold(predictor.setup.task):
        print(printable(note))
    errors: list[UserError | None] = []
    size = 1
    part, written = output.with_name(f"{output.name}.part"), 0
    spec, folder = predictor.spec, output.with_name(f"{output.stem}_masks")
    ready = kind_named(spec.kind).record_writer(spec, folder)
    with part.open("w") as file:
        for names, dataset in reader.read(paths, errors):
            # A program is compiled for each size, so it never becomes smaller again.
            size = max(size, 2 ** (len(dataset) - 1).bit_length())
            records = predictor.with_batch_size(size).records(dataset)
            for name, record in zip(names, records, strict=True):
                line = {"file": name, **ready(record, name)}
                file.write(json.dumps(line) + "\n")
                written += 1
    part.replace(output)
    print(f"{written:,} predictions in {printable(output)}")
    check_readable(errors, f"The other {written:,} are in {output}.")
    return 0


def _output(given: str | pathlib.Path) -> pathlib.Path:
    """Returns the output file.

    Raises:
        UserError: The file cannot be written.
    """
    path = user_path(given, "--output").resolve()
    if not path.parent.is_dir():
        raise UserError(f"--output: no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        raise UserError(f"--output: {str(given)!r} is not a plain file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {str(path.parent)!r} cannot be written to")
    return path


def find_inputs(
    inputs: Sequence[str], rule: FileRule
) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the files that `--inputs` names, and lines about those not used.

    Args:
        inputs: Files and folders; of a folder, all files below it that fit `rule`.
        rule: Files that the model takes.

    Raises:
        UserError: Lists what is not there, folders without such files, and files that the
            model does not take.
    """
    if not inputs:
        raise UserError("--mode=predict needs --inputs, files or folders")
    found: list[pathlib.Path] = []
    lines, missing, refused = [], [], []
    for text in inputs:
        path = user_path(text, "--inputs")
        if text and path.is_dir():
            inside, told = _inside(path, text, rule)
            found += inside
            lines += told
            if not inside:
                missing += [f"--inputs: no {rule.name} in {text!r}", *told]
        elif text and path.is_file():
            if reason := rule.why_not_named(path):
                refused.append(f"{path}: {reason}")
            found.append(path)
        else:
            missing.append(f"--inputs: no file or folder {text!r}")
    raise_if(missing)
    raise_if(refused, "--inputs: files that this model does not take:", rule.advice)
    lines += [f"warning: {line}" for line in rule.warnings(found)]
    return found, lines


def _inside(
    folder: pathlib.Path, text: str, rule: FileRule
) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the files below a folder that fit a rule, and lines about all others."""
    notes, inside = FileNotes(), []
    for path in files_below(folder, notes):
        if reason := rule.why_not(path):
            notes.add(path, reason)
        else:
            inside.append(path)
    return inside, [*notes.lines(text), *notes.problems]
