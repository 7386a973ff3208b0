"""The command line: parses and checks the flags, then calls the mode."""

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Callable, Sequence

from finetune_jax.config.document import described
from finetune_jax.core.errors import (
    TrainingError,
    UserError,
    is_of_disk,
    raise_if,
    why_not_written,
)
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import choose, closest
from finetune_jax.modes.options import Options
from finetune_jax.modes.startup import (
    end_processes,
    joined,
    part,
    pin_environment,
    quiet_libraries,
    resolved_config,
    set_precision,
)
from finetune_jax.report.workdir import origin

MODES = {
    mode: f"finetune_jax.modes.{mode}"
    for mode in (
        "train",
        "evaluate",
        "predict",
        "export",
        "plan",
        "config",
        "reproduce",
        "drill",
    )  # fmt: skip
}
WORKDIR_HAS_CONFIG = ("evaluate", "predict", "export", "reproduce")
# Flags that not every mode reads, and the modes that do.
READ_BY = {
    "--inputs": ("predict",),
    "--output": ("predict", "export"),
    "--formats": ("export",),
    "--layout": ("export",),
    "--extend": ("train", "plan", "config"),
}
PREDICTIONS_MAY_CHANGE = ("parallel", "evaluate.batch_size", "task.top_k")
FLAGS = ("--config", "--workdir", "--mode", *READ_BY)
DEFAULT_FORMATS = "jax,safetensors"
EPILOG = """\
--config.KEY=VALUE overrides a value of the config, such as --config.data.batch_size=32
or --config.plan[0].peak_lr=0.01. --help=config lists every key, --help=config.data or
--help=config.plan[0].peak_lr a part; --mode=config prints the values of a config.

exit status: 0 finished; 2 invalid command line or config; 75 stopped by a signal and
saved, the last line is the command that resumes; 3 a rerun that differs; 1 anything
else"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Returns the flags, and the overrides of the config as (key, text) pairs.

    Raises:
        UserError: Lists every unknown argument.
    """
    parser = _Parser(
        prog="python -m finetune_jax.main",
        description="Fine-tunes a pretrained model; a config file says how.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="", metavar="FILE[:ARG]")
    parser.add_argument(
        "--workdir", metavar="DIR", help="default: runs/CONFIG-ARG-seedN-TIME"
    )
    parser.add_argument(
        "--mode", default="train", help=f"{', '.join(MODES)}; default: train"
    )
    parser.add_argument(
        "--inputs", metavar="PATH", nargs="+", action="extend", default=[],
        help="files or folders to predict; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="PATH",
        help="default: predictions.jsonl, or the folder export, in the workdir",
    )  # fmt: skip
    parser.add_argument(
        "--formats", metavar="NAMES", default="",
        help=f"formats of an export, separated by commas; default: {DEFAULT_FORMATS}",
    )  # fmt: skip
    parser.add_argument(
        "--layout", metavar="NAME",
        help="layout of exported weights; default: that of the pretrained weights",
    )  # fmt: skip
    parser.add_argument(
        "--extend", metavar="DIR",
        help="workdir of a finished run that a new run goes on from, by a longer plan",
    )  # fmt: skip
    found, rest = parser.parse_known_args(arguments)
    overrides, problems = [], []
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            problems.append(f"{name}: unknown{closest(name, FLAGS)}")
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"{name}: no value")
            continue
        overrides.append(
            (name.removeprefix("--config."), value if equals else rest.pop(0))
        )
    raise_if(problems, advice=parser.format_usage().strip())
    return found, overrides


def _check_flags(
    flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> None:
    """Checks that the mode reads every flag.

    Raises:
        UserError: Lists the flags that it does not read.
    """
    problems = []
    if flags.mode in WORKDIR_HAS_CONFIG and flags.config:
        problems.append(
            f"--config: --mode={flags.mode} reads the config of the workdir; leave it out"
        )
    problems += [
        f"{name}: only {' and '.join(f'--mode={mode}' for mode in modes)} reads it"
        for name, modes in READ_BY.items()
        if flags.mode not in modes and getattr(flags, name.removeprefix("--"))
    ]
    if flags.mode in ("predict", "export"):
        problems += [
            f"--config.{key}: --mode={flags.mode} uses the config of the run; only "
            f"{', '.join(PREDICTIONS_MAY_CHANGE)} can be changed"
            for key, _ in overrides
            if not key.startswith(PREDICTIONS_MAY_CHANGE)
        ]
    raise_if(problems)


def run(arguments: Sequence[str]) -> int:
    """Runs the mode of the command line and returns the exit status.

    Raises:
        UserError: The command line or the config is invalid.
    """
    if arguments and arguments[0].startswith("--help="):
        print(described(arguments[0].removeprefix("--help=")))
        return 0
    flags, overrides = parse(arguments)
    choose(MODES, flags.mode, "--mode")
    _check_flags(flags, overrides)
    workdir = user_path(flags.workdir, "--workdir") if flags.workdir else None
    if flags.mode in WORKDIR_HAS_CONFIG and workdir is None:
        raise UserError(
            f"--workdir: missing; --mode={flags.mode} needs the folder of a run"
        )
    extend = user_path(flags.extend, "--extend").absolute() if flags.extend else None
    if extend is not None and not (extend / "config.json").is_file():
        raise UserError(f"--extend: no run in {str(extend)!r}; give its workdir")
    reproduces = flags.mode == "reproduce"
    config = resolved_config(
        flags.config, workdir, overrides, reproduces=reproduces, extend=extend
    )
    pin_environment(origin(config, workdir), config.deterministic, config.parallel)
    quiet_libraries()
    set_precision(config.precision)
    config = joined(config, flags.mode)
    options = Options(
        config=flags.config or (extend.name if extend else "run"),
        workdir=workdir,
        inputs=tuple(flags.inputs),
        output=flags.output,
        formats=tuple((flags.formats or DEFAULT_FORMATS).split(",")),
        layout=flags.layout,
        arguments=tuple(arguments),
    )
    return importlib.import_module(MODES[flags.mode]).main(config, options)


def ended(run: Callable[[Sequence[str]], int]) -> None:
    """Runs a command line and exits; a mistake of the user ends with one message.

    Args:
        run: Takes the arguments and returns the exit status.
    """
    for stream in (sys.stdout, sys.stderr):  # File names need not be UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
        part()
    except Exception as error:
        text, status = _message(error)
        end_processes(error, text, status)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(1)
        if text is None:
            raise
        print(text, file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Runs the program."""
    ended(run)


def _reader_is_gone() -> bool:
    """Returns whether stdout is a pipe that nobody reads, as after `| head`.

    Text left in its buffer is then dropped.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _message(error: Exception) -> tuple[str | None, int]:
    """Returns the message of an error for the user, and the exit status.

    The message is None if the error is a defect, whose traceback is shown.
    """
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, TrainingError):
        return f"error: {error}", 1
    if isinstance(error, OSError) and is_of_disk(error):
        place = f"{error.filename}: " if error.filename else ""
        return f"error: {place}{why_not_written(error)}", 1
    return None, 1


if __name__ == "__main__":
    main()
