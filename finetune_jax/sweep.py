"""The command line of sweeps: run, status, report, retry, and compare."""

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import choose, closest
from finetune_jax.main import ended
from finetune_jax.modes.startup import (
    joined,
    pin_environment,
    quiet_libraries,
    set_precision,
)
from finetune_jax.parallel import joining, processes
from finetune_jax.parallel.launch import STOPPED
from finetune_jax.sweeps.claims import Claims, check_shared
from finetune_jax.sweeps.definition import Sweep, load
from finetune_jax.sweeps.folder import SweepFolder, threads_of
from finetune_jax.sweeps.launchers.launch import QUIET, Launch
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import Schedule, Wanted, check
from finetune_jax.sweeps.status import programs_line, states_of, status_lines

PROGRAM = "python -m finetune_jax.sweep"
LAUNCHERS = ("local", "slurm", "command")
# Environment variable with the key of the member for whose environment a worker started.
MEMBER = "FINETUNE_JAX_SWEEP_MEMBER"
# Verbs that read a flag, if not all do.
READ_BY = {
    "--jobs": "run", "--launcher": "run", "--dry-run": "run", "--index": "run",
    "--metric": "compare", "--changed": "retry",
}  # fmt: skip
DEFAULTS = {
    "--jobs": 1, "--launcher": "local", "--dry-run": False, "--changed": False
}  # fmt: skip
EPILOG = """\
run      runs the members that are missing; may be started any number of times
status   lists the members: finished, running, failed, waiting
report   writes table.csv, tables and the page, and prints the table
retry    runs failed members again; --changed also those of other code or data
compare  compares runs: compare RUN_A RUN_B, or A0,A1,A2 B0,B1,B2 paired by seed, or
         folders of arms: compare runs/NAME/by_arm/CASE/ARM_A runs/NAME/by_arm/CASE/ARM_B

exit status: 0 finished; 2 invalid command line or sweep; 75 stopped by a signal and
saved; 1 members have failed, or anything else"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the flags.

    Raises:
        UserError: An argument is unknown, or one is missing.
    """
    parser = _Parser(
        prog=PROGRAM,
        description="Runs the members of a sweep and compares them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="workdirs to compare")
    parser.add_argument("--sweep", metavar="FILE[:ARG]", help="file with get_sweep()")
    parser.add_argument(
        "--dir", metavar="DIR", help="folder of the sweep; default: runs/NAME"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=DEFAULTS["--jobs"],
        help="workers to start; default: 1, this process",
    )
    parser.add_argument(
        "--launcher",
        default=DEFAULTS["--launcher"],
        help=f"{', '.join(LAUNCHERS)}; default: local",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be started"
    )
    parser.add_argument(
        "--index", type=int, metavar="K", help="run the Kth member alone, from 0"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="metric to compare; default: that of the runs"
    )
    parser.add_argument(
        "--changed", action="store_true", help="retry members of other code or data too"
    )
    return parser.parse_intermixed_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Runs a verb of the command line and returns the exit status.

    Raises:
        UserError: The command line or the sweep is invalid.
    """
    flags = parse(arguments)
    act = choose(VERBS, flags.verb, "VERB")
    problems = [
        f"{flag}: only `{verb}` reads it"
        for flag, verb in READ_BY.items()
        if verb != flags.verb and _is_given(flags, flag)
    ]
    if flags.index is not None and (flags.jobs > 1 or flags.launcher != "local"):
        problems.append("--index: one member runs in this process; give no launcher")
    if act is None:
        raise_if(problems)
        return _compare(flags)
    if flags.runs:
        problems.append(f"{' '.join(flags.runs)}: only `compare` takes workdirs")
    if not flags.sweep:
        problems.append("--sweep: missing; for example --sweep=experiments/x/sweep.py")
    if flags.jobs < 1:
        problems.append(f"--jobs: {flags.jobs}; at least 1 is needed")
    if flags.launcher not in LAUNCHERS:
        near = closest(flags.launcher, LAUNCHERS)
        problems.append(f"--launcher: {flags.launcher!r}{near}")
    raise_if(problems)
    sweep, name = load(flags.sweep)
    root = user_path(flags.dir, "--dir") if flags.dir else pathlib.Path("runs") / name
    return act(flags, sweep, name, root)


def _is_given(flags: argparse.Namespace, flag: str) -> bool:
    """Returns whether a flag has another value than its default."""
    name = flag.removeprefix("--").replace("-", "_")
    return getattr(flags, name) != DEFAULTS.get(flag)


def _run(flags: argparse.Namespace, sweep: Sweep, name: str, root: pathlib.Path) -> int:
    """Runs the members that are missing."""
    members = check(sweep)
    folder = SweepFolder(root, sweep)
    is_here = flags.jobs == 1 and flags.launcher == "local" and not flags.dry_run
    if not is_here or _lacks_processes(sweep, members):
        return _launch(flags, folder, name, members)
    environment = dict(os.environ)
    wanted = os.environ.pop(MEMBER, None)
    left = [m for m in members if folder.outcome(m.key) is None] or members
    # The first member decides the environment of this process.
    first = next((m for m in members if m.key == wanted), left[0])
    folder.make()
    check_shared(folder.claims)
    _set_environment(folder, first)
    config = joined(first.config, "train")
    _check_all(sweep, members)

    from finetune_jax.sweeps.worker import Unfit, Worker, environment_of, say
    from finetune_jax.training.loop import Preempted
    from finetune_jax.training.preemption import EXIT_STATUS, stop_on_signals

    say(f"sweep {name} in {root}")
    schedule = Schedule(sweep)
    if processes.is_first():
        for line in folder.adopt(schedule.wanted(folder.outcome).members):
            say(line)
        for line in folder.changes(schedule.wanted(folder.outcome).members):
            say(f"warning: {line}")
    only = None
    if flags.index is not None:
        only = _key_of(schedule.wanted(folder.outcome), flags.index)
    with stop_on_signals(config.checkpoint.grace_s, lambda: worker.leave()) as stop:
        worker = Worker(
            name=name, folder=folder, schedule=schedule, stop=stop,
            environment=environment_of(first.config),
            prepare=lambda config: set_precision(config.precision),
            claims=Claims(folder.claims, timeout_s=sweep.claim_timeout_s),
        )  # fmt: skip
        try:
            is_well = worker.work(only)
        except Preempted as message:
            worker.release()
            say(f"{message}; run the same command to go on")
            return EXIT_STATUS
        except Unfit as error:
            os.environ.clear()
            os.environ.update(environment | {MEMBER: error.key})
            sys.stdout.flush()
            os.execv(sys.executable, sys.orig_argv)
    # Whoever has started several workers tells, once.
    if processes.is_first() and only is None and QUIET not in os.environ:
        status = _told(folder, name, flags.sweep)
        return status if is_well else 1
    return 0 if is_well else 1


def _lacks_processes(sweep: Sweep, members: Sequence[Member]) -> bool:
    """Returns whether this process is alone, but a worker has several."""
    if sweep.processes == 1:
        return False
    return joining.launch_of(members[0].config.parallel, os.environ).is_alone


def _set_environment(folder: SweepFolder, member: Member) -> None:
    """Sets the environment of jax before jax starts, and says no more than that."""
    cores = int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))
    os.environ["NPROC"] = str(threads_of(folder, cores))
    pin_environment(None, member.config.deterministic, member.config.parallel)
    quiet_libraries()
    set_precision(member.config.precision)


def _check_all(sweep: Sweep, members: Sequence[Member]) -> None:
    """Checks all configs as far as that needs no data, and the metrics.

    Raises:
        UserError: Lists what is wrong.
    """
    from finetune_jax.sweeps.checks import config_problems

    raise_if(config_problems(sweep, members))


def _check_here(sweep: Sweep, members: Sequence[Member]) -> None:
    """Checks all configs in this process, before workers are started.

    Raises:
        UserError: Lists what is wrong.
    """
    environment = dict(os.environ)
    try:
        pin_environment(None, False, members[0].config.parallel)
        _check_all(sweep, members)
    finally:  # Workers begin with the environment of this process.
        os.environ.clear()
        os.environ.update(environment)


def _key_of(wanted: Wanted, index: int) -> str:
    """Returns the key of a member by its index.

    Raises:
        UserError: There is no such member yet.
    """
    if 0 <= index < len(wanted.members):
        return wanted.members[index].key
    more = "" if wanted.is_all else "; more follow once these are finished"
    raise UserError(
        f"--index: {index}, but {len(wanted.members)} members are known, from 0{more}"
    )


def _launch(
    flags: argparse.Namespace,
    folder: SweepFolder,
    name: str,
    members: Sequence[Member],
) -> int:
    """Starts workers."""
    sweep, jobs = folder.sweep, flags.jobs
    if not flags.dry_run:
        folder.make()
        check_shared(folder.claims)
    launcher = importlib.import_module(
        f"finetune_jax.sweeps.launchers.{flags.launcher}"
    )
    cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("NPROC") or max(cores // jobs, 1))
    if flags.launcher == "local" and not joining.visible_gpus(os.environ):
        _check_here(sweep, members)
    if flags.launcher == "slurm":
        threads = launcher.threads(sweep.slurm)
    if sweep.threads is not None or flags.dry_run:
        threads = sweep.threads or threads
    else:
        threads = threads_of(folder, threads)
    arguments = (f"--sweep={flags.sweep}", f"--dir={folder.root}", "run")
    launch = Launch(
        worker=(sys.executable, "-m", "finetune_jax.sweep", *arguments),
        jobs=jobs, folder=folder.root, threads=threads, processes=sweep.processes,
        options=sweep.slurm if flags.launcher == "slurm" else {"command": sweep.command},
    )  # fmt: skip
    if flags.dry_run:
        print("\n".join(launcher.lines(launch)))
        return 0
    status = launcher.run(launch)
    if flags.launcher != "local" or status == STOPPED:
        return status
    return _told(folder, name, flags.sweep) or status


def _status(
    flags: argparse.Namespace, sweep: Sweep, name: str, root: pathlib.Path
) -> int:
    """Prints the state of all members."""
    folder = _opened(root, sweep)
    wanted = Schedule(sweep).wanted(folder.outcome)
    states = states_of(folder, wanted.members)
    print("\n".join(status_lines(folder, wanted, states)))
    for line in folder.changes(wanted.members):
        print(f"warning: {line}")
    return 0


def _report(
    flags: argparse.Namespace, sweep: Sweep, name: str, root: pathlib.Path
) -> int:
    """Writes the tables and the page, and prints the table."""
    return _told(_opened(root, sweep), name, flags.sweep)


def _told(folder: SweepFolder, name: str, address: str) -> int:
    """Writes the report, and prints the table; returns 1 if members have failed."""
    from finetune_jax.sweeps.summary import write_sweep_report
    from finetune_jax.sweeps.table import table_of
    from finetune_jax.sweeps.table_files import write_runs, write_tables

    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    table = table_of(folder, wanted)
    write_runs(folder, wanted)
    print("\n".join(write_tables(folder.root, name, table)))
    print(f"page {write_sweep_report(folder, name, wanted, table, address)}")
    ended = [folder.outcome(member.key) for member in wanted.members]
    complete = [o for o in ended if o is not None and o.state == "complete"]
    print(programs_line(complete))
    failed = sum(o is not None and o.state == "failed" for o in ended)
    if failed:
        print(f"{failed} members have failed; `status` says why")
    return int(failed > 0)


def _retry(
    flags: argparse.Namespace, sweep: Sweep, name: str, root: pathlib.Path
) -> int:
    """Has failed members run again when workers are started."""
    folder = _opened(root, sweep)
    wanted = Schedule(sweep).wanted(folder.outcome)
    count = folder.retry(member.key for member in wanted.members)
    print(f"{count} members will run again")
    if flags.changed:
        moved = folder.set_aside(wanted.members)
        print(f"{moved} finished members of other code or data are in {root}/aside")
    return 0


def _opened(root: pathlib.Path, sweep: Sweep) -> SweepFolder:
    """Returns the folder of a sweep.

    Raises:
        UserError: It has not been run there.
    """
    check(sweep)
    if not root.is_dir():
        raise UserError(f"--dir: {root} holds no sweep; start it with `run`")
    return SweepFolder(root, sweep)


def _compare(flags: argparse.Namespace) -> int:
    """Prints the comparison of runs."""
    comparison = importlib.import_module("finetune_jax.sweeps.comparison")
    if len(flags.runs) < 2:
        raise UserError("compare: give the workdirs of at least two runs")
    print("\n".join(comparison.compare_workdirs(flags.runs, flags.metric)))
    return 0


VERBS = {
    "run": _run,
    "status": _status,
    "report": _report,
    "retry": _retry,
    "compare": None,
}


def main() -> None:
    """Runs the program."""
    ended(run)


if __name__ == "__main__":
    main()
