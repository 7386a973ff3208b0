"""`--mode=train`: trains, or goes on with a run that was stopped."""

import pathlib

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.data.kind import weight_keys
from finetune_jax.modes.options import Options
from finetune_jax.report.workdir import check_same_run, new_workdir, read_json
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import EXIT_STATUS, Stop, stop_on_signals
from finetune_jax.training.run import run
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults


def main(config: Config, options: Options) -> int:
    """Trains and prints the result; returns the exit status."""
    workdir = options.workdir or new_workdir(options.config)
    with stop_on_signals(config.checkpoint.grace_s) as stop:
        return _train(config, workdir, stop)


def _train(config: Config, workdir: pathlib.Path, stop: Stop) -> int:
    print(f"workdir {workdir}", flush=True)
    status, finished, result = 0, None, {}
    result_file = workdir / "result.json"
    try:
        filled, _ = with_weight_defaults(config, weight_keys(config.data))
        is_same = check_same_run(workdir, filled)
        finished = read_json(result_file) if is_same else None
        if finished is not None:
            print("this run is finished")
            show(finished)
        else:
            result = _run(config, workdir, stop)
            show(result)
        result = finished or result
        print(f"report  {_best_run(workdir, result) / 'report' / 'index.html'}")
    except Preempted as message:
        print(f"{message}; the same command goes on from there")
        status = EXIT_STATUS
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError) or finished is None:
            raise
        raise UserError(f"{result_file}: not the result of a run") from error
    print(f"workdir {workdir}", flush=True)
    return status


def _run(config: Config, workdir: pathlib.Path, stop: Stop) -> dict:
    """Runs what the config describes, one run or many."""
    if not config.population:
        return run(config, workdir, stop)
    from finetune_jax.sweeps.population import run_population

    return run_population(config, workdir, stop)


def _best_run(workdir: pathlib.Path, result: dict) -> pathlib.Path:
    """Returns the workdir, or that of the best member of a population."""
    if "member" not in result:
        return workdir
    return workdir / "members" / f"{result['member']:03d}"


def show(result: dict) -> None:
    """Prints the metrics of a result as a table, after those of a population."""
    if "population" in result:
        print("means over seeds ± half their 95 % interval (members), the best first:")
    for row in result.get("population", ()):
        _show_row(row)
    if "member" in result:
        print(f"the best member, {result['member']:03d}:")
    final, best = result["final"], result["best"]
    step = result["best_step"]
    print(f"{'':24}{'final':>10}" + (f"{'best':>10}" if step is not None else ""))
    for name, value in final.items():
        chosen = f"{best[name]:10.4f}" if step is not None else ""
        print(f"{name:24}{value:10.4f}{chosen}")
    if step is not None:
        print(f"best at step {step} of {result['steps']}")


def _show_row(row: dict) -> None:
    """Prints what members that differ in seeds only came to."""
    numbers = [(n, row["mean"][n], row["interval_95"][n]) for n in row["mean"]]
    values = "  ".join(
        f"{name} {mean:.4f}" + ("" if half is None else f" ± {half:.4f}")
        for name, mean, half in numbers
    )
    settings = "  ".join(f"{key}={value!r}" for key, value in row["settings"].items())
    failed = f", {len(row['failed'])} failed" if row["failed"] else ""
    print(f"{values}  ({len(row['members'])}{failed})  {settings}")
