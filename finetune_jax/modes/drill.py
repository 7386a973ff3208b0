"""`--mode=drill`: kills a short version of a run in every way, and compares its ends."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.config import Config
from finetune_jax.config.short import device_count, short_overrides
from finetune_jax.core.errors import Problem, TrainingError, raise_if
from finetune_jax.core.files import bytes_below, write_json
from finetune_jax.modes.options import Options
from finetune_jax.modes.reproduce import verdict
from finetune_jax.parallel import launch
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.tables import aligned
from finetune_jax.report.workdir import new_workdir, read_json

PROCESSES = 2
# The longest that a short run may take.
LIMIT_S = 3600.0
# Seconds in which processes end after they have found that another one is gone.
END_S = 30.0
_POLL_S = 0.002
HANGS = "hangs"
_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens to one process of a run.

    Attributes:
        place: Place in the run, for the table.
        step: Step at which it happens, or soon after.
        kind: When it happens: 'update' once the metrics of the step are logged,
            'checkpoint' once the checkpoint is there, 'save' while one is written.
        process: Index of the process.
        number: The signal.
    """

    place: str
    step: int
    kind: str
    process: int
    number: signal.Signals

    @property
    def label(self) -> str:
        """The event in words."""
        return f"{self.number.name} of process {self.process}, {self.place}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """An event and what came of it.

    Attributes:
        event: The event.
        step: Last logged step when it happened; None if the run was over before.
        ends: How each process ended.
        seconds: Time until all processes had ended.
        resumed: Step of the newest checkpoint afterwards.
        is_same: Whether that checkpoint has the bits of the undisturbed run; None if that
            run has none of this step.
    """

    event: Event
    step: int | None
    ends: str = ""
    seconds: float = 0.0
    resumed: int | None = None
    is_same: bool | None = None

    def is_wrong(self) -> bool:
        """Returns whether bits differ, or processes did not end by themselves."""
        return self.is_same is False or HANGS in self.ends

    def row(self) -> tuple[str, ...]:
        """Returns the row of the table."""
        if self.step is None:
            return (self.event.label, "not reached", "", "", "", "")
        bits = {None: "-", True: "same", False: "DIFFERENT"}[self.is_same]
        resumed = "start" if self.resumed is None else str(self.resumed)
        seconds = f"{self.seconds:.1f}"
        return self.event.label, str(self.step), self.ends, seconds, resumed, bits


class Watched:
    """The folder of a run, looked at from outside."""

    def __init__(self, folder: pathlib.Path):
        """Notes what an earlier attempt has left."""
        self._metrics = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self._before = self._now()
        self._left = self._unfinished()
        self.begin = max(self.saved(), default=-1)

    def _now(self) -> tuple[int, int] | None:
        try:
            found = self._metrics.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.checkpoints)
        except FileNotFoundError:
            return []

    def _unfinished(self) -> set[str]:
        return {name for name in self._names() if _UNFINISHED in name}

    def saved(self) -> list[int]:
        """Returns the steps of the checkpoints."""
        return sorted(int(name) for name in self._names() if name.isdigit())

    def is_saving(self) -> bool:
        """Returns whether a checkpoint is being written."""
        now = self._unfinished()
        self._left &= now  # A new attempt removes those of an old one.
        return bool(now - self._left)

    def logged(self) -> int:
        """Returns the last step that this attempt has logged; -1 before any."""
        # A new attempt replaces the file, without the lines after its checkpoint.
        if self._now() in (None, self._before):
            return -1
        lines = read_metrics(self._metrics)
        return lines[-1]["step"] if lines else -1

    def has_come(self, event: Event) -> bool:
        """Returns whether it is time for an event."""
        if event.kind == "save":
            return self.is_saving() and max(self.saved(), default=-1) >= 0
        if event.kind == "checkpoint":
            newest = max(self.saved(), default=-1)
            return newest >= event.step and newest > self.begin
        return self.logged() >= max(event.step, self.begin + 1)


def main(config: Config, options: Options) -> int:
    """Runs the drill, prints its table and verdict, and returns the exit status."""
    _check(config, options)
    root = _fresh(options, config)
    print(f"workdir {root}", flush=True)
    drill = Drill(config, options, root)
    for small in (True, False):
        job, saves = drill.undisturbed(small=small)
        if job.status() != 2:
            break
        if small:
            print(
                f"{job.output(0).strip()}\nonce more with all of the data:", flush=True
            )
    if job.status():
        print(job.output(0), file=sys.stderr)
        return job.status()
    events = planned(drill.ends(), [phase.name for phase in config.plan])
    outcomes = [*drill.disturbed(events)]
    report = drill.report(outcomes, saves)
    write_json(root / "drill.json", report)
    _show(outcomes, report)
    if report["is_same"]:
        drill.tidy()
    print(f"workdir {root}", flush=True)
    return 0 if report["is_same"] else 1


def _check(config: Config, options: Options) -> None:
    """Checks that the config describes one run that a command starts.

    Raises:
        UserError: It does not.
    """
    problems: list[Problem] = []
    if config.population:
        text = f"{len(config.population)} members; drill one of them: population=()"
        problems.append(Problem("config.population", text))
    if config.extend is not None:
        text = f"{config.extend!r}; drill the config without it"
        problems.append(Problem("config.extend", text))
    if not any(word.partition("=")[0] == "--config" for word in options.arguments):
        problems.append(Problem("--config", "missing; --mode=drill starts a new run"))
    raise_if(problems)


def _fresh(options: Options, config: Config) -> pathlib.Path:
    """Returns a new folder: `drill`, `drill-2`, ... in the workdir, or one in runs/."""
    if options.workdir is None:
        return new_workdir(f"drill-{pathlib.Path(options.config).name}", config.seed)
    count = 1
    while True:
        place = options.workdir / ("drill" if count == 1 else f"drill-{count}")
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True)
            return place
        count += 1


def planned(ends: Sequence[int], names: Sequence[str]) -> list[Event]:
    """Returns the events of a run, in order.

    Args:
        ends: Last step of each phase.
        names: Names of the phases.
    """
    events = []

    def add(place: str, step: int, kind: str, number=signal.SIGKILL) -> None:
        # Process 0 writes checkpoints; elsewhere the processes take turns.
        others = sum(event.kind != "save" for event in events)
        process = 0 if kind == "save" else (others // 2 + 1) % PROCESSES
        found = Event(place=place, step=step, kind=kind, process=process, number=number)
        events.append(found)

    for index, (first, end, name) in enumerate(zip([0, *ends], ends, names)):
        middle, place = (first + end) // 2, f"phase {name!r}"
        if index == 0:
            add(place, min(first + 1, end), "update", signal.SIGTERM)
        if end > first + 1:
            add(place, middle, "update")
        if index == 0:
            add("a save", middle, "save")
        add(f"end of {place}", end, "checkpoint")
    return events


def _has_accelerators() -> bool:
    """Returns whether there is a GPU for each process."""
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return False
    return len([*pathlib.Path("/dev").glob("nvidia[0-9]*")]) >= PROCESSES


def of_flags(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command line without mode and workdir."""
    found, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name not in ("--mode", "--workdir"):
            found.append(word)
        elif not equals:
            rest.pop(0)
    return found


class Drill:
    """A short version of a run, twice: undisturbed, and killed again and again."""

    def __init__(self, config: Config, options: Options, root: pathlib.Path):
        """Takes the whole config, and the folder to work in."""
        self.config = config
        self.root = root
        self._flags = of_flags(options.arguments)
        self._digests: dict[int, Any] = {}
        devices = device_count(config)
        self._accelerators = _has_accelerators() and devices == PROCESSES
        self._devices = devices
        self._overrides: dict[str, str] = {}
        self.alone, self.killed = root / "undisturbed", root / "killed"

    def command(self, folder: pathlib.Path) -> list[str]:
        """Returns the arguments of a run."""
        own = self._overrides | {"data.cache_dir": str(folder / "features")}
        overrides = [f"--config.{key}={text}" for key, text in own.items()]
        return [*self._flags, *overrides, f"--workdir={folder}"]

    @contextlib.contextmanager
    def _started(self, folder: pathlib.Path) -> Iterator[launch.Job]:
        """Yields the processes of a run; their output is added to a file at the end."""
        each = None if self._accelerators else self._devices // PROCESSES
        folder.mkdir(exist_ok=True)
        with launch.start(
            self.command(folder), processes=PROCESSES, devices=each, grace_s=LIMIT_S
        ) as job:
            try:
                yield job
            finally:
                job.close()
                for index in range(PROCESSES):
                    with (self.root / f"{folder.name}-{index}.log").open("a") as log:
                        log.write(job.output(index))

    def undisturbed(self, *, small: bool) -> tuple[launch.Job, list[float]]:
        """Returns the ended processes of the undisturbed run, and seconds of its saves.

        Args:
            small: Whether batches and splits are reduced, too.
        """
        shutil.rmtree(self.alone, ignore_errors=True)
        self._overrides = short_overrides(self.config, self._devices, small=small)
        print(f"a short run, {PROCESSES} processes, undisturbed ...", flush=True)
        seconds, begin = [], None
        with self._started(self.alone) as job:
            seen, limit = Watched(self.alone), time.monotonic() + LIMIT_S
            while job.running() and time.monotonic() < limit:
                if seen.is_saving():
                    begin = begin or time.monotonic()
                elif begin is not None:
                    seconds.append(time.monotonic() - begin)
                    begin = None
                for step in seen.saved():
                    if step not in self._digests:
                        self._note(step, seen.checkpoints)
                time.sleep(_POLL_S)
            _check_ended(job)
        return job, seconds

    def _note(self, step: int, checkpoints: pathlib.Path) -> None:
        """Keeps the digests of a checkpoint of the undisturbed run."""
        if found := digests(checkpoints / str(step)):
            self._digests[step] = found

    def ends(self) -> list[int]:
        """Returns the last step of each phase."""
        newest = max(Watched(self.alone).saved())
        meta = read_json(_metadata(self.alone / "checkpoints" / str(newest)))
        return (meta or {})["progress"]["ends"]

    def disturbed(self, events: Sequence[Event]) -> Iterator[Outcome]:
        """Yields the outcome of each event, then lets the run come to its end.

        Raises:
            TrainingError: Processes failed without an event, or did not end.
        """
        is_over = False
        for event in events:
            if not is_over:
                print(f"{event.label} ...", flush=True)
                outcome = self._happens(event)
                is_over = outcome.step is None
            else:
                outcome = Outcome(event=event, step=None)
            yield outcome
        if not is_over:
            print("restarted, up to the end ...", flush=True)
            with self._started(self.killed) as job:
                limit = time.monotonic() + LIMIT_S
                while job.running() and time.monotonic() < limit:
                    time.sleep(_POLL_S)
                _check_ended(job)
                _check_finished(job)

    def _happens(self, event: Event) -> Outcome:
        """Starts the run again, has an event happen, and waits for the ends."""
        seen = Watched(self.killed)
        with self._started(self.killed) as job:
            limit = time.monotonic() + LIMIT_S
            while not seen.has_come(event):
                if not job.running():
                    _check_finished(job)
                    return Outcome(event=event, step=None)
                if time.monotonic() > limit:
                    raise TrainingError(f"{event.label}: not within {LIMIT_S:g} s")
                time.sleep(_POLL_S)
            job.signal(event.process, event.number)
            step, begin = max(seen.logged(), seen.begin), time.monotonic()
            longest = self.config.parallel.hang_timeout_s + END_S
            while job.running() and time.monotonic() - begin < longest:
                time.sleep(_POLL_S)
            seconds, ends = time.monotonic() - begin, _ends(job)
        resumed = max(seen.saved(), default=None)
        return Outcome(
            event=event, step=step, ends=ends, seconds=seconds, resumed=resumed,
            is_same=self._is_same(resumed),
        )  # fmt: skip

    def _is_same(self, step: int | None) -> bool | None:
        """Returns whether the newest checkpoint has the bits of the undisturbed run."""
        if step is None or step not in self._digests:
            return None
        return digests(self.killed / "checkpoints" / str(step)) == self._digests[step]

    def report(
        self, outcomes: Sequence[Outcome], saves: Sequence[float]
    ) -> dict[str, Any]:
        """Returns the content of `drill.json`."""
        runs = self.alone, self.killed
        lines, others = (_lines(folder) for folder in runs)
        then, now = (read_json(folder / "result.json") or {} for folder in runs)
        found = verdict(lines, others, then, now)
        sizes = [
            bytes_below(self.alone / "checkpoints" / str(step))
            for step in Watched(self.alone).saved()
        ]
        return {
            "is_same": found["verdict"] == "same bits"
            and not any(outcome.is_wrong() for outcome in outcomes),
            "comparison": found,
            "events": [dataclasses.asdict(outcome) for outcome in outcomes],
            "save_s": max(saves, default=None),
            "first_checkpoint_bytes": sizes[0],
            "checkpoint_bytes": sizes[-1],
        }

    def tidy(self) -> None:
        """Deletes the checkpoints and cached features of both runs."""
        for folder in (self.alone, self.killed):
            for name in ("checkpoints", "features"):
                shutil.rmtree(folder / name, ignore_errors=True)


def _lines(folder: pathlib.Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without times."""
    return [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def _metadata(checkpoint: pathlib.Path) -> pathlib.Path:
    return checkpoint / "meta" / "metadata"


def digests(checkpoint: pathlib.Path) -> Any:
    """Returns the digests of the arrays of a checkpoint; None if it is not there."""
    try:
        return json.loads(_metadata(checkpoint).read_text())["leaves"]
    except (OSError, ValueError, KeyError):
        return None


def _ends(job: launch.Job) -> str:
    """Returns how each process of a job ended."""

    def end(index: int) -> str:
        status = job.statuses.get(index)
        if status is None:
            return HANGS
        return str(status) if status >= 0 else signal.Signals(-status).name

    return ", ".join(f"{index}: {end(index)}" for index in range(len(job.processes)))


def _check_ended(job: launch.Job) -> None:
    """Checks that no process runs any more.

    Raises:
        TrainingError: Some run, after the longest time.
    """
    if left := job.running():
        raise TrainingError(f"processes {left} ran for more than {LIMIT_S:g} s")


def _check_finished(job: launch.Job) -> None:
    """Checks that a run has ended well.

    Raises:
        TrainingError: It has not; with its last lines.
    """
    if job.status():
        last = "\n".join(job.output(0).splitlines()[-20:])
        raise TrainingError(f"the run failed after a restart: {_ends(job)}\n{last}")


def _show(outcomes: Sequence[Outcome], report: Mapping[str, Any]) -> None:
    """Prints the table and the verdict."""
    head = ("event", "at step", "ends", "after s", "goes on from", "bits")
    print("\n".join(aligned([head, *(outcome.row() for outcome in outcomes)])))
    size, first = report["checkpoint_bytes"], report["first_checkpoint_bytes"]
    save = f"{report['save_s']:.2f} s" if report["save_s"] is not None else "unknown"
    print(
        f"longest save {save}; checkpoint {size / 1e6:.1f} MB, the first one "
        f"{first / 1e6:.1f} MB, as in the whole run: the model is the same"
    )
    if report["is_same"]:
        print("verdict: same bits as the undisturbed run, in all results and metrics")
        return
    print("verdict: DIFFERENT from the undisturbed run")
    print(json.dumps(report["comparison"], indent=2))
