"""The command line of sweeps: run, status, report, retry, and compare."""

import argparse
import dataclasses
import importlib
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from finetune_jax.config.short import needed_devices
from finetune_jax.core.errors import Problem, UserError, collected, raise_if
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
from finetune_jax.sweeps.members import Member, missing_data
from finetune_jax.sweeps.schedule import Schedule, Wanted, check, resolved
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
saved; 70 another worker has taken over the member; 1 members have failed, or anything
else"""


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
        "--index",
        metavar="K",
        help="run one member alone: its number, from 0, or hash, as `status` lists them",
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
    problems: list[Problem | str] = [
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
    return act(flags, name, SweepFolder(root, sweep, address=flags.sweep))


def _is_given(flags: argparse.Namespace, flag: str) -> bool:
    """Returns whether a flag has another value than its default."""
    name = flag.removeprefix("--").replace("-", "_")
    return getattr(flags, name) != DEFAULTS.get(flag)


def _run(flags: argparse.Namespace, name: str, folder: SweepFolder) -> int:
    """Runs the members that are missing."""
    sweep = folder.sweep
    members, problems = resolved(sweep)
    with collected(problems):
        moved = folder.owner_lines(name)
    if not members:
        raise_if(problems)
    is_here = flags.jobs == 1 and flags.launcher == "local" and not flags.dry_run
    # After a problem, workers are only checked.
    if problems or not is_here or _lacks_processes(sweep, members):
        return _launch(flags, folder, name, members, problems)
    environment = dict(os.environ)
    wanted = os.environ.pop(MEMBER, None)
    left = [m for m in members if folder.outcome(m.key) is None] or members
    # The first member decides the environment of this process.
    first = next((m for m in members if m.key == wanted), left[0])
    _set_environment(folder, first)
    config = joined(first.config, "train")
    raise_if(_config_problems(sweep, members))
    folder.make()
    check_shared(folder.claims)
    if str(threads_of(folder, int(os.environ["NPROC"]))) != os.environ["NPROC"]:
        _restart(environment)  # Another worker has begun meanwhile.

    from finetune_jax.sweeps.worker import Unfit, Worker, environment_of, say
    from finetune_jax.training.loop import Preempted
    from finetune_jax.training.preemption import EXIT_STATUS, stop_on_signals

    say(f"sweep {name} in {folder.root}")
    schedule = Schedule(sweep)
    if processes.is_first():
        for line in folder.adopt(schedule.wanted(folder.outcome)):
            say(line)
        for line in moved + folder.changes(schedule.wanted(folder.outcome)):
            say(f"warning: {line}")
    only = None
    if flags.index is not None:
        one = _member_at(schedule.wanted(folder.outcome), flags.index)
        say(_told_state(folder, one))
        only = one.key
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
            _restart(environment | {MEMBER: error.key})
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
    os.environ["NPROC"] = str(threads_of(folder, cores, is_decided=False))
    pin_environment(None, member.config.deterministic, member.config.parallel)
    quiet_libraries()
    set_precision(member.config.precision)


def _restart(environment: Mapping[str, str]) -> NoReturn:
    """Starts this process again with another environment."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _config_problems(
    sweep: Sweep, members: Sequence[Member], **options: bool
) -> list[Problem]:
    """Returns what is wrong with configs and metrics; jax starts."""
    from finetune_jax.sweeps.checks import config_problems

    return config_problems(sweep, members, **options)


def _problems_here(
    sweep: Sweep, members: Sequence[Member], launcher: str
) -> list[Problem]:
    """Returns what is wrong with configs, metrics and data, before workers are started."""
    environment = dict(os.environ)
    gpus = joining.visible_gpus(os.environ)
    is_elsewhere = launcher != "local" or bool(gpus) or sweep.processes > 1
    try:
        if is_elsewhere:  # The devices are for the workers.
            count = max(needed_devices(member.config) for member in members)
            os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
            os.environ.pop("XLA_FLAGS", None)
        pin_environment(None, False, members[0].config.parallel)
        problems = _config_problems(sweep, members, is_elsewhere=is_elsewhere)
    finally:  # Workers begin with the environment of this process.
        os.environ.clear()
        os.environ.update(environment)
    missing = missing_data(members)
    if launcher == "local":
        return problems + missing
    for problem in missing:  # Other machines may have the data.
        print(f"warning: {problem}", file=sys.stderr)
    return problems


def _member_at(wanted: Wanted, index: str) -> Member:
    """Returns a member by its number or hash.

    Raises:
        UserError: There is no such member yet.
    """
    members = wanted.members
    if found := [member for member in members if member.key == index]:
        return found[0]
    if index.isdecimal() and int(index) < len(members):
        return members[int(index)]
    more = "" if wanted.is_all else "; more follow once these are finished"
    raise UserError(
        f"--index: {index}, but {len(members)} members are known, from 0{more}; "
        "`status` lists them"
    )


def _launch(
    flags: argparse.Namespace,
    folder: SweepFolder,
    name: str,
    members: Sequence[Member],
    problems: Sequence[Problem],
) -> int:
    """Starts workers, if no problem is found."""
    sweep, jobs = folder.sweep, flags.jobs
    launcher = importlib.import_module(
        f"finetune_jax.sweeps.launchers.{flags.launcher}"
    )
    found = [*problems, *_problems_here(sweep, members, flags.launcher)]
    cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("NPROC") or max(cores // jobs, 1))
    if flags.launcher == "slurm":
        threads = launcher.threads(sweep.slurm)
    arguments = [f"--sweep={flags.sweep}", f"--dir={folder.root}", "run"]
    if flags.index is not None:
        arguments.append(f"--index={flags.index}")
    launch = Launch(
        worker=(sys.executable, "-m", "finetune_jax.sweep", *arguments),
        jobs=jobs, folder=folder.root, processes=sweep.processes,
        threads=threads_of(folder, threads, is_decided=False),
        options=sweep.slurm if flags.launcher == "slurm" else {"command": sweep.command},
    )  # fmt: skip
    with collected(found):
        (launcher.lines if flags.dry_run else launcher.check)(launch)
    raise_if(dict.fromkeys(found))
    wanted = Schedule(sweep).wanted(folder.outcome)
    if flags.dry_run:
        if flags.launcher == "local":
            print(_preview(folder, wanted, flags.index))
        print("\n".join(launcher.lines(launch)))
        return 0
    folder.make()
    check_shared(folder.claims)
    folder.write_index(name, wanted)
    launch = dataclasses.replace(launch, threads=threads_of(folder, launch.threads))
    status = launcher.run(launch)
    if flags.launcher != "local" or status == STOPPED:
        return status
    return _told(folder, name, flags.sweep) or status


def _preview(folder: SweepFolder, wanted: Wanted, index: str | None) -> str:
    """Returns which members a dry run would run."""
    if index is not None:
        return _told_state(folder, _member_at(wanted, index))
    states = states_of(folder, wanted.members)
    return status_lines(folder, wanted, states)[0]


def _told_state(folder: SweepFolder, member: Member) -> str:
    """Returns a line about the only member to run."""
    ended = folder.outcome(member.key)
    state = "to run" if ended is None else f"already {ended.state}"
    return f"{member.label} ({member.key}): {state}"


def _status(flags: argparse.Namespace, name: str, folder: SweepFolder) -> int:
    """Prints the state of all members."""
    lines = _opened(flags, name, folder)
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    states = states_of(folder, wanted.members)
    print("\n".join(status_lines(folder, wanted, states)))
    for line in lines + folder.changes(wanted):
        print(f"warning: {line}")
    return 0


def _report(flags: argparse.Namespace, name: str, folder: SweepFolder) -> int:
    """Writes the tables and the page, and prints the table."""
    lines = _opened(flags, name, folder)
    status = _told(folder, name, flags.sweep)
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    for line in lines + folder.changes(wanted):
        print(f"warning: {line}")
    return status


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


def _retry(flags: argparse.Namespace, name: str, folder: SweepFolder) -> int:
    """Has failed members run again when workers are started."""
    _opened(flags, name, folder)
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    failed = folder.retry(member.key for member in wanted.members)
    counts = [f"{failed} failed"]
    if flags.changed:
        moved = folder.set_aside(wanted.members)
        counts.append(f"{moved} finished with other code or data")
        if moved:
            print(f"{moved} finished members were moved to {folder.root}/aside")
    print(f"members to run again: {', '.join(counts)}; start `run`")
    return 0


def _opened(flags: argparse.Namespace, name: str, folder: SweepFolder) -> list[str]:
    """Checks the sweep in a folder; returns lines about a file that has moved.

    Raises:
        UserError: The sweep is invalid, or was not run in the folder.
    """
    check(folder.sweep)
    if not folder.index.is_file():
        where = f"--dir: {folder.root}" if flags.dir else f"--sweep: {folder.root}"
        raise UserError(f"{where} has no runs of a sweep yet; start them with `run`")
    return folder.owner_lines(name)


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
