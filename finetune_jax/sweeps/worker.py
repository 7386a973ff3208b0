"""A worker of a sweep: claims members, runs them, and ends when nothing is left.

All workers are equal; what they share is the folder of the sweep. A worker over several
processes claims in process 0, and all of its processes run the member together.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetune_jax.config import Config, flat
from finetune_jax.config.parallel import LAUNCH
from finetune_jax.config.schema import NO_RESULT_DEPENDS_ON
from finetune_jax.core.errors import (
    NotFinite,
    TrainingError,
    UserError,
    tells_of_disk,
)
from finetune_jax.core.metric_names import is_better
from finetune_jax.parallel import processes
from finetune_jax.report.workdir import InUse
from finetune_jax.sweeps.claims import Claim, Claims
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import Schedule, Wanted, is_pruned_at, tune_metric
from finetune_jax.sweeps.search.pruning import Judge, curve_of
from finetune_jax.training.assembly import Shared
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import Stop
from finetune_jax.training.run import Membership, run

# Keys in which runs may differ that share compiled programs and data.
MAY_DIFFER = r"seed(\.\w+)?|plan(\[.*)?|init\.(schemes|fresh)|task\.label_smoothing"
# Seconds between two looks at members that other workers run.
POLL_S = 1.0
# Seconds in which all processes must see what process 0 has seen in the folder.
SEEN_WITHIN_S = 90.0


class Unfit(Exception):
    """Members are left that need a process with another environment.

    Attributes:
        key: Key of one of them.
    """

    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


@dataclasses.dataclass(kw_only=True)
class Worker:
    """A worker of a sweep.

    Attributes:
        name: Name of the sweep.
        folder: Folder of the sweep, made.
        schedule: Says which members are wanted.
        stop: Whether the worker was asked to stop.
        environment: Environment of this process, as `environment_of` returns it.
        prepare: Called with the config of a member before it runs.
        claims: Claims of members.
        claim: Claim on the member that runs now.
    """

    name: str
    folder: SweepFolder
    schedule: Schedule
    stop: Stop
    environment: str
    prepare: Callable[[Config], None]
    claims: Claims
    claim: Claim | None = None
    _shared: tuple[str, Shared] | None = None
    _idle_since: float | None = None
    # Times at which members may be tried again whose workdirs were in use.
    _in_use: dict[str, float] = dataclasses.field(default_factory=dict)
    _groups: dict[str, str] = dataclasses.field(default_factory=dict)

    def work(self, only: str | None = None) -> bool:
        """Runs members until nothing is left; returns whether none has failed.

        Args:
            only: Key of the only member to run; None runs all.

        Raises:
            Preempted: The worker was asked to stop; its member is saved and released.
            Unfit: What is left needs another environment.
            UserError: The folder cannot be used.
            OSError: The disk is full.
        """
        while True:
            what, key = processes.agreed(
                "next member", functools.partial(self._choose, only)
            )
            if what == "over":
                wanted = self._wanted()
                ended = [
                    self.folder.outcome(member.key)
                    for member in wanted.members
                    if only in (None, member.key)
                ]
                self._index(wanted)
                self._drop_states()
                return all(o is None or o.state != "failed" for o in ended)
            if what == "unfit":
                raise Unfit(key)
            if what == "wait":
                if self.stop.agreed():
                    raise Preempted("stopped, without a member")
                time.sleep(POLL_S)
                continue
            if self._run(self._member(key)):
                self._idle_since = None

    def release(self) -> None:
        """Lets other workers have the member at once, as this worker ends."""
        if self.claim is not None:
            self.claim.release(is_done=False)
            self.claim = None

    def leave(self) -> str:
        """Releases the member of a worker that ends at once; returns what to do."""
        self.release()
        return "run the same command to go on"

    def _wanted(self) -> Wanted:
        return self.schedule.wanted(self.folder.outcome)

    def _member(self, key: str) -> Member:
        """Returns a member that process 0 has chosen."""
        until = time.monotonic() + SEEN_WITHIN_S
        while True:
            found = {member.key: member for member in self._wanted().members}
            if key in found:
                return found[key]
            if time.monotonic() > until:
                raise UserError(
                    f"--dir: process {processes.index()} does not see the results in "
                    f"{self.folder.root} that process 0 sees; give a folder on a file "
                    "system that all processes share"
                )
            time.sleep(0.2)

    def _choose(self, only: str | None) -> tuple[str, str]:
        """Returns what to do next: ('run', key) with a claim, 'wait', 'over', 'unfit'."""
        wanted = self._wanted()
        self._index(wanted)
        outcome, now = self.folder.outcome, time.monotonic()
        left = [m for m in wanted.members if outcome(m.key) is None]
        left = [m for m in left if only in (None, m.key)]
        if not left and (wanted.is_all or only is not None):
            return "over", ""
        group = self._shared[0] if self._shared else ""
        # Members of one model share its programs.
        left.sort(key=lambda member: self._group(member) != group)
        unfit, waiting = [], 0
        for member in left:
            if not self._is_ready(member):
                waiting += 1
                continue
            if now < self._in_use.get(member.key, now):
                continue
            if environment_of(member.config) != self.environment:
                unfit.append(member.key)
                continue
            is_done = functools.partial(self._has_ended, member.key)
            if claim := self.claims.take(member.key, is_done):
                self.claim = claim
                return "run", member.key
        if unfit:
            return "unfit", unfit[0]
        self._idle_since = self._idle_since or now
        is_idle = now - self._idle_since > self.folder.sweep.claim_timeout_s
        if wanted.is_all and not waiting and is_idle:
            say(f"the last {len(left)} members run elsewhere; this worker ends")
            return "over", ""
        return "wait", ""

    def _has_ended(self, key: str) -> bool:
        return self.folder.outcome(key) is not None

    def _is_ready(self, member: Member) -> bool:
        """Returns whether the sources of a member are finished."""
        ended = [self.folder.outcome(key) for key in member.needs]
        for key, outcome in zip(member.needs, ended):
            if outcome is not None and outcome.state != "complete":
                text = f"its source {key} has failed: {outcome.result['failed']}"
                self.folder.failed(member.key, 0, text, again=False)
        return all(o is not None and o.state == "complete" for o in ended)

    def _group(self, member: Member) -> str:
        if member.key not in self._groups:
            self._groups[member.key] = group_of(member.config)
        return self._groups[member.key]

    def _index(self, wanted: Wanted) -> None:
        if processes.is_first():
            self.folder.write_index(self.name, wanted)

    def _run(self, member: Member) -> bool:
        """Runs a member that is claimed, and notes how it ended.

        Returns:
            Whether it ran; another process may be in its workdir.
        """
        config, key = self._config(member), member.key
        number = self.claim.number if self.claim else 0
        log, begin = self.folder.log(key, number), time.perf_counter()
        judge = self._judge(member)
        self.stop.judge = judge
        try:
            self.prepare(config)
            with logged(log):
                result = run(
                    config, self.folder.workdir(key), self.stop, self._how(member)
                )
        except Preempted:
            step = None
            if judge is not None:  # Process 0 alone has judged.
                step = processes.agreed("pruning", lambda: judge.pruned_at)
            if step is None:
                raise
            self._pruned(member, step)
        except InUse as error:  # A process without a claim, or one that is suspended.
            wait_s = self.folder.sweep.claim_timeout_s
            self._in_use[key] = time.monotonic() + wait_s
            who = str(error).partition(". ")[0]
            say(f"{member.label}: {who}; other members run first")
            return False
        except Exception as error:
            self._failed(member, number, error)
        else:
            seconds = time.perf_counter() - begin
            self._finished(member, result, seconds)
            if self.claim is not None:
                self.claim.release(is_done=True)
                self.claim = None
        finally:
            self.stop.judge, self.stop.at_risk = None, False
            self.release()
        return True

    def _config(self, member: Member) -> Config:
        """Returns the config of a member for this process."""
        config = member.runnable(self.folder.root)
        report: dict[str, Any] = {}
        if config.report.wandb and config.report.group is None:
            tags = [member.arm, member.case, member.stage]
            report = {"group": self.name, "tags": tuple(filter(None, tags))}
        alone: dict[str, Any] = dict.fromkeys(LAUNCH)
        return config.replaced(report=report, parallel=alone)

    def _judge(self, member: Member) -> Judge | None:
        """Returns what ends the run of a trial early."""
        search = self.folder.sweep.search
        if search is None or search.pruner is None or search.pruner.over_seeds:
            return None
        ends = is_pruned_at(self.folder.sweep, self._wanted(), member)
        return Judge(self.folder.workdir(member.key), search.metric, ends)

    def _how(self, member: Member) -> Membership:
        group = self._group(member)
        if self._shared is None or self._shared[0] != group:
            if self._shared is not None and self._shared[1].executor is not None:
                self._shared[1].executor.end_training()
            self._shared = None
            gc.collect()
            self._shared = group, Shared()
        sweep = self.folder.sweep
        return Membership(
            labels={"name": self.name, **member.to_json()},
            shared=self._shared[1],
            keeps_states=functools.partial(self._keeps, member),
            has_page=sweep.pages and member.stage in ("final", "source"),
        )

    def _keeps(self, member: Member, result: Mapping[str, Any]) -> bool:
        """Returns whether the checkpoints of a member that has just ended stay."""
        keep = self.folder.sweep.keep
        if keep == "all" or member.key in self._wanted().sources:
            return True
        metric = self._metric(member)
        best, _ = self._ranked()
        value = result["best"].get(metric)
        if keep == "none" or value is None:
            return False
        if best is None or is_better(metric, value, best[1]):
            return True
        order = [other.key for other in self._wanted().members]
        return value == best[1] and order.index(member.key) < order.index(best[0])

    def _metric(self, member: Member) -> str:
        """Returns the metric that chooses the run whose checkpoints stay."""
        search = self.folder.sweep.search
        return search.metric if search else tune_metric(self.folder.sweep, member)

    def _ranked(self) -> tuple[tuple[str, float] | None, set[str]]:
        """Returns the best finished member with its value, and the keys of the others.

        Sources are in neither. A member that finishes meanwhile is not among the others:
        it may be better.
        """
        best: tuple[str, float] | None = None
        ended: set[str] = set()
        wanted = self._wanted()
        for member in wanted.members:
            outcome = self.folder.outcome(member.key)
            if member.key in wanted.sources or outcome is None:
                continue
            ended.add(member.key)
            metric = self._metric(member)
            value = outcome.value(metric)
            if value is not None and is_better(metric, value, best and best[1]):
                best = member.key, value
        return best, ended - {best[0] if best else ""}

    def _drop_states(self) -> None:
        """Removes the checkpoints that do not stay."""
        if self.folder.sweep.keep == "best" and processes.is_first():
            best, others = self._ranked()
            if best is not None:
                self.folder.drop_states(others)

    def _finished(
        self, member: Member, result: Mapping[str, Any], seconds: float
    ) -> None:
        wanted = self._wanted()
        self._index(wanted)
        sweep = self.folder.sweep
        self._drop_states()
        is_final = member.stage == "final"
        metric = sweep.metric_of(member.arm) if is_final else self._metric(member)
        value = result["best"].get(metric)
        number = "" if value is None else f"{metric} {value:.4f}, "
        say(f"{self._count(wanted)} {member.label}: {number}{seconds:.1f} s")

    def _count(self, wanted: Wanted) -> str:
        """Returns how many members have ended, of how many at most."""
        ended = sum(self.folder.outcome(m.key) is not None for m in wanted.members)
        return f"[{ended}/{len(wanted.members) + wanted.more}]"

    def _pruned(self, member: Member, step: int) -> None:
        search = self.folder.sweep.search
        assert search is not None
        workdir = self.folder.workdir(member.key)
        curve = curve_of(workdir, search.metric, until=step)
        if processes.is_first():
            self.folder.pruned(member.key, curve, {"step": step})
            self.folder.drop_states_of(member.key)
        value = curve.get(step, float("nan"))
        wanted = self._wanted()
        say(
            f"{self._count(wanted)} {member.label}: pruned at step {step}, "
            f"{search.metric} {value:.4f}"
        )

    def _failed(self, member: Member, number: int, error: Exception) -> None:
        """Notes that a member has failed, and tells why; others go on.

        Raises:
            Exception: The error itself, if no other member would fare better.
        """
        if tells_of_disk(error):
            raise error
        if not isinstance(error, NotFinite):
            # It may have to do with the error, in all processes.
            self._shared = None
        log = self.folder.log(member.key, number)
        is_told = isinstance(error, UserError | TrainingError)
        text = str(error) if is_told else _last_line(error)
        # The same config, code and data would fail in the same way.
        again = not isinstance(error, UserError | NotFinite)
        if processes.is_first():
            with log.open("a") as file:
                file.write("".join(traceback.format_exception(error)))
            self.folder.failed(member.key, number, text, again=again)
            left = self.folder.sweep.attempts - len(self.folder.failures(member.key))
            more = (
                f"; {left} more attempt{'s' * (left > 1)}" if again and left > 0 else ""
            )
            say(f"{member.label} failed: {text.splitlines()[-1]} (log {log}){more}")


def environment_of(config: Config) -> str:
    """Returns what a process decides before jax starts, for a run."""
    parallel = {
        key: config.parallel[key] for key in ("mode", "devices", "fsdp", "model")
    }
    return json.dumps([config.deterministic, parallel])


def group_of(config: Config) -> str:
    """Returns the values that all runs have in common which share programs and data."""
    values = {
        key: value
        for key, value in flat(config.to_dict()).items()
        if not re.fullmatch(MAY_DIFFER, key)
        and not any(key == k or key.startswith(f"{k}.") for k in NO_RESULT_DEPENDS_ON)
    }
    return json.dumps(values, sort_keys=True)


def say(text: str) -> None:
    """Prints a line for the person who watches the sweep; process 0 does."""
    if processes.is_first():
        print(text, flush=True)


@contextlib.contextmanager
def logged(path: pathlib.Path) -> Iterator[None]:
    """Has what a run prints go to a file."""
    if not processes.is_first():
        yield
        return
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield


def _last_line(error: Exception) -> str:
    lines = traceback.format_exception_only(error)
    return "".join(lines).strip().splitlines()[-1]
