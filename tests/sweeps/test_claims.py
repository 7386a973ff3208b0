"""A member of a sweep has one worker at a time, whatever happens to the workers."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.sweeps import claims

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_S = 0.6
ELSEWHERE = {"host": "elsewhere", "pid": 1, "machine": "another 1", "since": 0.0}


def never():
    return False


def worker(root, timeout_s=TIMEOUT_S):
    """Returns a worker's view of the claims, and the list of claims that it lost."""
    lost = []
    return claims.Claims(
        root, timeout_s=timeout_s, on_lost=lambda *found: lost.append(found)
    ), lost


def until(is_so, seconds=10):
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)
    return found


def write(root, number, content):
    (root / "a").mkdir(exist_ok=True)
    (root / "a" / f"claim.{number}").write_text(content)


def test_one_of_many_workers_gets_a_member(tmp_path):
    barrier, taken = threading.Barrier(16), []

    def take():
        mine, _ = worker(tmp_path)
        barrier.wait()
        taken.append(mine.take("a", never))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (claim,) = [found for found in taken if found]
    assert claim.number == 1 and claim.holds()
    claim.release(is_done=False)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["claim.1"]


def test_a_released_member_can_be_claimed_at_once_and_a_done_one_never(tmp_path):
    one, other = worker(tmp_path)[0], worker(tmp_path)[0]
    first = one.take("a", never)
    assert other.take("a", never) is None
    first.release(is_done=False)
    assert other.state("a") == "released"
    second = other.take("a", never)
    assert second.number == 2 and not first.holds()
    second.release(is_done=True)
    assert one.take("a", lambda: True) is None
    assert one.take("a", never) is None  # Another machine may not see the result yet.


def test_a_member_that_ends_while_it_is_claimed_is_not_worked_on(tmp_path):
    answers = iter([False, True])
    assert worker(tmp_path)[0].take("a", lambda: next(answers)) is None


def test_a_worker_that_beats_keeps_its_claim_and_one_that_does_not_loses_it(tmp_path):
    one, lost = worker(tmp_path)
    first = one.take("a", never)
    other, _ = worker(tmp_path)
    end = time.monotonic() + 3 * TIMEOUT_S
    while time.monotonic() < end:
        assert other.take("a", never) is None
        time.sleep(0.02)
    assert other.state("a")["count"] > 5
    # The counter stands still, as that of a machine that is gone.
    path = tmp_path / "a" / "claim.1"
    first._over.set()
    first._thread.join()
    path.write_text(json.dumps(json.loads(path.read_text()) | ELSEWHERE))
    begin = time.monotonic()
    second = until(lambda: other.take("a", never))
    assert time.monotonic() - begin >= TIMEOUT_S and second.number == 2
    assert not lost
    second.release(is_done=True)


def test_the_clock_of_another_machine_does_not_matter(tmp_path):
    for since, modified in ((0.0, 0), (4e9, 4e9)):
        write(tmp_path, 1, json.dumps(ELSEWHERE | {"since": since, "count": 1}))
        os.utime(tmp_path / "a" / "claim.1", (modified, modified))
        mine, _ = worker(tmp_path)
        assert mine.take("a", never) is None
        time.sleep(TIMEOUT_S / 2)
        assert mine.take("a", never) is None


def test_a_worker_whose_claim_is_not_the_newest_hears_of_it(tmp_path):
    one, lost = worker(tmp_path)
    first = one.take("a", never)
    write(tmp_path, 2, "")
    assert not first.holds()
    until(lambda: lost)
    assert lost == [(first, "claim.2 is newer")]


def test_a_worker_that_lost_its_claim_ends(tmp_path):
    program = (
        "import pathlib, sys, time; from finetune_jax.sweeps import claims\n"
        "mine = claims.Claims(pathlib.Path(sys.argv[1]), timeout_s=0.6)\n"
        "claim = mine.take('a', lambda: False)\n"
        "print('jax' in sys.modules, flush=True); time.sleep(60)"
    )
    process = started(program, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "False\n"  # Claims need no jax.
    write(tmp_path, 2, "")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == claims.LOST
    assert f"{tmp_path / 'a'}: lost claim.1: claim.2 is newer" in errors


def started(program, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment, text=True, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_the_member_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    program = (
        "import os, pathlib, sys; from finetune_jax.sweeps import claims\n"
        "claims.Claims(pathlib.Path(sys.argv[1]), timeout_s=60).take('a', bool)\n"
        "os.kill(os.getpid(), 9)"
    )
    process = started(program, tmp_path)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -9, errors
    mine, _ = worker(tmp_path, timeout_s=60)
    state = mine.state("a")
    assert state["is_gone"] and state["pid"] == process.pid and state["number"] == 1
    claim = mine.take("a", never)
    assert claim.number == 2
    assert not mine.state("a")["is_gone"]
    claim.release(is_done=True)


@pytest.mark.parametrize("content", ["", "{", "3"])
def test_a_claim_without_content_goes_stale_like_any_other(tmp_path, content):
    write(tmp_path, 1, content)
    mine, _ = worker(tmp_path)
    assert mine.state("a") == {"number": 1, "is_gone": False}
    begin = time.monotonic()
    claim = until(lambda: mine.take("a", never))
    assert time.monotonic() - begin >= TIMEOUT_S and claim.number == 2
    claim.release(is_done=True)


def test_the_state_names_the_worker_and_its_job(tmp_path, monkeypatch):
    mine, _ = worker(tmp_path)
    assert mine.state("a") is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    claim = mine.take("a", never)
    state = mine.state("a")
    assert state["pid"] == os.getpid() and state["job"] == "7_3"
    assert abs(state["since"] - time.time()) < 60
    claim.release(is_done=False)


class FullDisk:
    """Has files of some names not be written, as on a full disk."""

    def __init__(self, monkeypatch):
        self.is_full, self.refused, write_text = True, 0, claims.write_text

        def write(path, text):
            if self.is_full:
                self.refused += 1
                raise OSError(28, "No space left on device", str(path))
            write_text(path, text)

        monkeypatch.setattr(claims, "write_text", write)


def test_a_full_disk_loses_no_claim_and_makes_none(tmp_path, monkeypatch):
    one, lost = worker(tmp_path)
    claim = one.take("a", never)
    other, _ = worker(tmp_path)
    disk = FullDisk(monkeypatch)
    end = time.monotonic() + 3 * TIMEOUT_S
    while time.monotonic() < end:
        assert other.take("a", never) is None
        time.sleep(0.02)
    assert disk.refused > 5 and claim.holds() and not lost
    with pytest.raises(UserError, match=r"/b: no claim can be written: No space left"):
        other.take("b", never)
    assert not list((tmp_path / "b").iterdir())
    disk.is_full = False
    claim.release(is_done=False)
    assert other.state("a") == "released"


def test_a_folder_that_cannot_be_read_for_long_loses_the_claim(tmp_path, monkeypatch):
    mine, lost = worker(tmp_path)
    claim = mine.take("a", never)

    def refuse(_):
        raise OSError(116, "Stale file handle")

    begin = time.monotonic()
    monkeypatch.setattr(claims, "_newest", refuse)
    until(lambda: lost)
    assert time.monotonic() - begin > TIMEOUT_S * (1 - 2 / claims.BEATS)
    assert lost == [(claim, "the folder cannot be read: Stale file handle")]


def test_a_folder_is_checked_before_it_is_used(tmp_path, monkeypatch):
    claims.check_shared(tmp_path / "claims")
    assert not list((tmp_path / "claims").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file: no claim can be written: File exists"):
        claims.check_shared(tmp_path / "file")
    monkeypatch.setattr(claims, "_create_empty", lambda path: True)
    with pytest.raises(UserError, match="creates the same file twice"):
        claims.check_shared(tmp_path / "claims")
    monkeypatch.undo()
    FullDisk(monkeypatch)
    with pytest.raises(UserError, match="claims: no claim .* No space left"):
        claims.check_shared(tmp_path / "claims")
    assert not list((tmp_path / "claims").iterdir())


def test_workers_that_see_another_folder_are_told(tmp_path, monkeypatch):
    shared, own = tmp_path / "shared", tmp_path / "own"
    token = claims.token(shared)
    assert claims.token(shared) == token
    monkeypatch.setenv(claims.TOKEN, token)
    claims.check_shared(shared)
    with pytest.raises(UserError, match=r"/own: on \S+ this is not the folder"):
        claims.check_shared(own)
    claims.token(own)
    with pytest.raises(UserError, match="a file system that all machines share"):
        claims.check_shared(own)


def test_launchers_that_start_together_see_one_token(tmp_path):
    barrier, found = threading.Barrier(16), []

    def launch():
        barrier.wait()
        found.append(claims.token(tmp_path / "claims"))

    threads = [threading.Thread(target=launch) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1 and found[0]
    # Its writer was killed.
    (tmp_path / "claims" / "token").write_text("")
    assert claims.token(tmp_path / "claims")


# A worker of the hammer: every member takes a moment, and what happens is written to a log
# with times of the clock that all processes of a machine share.
WORKER = """
import json, os, pathlib, random, sys, time
from finetune_jax.sweeps import claims
root, members = pathlib.Path(sys.argv[1]), int(sys.argv[2])
log = os.open(root / "log", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
def tell(what, key, number):
    line = [what, key, number, os.getpid(), time.monotonic_ns()]
    os.write(log, (json.dumps(line) + "\\n").encode())
if sys.argv[4] == "elsewhere":  # As if each worker had a machine of its own.
    claims._machine = lambda: None
mine = claims.Claims(root / "claims", timeout_s=float(sys.argv[3]))
keys = [f"m{index:03d}" for index in range(members)]
while not all((root / key).exists() for key in keys):
    random.shuffle(keys)
    for key in keys:
        result = root / key
        claim = mine.take(key, result.exists)
        if claim is None:
            continue
        tell("begin", key, claim.number)
        for _ in range(10):
            time.sleep(random.uniform(0, 0.03))
            tell("works", key, claim.number)
        try:
            os.close(os.open(result, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            tell("twice", key, claim.number)
        tell("end", key, claim.number)
        claim.release(is_done=True)
    time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "timeout_s, where",
    [
        (3.0, "elsewhere"),
        pytest.param(60.0, "here", marks=pytest.mark.exhaustive),
    ],
)
def test_eight_workers_that_are_killed_do_each_of_200_members_once(
    tmp_path, timeout_s, where
):
    rng, kills = random.Random(0), 0

    def start():
        return started(WORKER, tmp_path, 200, timeout_s, where)

    workers = [start() for _ in range(8)]
    end = time.monotonic() + 240
    while any(process.poll() is None for process in workers):
        assert time.monotonic() < end
        time.sleep(rng.uniform(0, 0.5))
        index = rng.randrange(8)
        if workers[index].poll() is None:
            workers[index].send_signal(signal.SIGKILL)
            _, errors = workers[index].communicate()
            kills += 1
            assert not errors
            workers[index] = start()
    ends = [(process.communicate()[1], process.returncode) for process in workers]
    assert ends == [("", 0)] * 8
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    names = [line[0] for line in lines]
    assert kills >= 10 and "twice" not in names
    spans = {}
    for _, key, number, pid, at in lines:
        span = spans.setdefault((key, number), [pid, at, at])
        assert span[0] == pid  # A claim has one worker.
        span[2] = at
    assert {key for key, _ in spans} == {f"m{index:03d}" for index in range(200)}
    assert len(spans) > 200  # Some members were taken over.
    for (key, number), (_, begin, _) in spans.items():
        before = [spans[key, n] for n in range(1, number) if (key, n) in spans]
        assert all(stop < begin for _, _, stop in before), key


LOSING = """
import contextlib, sys, types
from finetune_jax.sweeps import claims
with contextlib.redirect_stderr(open(sys.argv[1], "w")):
    claims.end_at_once(types.SimpleNamespace(folder="x", number=1), "claim.2 is newer")
"""


def test_the_terminal_is_told_of_a_lost_claim(tmp_path):
    command = [sys.executable, "-c", LOSING, str(tmp_path / "log.txt")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == claims.LOST
    assert "x: lost claim.1: claim.2 is newer" in done.stderr
