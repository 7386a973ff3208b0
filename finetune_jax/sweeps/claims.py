"""Claims: each member of a sweep is worked on by one worker at a time.

A shared folder is enough; there is no server. `claim.N` in the folder of a member is its
Nth claim. It is created with O_EXCL, so by one worker alone, and is never removed. A thread
of its worker raises a counter in it. Another worker that sees the same counter for
`timeout_s` of its own clock creates `claim.N+1`. So no clocks are compared, and there is no
moment in which two workers can take over. A worker whose claim is no longer the newest has
lost the member and ends at once.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_text

# Exit status of a worker that has lost its claim.
LOST = 70
# Beats in the time after which a claim counts as abandoned.
BEATS = 12
# Environment variable with the token of the folder of claims that a worker has to see.
TOKEN = "FINETUNE_JAX_CLAIMS"
_CLAIM = re.compile(r"claim\.(\d+)")
_RELEASED = "released"
_ADVICE = "make the folder writable or make room, then start the workers again"


class Claim:
    """A claim on a member; a thread raises its counter until it is released.

    Attributes:
        number: Number of the claim: 1 for the first one on the member.
        folder: Folder of the member's claims.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        number: int,
        holder: dict[str, Any],
        *,
        timeout_s: float,
        on_lost: Callable[["Claim", str], None],
    ):
        """Starts to raise the counter.

        Args:
            folder: Folder of the member's claims.
            number: Number of the claim, whose file exists.
            holder: Description of the worker, which the file contains besides the counter.
            timeout_s: Seconds after which others count the claim as abandoned.
            on_lost: Called with the claim and the reason when it is lost, in the thread.
        """
        self.number, self.folder = number, folder
        self._holder, self._timeout_s, self._on_lost = holder, timeout_s, on_lost
        self._path = folder / f"claim.{number}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def holds(self) -> bool:
        """Returns whether no other worker has claimed the member since."""
        return _newest(self.folder) == self.number

    def release(self, *, is_done: bool) -> None:
        """Stops the counter.

        Args:
            is_done: Whether the member is done. If not, others may claim it at once. If so,
                the file stays as it is: another machine may see the results of the member
                later than the file.
        """
        self._over.set()
        self._thread.join()
        if not is_done:
            # If it cannot be written, others claim the member after `timeout_s`.
            with contextlib.suppress(OSError):
                write_text(self._path, _text(self._holder, _RELEASED))

    def _beat(self) -> None:
        """Raises the counter until the claim is released or lost."""
        count, seen_s = 0, time.monotonic()
        while not self._over.wait(self._timeout_s / BEATS):
            try:
                holds = self.holds()
            except OSError as error:  # A file system may not answer for a while.
                if time.monotonic() - seen_s > self._timeout_s:
                    self._on_lost(self, f"the folder cannot be read: {error.strerror}")
                    return
                continue
            seen_s = time.monotonic()
            if not holds:
                self._on_lost(self, f"claim.{_newest(self.folder)} is newer")
                return
            count += 1
            try:
                write_text(self._path, _text(self._holder, count))
            except OSError:
                # On a full disk the file's time can still change, and this counts too.
                with contextlib.suppress(OSError):
                    os.utime(self._path)


def end_at_once(claim: Claim, why: str) -> None:
    """Ends the process: another worker has the member that it works on.

    Args:
        claim: Lost claim.
        why: Reason, for a person.
    """
    text = f"{claim.folder}: lost claim.{claim.number}: {why}; this worker ends"
    # While a member runs, `sys.stderr` is its log.
    print(text, file=sys.__stderr__, flush=True)
    os._exit(LOST)


class Claims:
    """The claims of a sweep as one worker sees them, with its memory of their counters."""

    def __init__(
        self,
        root: pathlib.Path,
        *,
        timeout_s: float,
        on_lost: Callable[[Claim, str], None] = end_at_once,
    ):
        """Starts without memory.

        Args:
            root: Folder of all claims of the sweep.
            timeout_s: Seconds without a change after which a claim counts as abandoned.
                Network file systems may show a change up to a minute late (`acdirmax` of
                NFS), so 120 are safe.
            on_lost: Called in a thread when another worker has taken over; by default
                the process ends at once.
        """
        self.root = root
        self._timeout_s, self._on_lost = timeout_s, on_lost
        # For each member: its newest claim as last seen, and since when it looks so.
        self._seen: dict[str, tuple[tuple, float]] = {}

    def take(self, key: str, is_done: Callable[[], bool]) -> Claim | None:
        """Returns a new claim on a member, or None if it is done or has a worker.

        Args:
            key: Name of the member.
            is_done: Returns whether the member is done.

        Raises:
            UserError: The claim cannot be written; names the folder.
        """
        if is_done():
            return None
        folder = self.root / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = _newest(folder)
            if number and not self._is_free(key, number):
                return None
            holder = _this_worker()
            if not _create(folder, number + 1, _text(holder, 0)):
                return None
        except OSError as error:
            raise _cannot_write(folder, error) from error
        # Its worker may have ended since; then the new claim is one of a done member.
        if is_done() or _newest(folder) != number + 1:
            return None
        return Claim(
            folder,
            number + 1,
            holder,
            timeout_s=self._timeout_s,
            on_lost=self._on_lost,
        )

    def state(self, key: str) -> str | dict[str, Any] | None:
        """Returns the state of a member's newest claim.

        Returns:
            None without a claim, 'released', or a dict: `number` of the claim, `host`,
            `pid`, `since` (seconds since 1970 by the clock of that machine), `count`, `job`
            of SLURM, and `is_gone`: whether the worker was on this machine and has ended.
            After a kill at the wrong moment only `number` and `is_gone` may be known.
        """
        number = _newest(self.root / key)
        if not number:
            return None
        found, _ = _read(self.root / key / f"claim.{number}")
        if found.get("count") == _RELEASED:
            return _RELEASED
        known = {name: value for name, value in found.items() if name != "machine"}
        return known | {"number": number, "is_gone": _is_gone(found)}

    def _is_free(self, key: str, number: int) -> bool:
        """Returns whether a member may be claimed whose newest claim is `number`."""
        found, changed_ns = _read(self.root / key / f"claim.{number}")
        if found.get("count") == _RELEASED or _is_gone(found):
            return True
        look, now = (number, found.get("count"), changed_ns), time.monotonic()
        before, since = self._seen.get(key, (None, now))
        if before != look:
            self._seen[key] = look, now
            return False
        return now - since >= self._timeout_s


def check_shared(root: pathlib.Path) -> None:
    """Checks that claims can be made in a folder.

    Raises:
        UserError: The folder is not writable, the disk is full, a file can be created
            twice, or it is not the folder that the workers share.
    """
    root = root.absolute()
    # Only where the sweep was launched from may the folder be new.
    wanted = os.environ.get(TOKEN)
    if wanted and (not root.is_dir() or _token(root) != wanted):
        raise UserError(
            f"{root}: on {socket.gethostname()} this is not the folder in which the sweep "
            "was started; give a folder on a file system that all machines share"
        )
    path = root / f"probe.{secrets.token_hex(8)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            is_first, is_second = (_create_empty(path) for _ in range(2))
            write_text(path, "probe")
        finally:
            for left in (path, path.with_name(f"{path.name}.part")):
                left.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(root, error) from error
    if not is_first or is_second:
        raise UserError(
            f"{root}: the file system creates the same file twice (no O_EXCL), so two "
            "workers could claim one member; give a folder on another file system"
        )


def token(root: pathlib.Path) -> str:
    """Returns the token of a folder of claims, by which other machines recognise it.

    Raises:
        UserError: The folder cannot be written to.
    """
    path = root.absolute() / "token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _create_empty(path):
            write_text(path, secrets.token_hex(8))
        for _ in range(50):  # Another process has created it, and writes it now.
            if found := _token(path.parent):
                return found
            time.sleep(0.1)
        write_text(path, secrets.token_hex(8))  # It was killed meanwhile.
        return _token(path.parent)
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def _token(root: pathlib.Path) -> str:
    """Returns the token of a folder; '' if it has none."""
    try:
        return (root / "token").read_text().strip()
    except FileNotFoundError:
        return ""


def _newest(folder: pathlib.Path) -> int:
    """Returns the highest number of a claim in a folder; 0 if there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    found = [_CLAIM.fullmatch(name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)


def _create(folder: pathlib.Path, number: int, text: str) -> bool:
    """Creates the file of a claim; returns whether this worker was the first."""
    path = folder / f"claim.{number}"
    # Written first: on a full disk no claim may come into being, since it would depose the
    # worker of the claim before.
    first = folder / f"claim.{number}.{secrets.token_hex(8)}"
    try:
        write_text(first, text)
        if not _create_empty(path):
            return False
        first.replace(path)
    finally:
        for left in (first, first.with_name(f"{first.name}.part")):
            left.unlink(missing_ok=True)
    return True


def _create_empty(path: pathlib.Path) -> bool:
    """Creates an empty file; returns whether it did not exist."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True


def _text(holder: dict[str, Any], count: int | str) -> str:
    """Returns the content of a claim."""
    return json.dumps(holder | {"count": count}) + "\n"


def _read(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns the content of a claim and when its file was changed, in ns.

    The content is empty if the worker was killed while it created the claim.
    """
    try:
        with path.open() as file:
            changed_ns = os.fstat(file.fileno()).st_mtime_ns
            found = json.loads(file.read() or "{}")
    except (FileNotFoundError, json.JSONDecodeError):
        return {}, 0
    return (found if isinstance(found, dict) else {}), changed_ns


def _this_worker() -> dict[str, Any]:
    """Returns the description of this process in its claims."""
    found = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "since": time.time(),
    }
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else None
    if job := job or os.environ.get("SLURM_JOB_ID"):
        found["job"] = job
    return found


def _machine() -> str | None:
    """Returns what identifies the machine since its start, and the container.

    None if the system does not tell, as outside Linux.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers number their processes anew.
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
    return f"{boot} {namespace}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Returns whether a worker was on this machine and has ended."""
    same = {"host": socket.gethostname(), "machine": _machine()}
    if any(value is None or holder.get(key) != value for key, value in same.items()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # Another user's process.
        return False
    return False


def _cannot_write(folder: pathlib.Path, error: OSError) -> UserError:
    """Returns the error of a folder in which no claim can be written."""
    return UserError(
        f"{folder}: no claim can be written: {error.strerror or error}; {_ADVICE}"
    )
