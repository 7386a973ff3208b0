"""The state of a sweep's members: finished, running, failed, waiting."""

import dataclasses
import datetime
import json
from collections.abc import Sequence

from finetune_jax.report.metrics_log import read_lines
from finetune_jax.sweeps.claims import Claims
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import Outcome, Wanted

STATES = ("complete", "pruned", "running", "failed", "waiting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberState:
    """The state of a member.

    Attributes:
        member: The member.
        state: One of `STATES`.
        text: Where and since when it runs, or the last line of the error.
    """

    member: Member
    state: str
    text: str = ""


def states_of(folder: SweepFolder, members: Sequence[Member]) -> list[MemberState]:
    """Returns the state of each member.

    Args:
        folder: Folder of the sweep.
        members: Its members.
    """
    claims = Claims(folder.claims, timeout_s=folder.sweep.claim_timeout_s)
    return [_state_of(folder, member, claims) for member in members]


def _state_of(folder: SweepFolder, member: Member, claims: Claims) -> MemberState:
    outcome, failures = folder.outcome(member.key), folder.failures(member.key)
    if outcome is not None and outcome.state == "failed":
        last = failures[-1]
        text = f"{last.error.splitlines()[-1]} (log {last.log})"
        return MemberState(member=member, state="failed", text=text)
    if outcome is not None:
        return MemberState(member=member, state=outcome.state)
    text = f"failed {len(failures)} times" if failures else ""
    held = claims.state(member.key)
    if not isinstance(held, dict) or held.get("is_gone"):
        state = "waiting" if text else _begun(folder, member)
        return MemberState(member=member, state="waiting", text=text or state)
    since = held.get("since")
    told = [f"{held.get('host')} process {held.get('pid')}"]
    if since is not None:
        began = datetime.datetime.fromtimestamp(since)
        told.append(f"since {began:%H:%M:%S}")
    told += [f"job {held['job']}"] if "job" in held else []
    told += [step] if (step := _begun(folder, member)) else []
    return MemberState(member=member, state="running", text=", ".join(told))


def _begun(folder: SweepFolder, member: Member) -> str:
    """Returns the last step that a run has logged, as text."""
    lines = read_lines(folder.workdir(member.key) / "metrics.jsonl")
    return f"step {json.loads(lines[-1])['step']}" if lines else ""


def status_lines(
    folder: SweepFolder, wanted: Wanted, states: Sequence[MemberState]
) -> list[str]:
    """Returns the lines of `status`: counts, then members that are not finished.

    Args:
        folder: Folder of the sweep.
        wanted: Members that are known by now.
        states: Their states.
    """
    counts = {name: sum(one.state == name for one in states) for name in STATES}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    more = f"; up to {wanted.more} more follow from the results" if wanted.more else ""
    lines = [f"{len(states)} members: {told}{more}"]
    if (left := _seconds_left(folder, wanted, states)) is not None:
        lines.append(f"about {datetime.timedelta(seconds=round(left))} left")
    told_first = [one for one in states if one.state in ("running", "failed")]
    waiting = [one for one in states if one.state == "waiting"]
    number = {one.member.key: str(place) for place, one in enumerate(states)}
    rows = [
        (one.state, number[one.member.key], one.member.key, one.member.label, one.text)
        for one in told_first + waiting[:20]
    ]
    if rows:
        lines += _left_aligned([("", "number", "hash", "", ""), *rows])
    if len(waiting) > 20:
        lines.append(f"waiting  and {len(waiting) - 20} more")
    return lines


def _left_aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _seconds_left(
    folder: SweepFolder, wanted: Wanted, states: Sequence[MemberState]
) -> float | None:
    """Returns the seconds that the members still take; None if none runs or has ended.

    It is the mean time of a finished member, for each that is left or follows, divided by
    the number of workers that run now.
    """
    found = [folder.outcome(one.member.key) for one in states]
    seconds = [o.result["wall_s"] for o in found if o and o.state == "complete"]
    running = sum(one.state == "running" for one in states)
    left = sum(one.state == "waiting" for one in states) + 0.5 * running
    left += wanted.more
    if not seconds or not running:
        return None
    return left * sum(seconds) / len(seconds) / running


def programs_line(outcomes: Sequence[Outcome]) -> str:
    """Returns a line about the programs that the members have compiled."""
    programs = [o.result.get("programs") or {} for o in outcomes]
    count = sum(p.get("programs", 0) for p in programs)
    seconds = sum(p.get("seconds", 0.0) for p in programs)
    return (
        f"{count} programs were compiled or loaded for {len(outcomes)} runs, "
        f"in {seconds:.0f} s"
    )
