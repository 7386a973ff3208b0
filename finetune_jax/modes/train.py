"""`--mode=train`: trains, or goes on with a run that was stopped."""

import contextlib
import functools
import pathlib

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.data.kind import weight_keys
from finetune_jax.modes.options import Options
from finetune_jax.parallel import processes
from finetune_jax.report.tables import population_lines, result_lines
from finetune_jax.report.workdir import check_same_run, new_workdir, read_json
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import EXIT_STATUS, Stop, stop_on_signals
from finetune_jax.training.run import run
from finetune_jax.training.setup import check_before_data
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults


def main(config: Config, options: Options) -> int:
    """Trains and prints the result; returns the exit status."""
    workdir = options.workdir
    if workdir is None:
        new = functools.partial(new_workdir, options.config, config.seed)
        workdir = pathlib.Path(processes.agreed("workdir", lambda: str(new())))
    advice = functools.partial(options.advice, workdir)
    try:
        with stop_on_signals(config.checkpoint.grace_s, advice) as stop:
            return _train(config, workdir, options, stop)
    finally:
        if options.workdir is None and processes.is_first():
            with contextlib.suppress(OSError):
                workdir.rmdir()  # Only an empty one: a run that was refused at once.


def _train(config: Config, workdir: pathlib.Path, options: Options, stop: Stop) -> int:
    say = functools.partial(print, flush=True) if processes.is_first() else _nothing
    say(f"workdir {workdir}")
    finished, result = None, {}
    result_file = workdir / "result.json"
    try:
        filled = _with_weight_defaults(config)
        is_same = check_same_run(workdir, filled)
        finished = read_json(result_file) if is_same else None
        if finished is not None:
            say(
                "this run is finished; to train longer, start another run with "
                f"--extend={workdir} and a longer plan"
            )
        else:
            result = _run(config, workdir, stop)
        result = finished or result
        if processes.is_first():
            show(result)
        say(f"report  {_reported(workdir, result) / 'report' / 'index.html'}")
    except Preempted as message:
        say(f"{message}; go on with:\n  {options.command(workdir)}")
        return EXIT_STATUS
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError) or finished is None:
            raise
        raise UserError(f"{result_file}: not the result of a run") from error
    say(f"workdir {workdir}")
    return 0


def _nothing(_: str) -> None:
    """Says nothing: process 0 does."""


def _with_weight_defaults(config: Config) -> Config:
    """Returns the config as its run will have it.

    Raises:
        UserError: Lists what is wrong in any section.
    """
    try:
        return with_weight_defaults(config, weight_keys(config.data))[0]
    except UserError:
        check_before_data(config)  # Its message has mistakes of other sections, too.
        raise


def _run(config: Config, workdir: pathlib.Path, stop: Stop) -> dict:
    """Runs what the config describes, one run or many."""
    if not config.population:
        return run(config, workdir, stop)
    from finetune_jax.sweeps.populations.population import run_population

    return run_population(config, workdir, stop)


def _reported(workdir: pathlib.Path, result: dict) -> pathlib.Path:
    """Returns the folder whose report is shown.

    It is that of the best member for populations of former versions, without a page.
    """
    if "member" not in result or (workdir / "report" / "index.html").is_file():
        return workdir
    return workdir / "members" / f"{result['member']:03d}"


def show(result: dict) -> None:
    """Prints the metrics of a result as a table, after those of a population."""
    if rows := result.get("population"):
        print("\n".join(population_lines(rows)))
    if "member" in result:
        print(f"the best member, {result['member']:03d}:")
    print("\n".join(result_lines(result)))
