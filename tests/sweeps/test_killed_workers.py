"""Workers of a sweep are killed, and the sweep is as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from sweep_runs import ROOT, SweepRun, environment_of_users

# The command, which also logs on the clock of the machine who works on which member.
PROGRAM = """
import json, os, sys, time
from finetune_jax.sweeps import claims
log = os.open(sys.argv.pop(1), os.O_APPEND | os.O_CREAT | os.O_WRONLY)
def tell(what, claim):
    line = [what, claim.folder.name, claim.number, os.getpid(), time.monotonic()]
    os.write(log, (json.dumps(line) + "\\n").encode())
take, release = claims.Claims.take, claims.Claim.release
def taken(self, key, is_done):
    claim = take(self, key, is_done)
    if claim is not None:
        tell("begin", claim)
    return claim
def released(self, *, is_done):
    tell("done" if is_done else "released", self)
    release(self, is_done=is_done)
claims.Claims.take, claims.Claim.release = taken, released
from finetune_jax.sweep import main
main()
"""


def lines_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def killed_now_and_then(sweep, log, *, workers, kills, limit_s):
    """Runs workers, kills one now and then, and returns (pid, time) of each kill.

    A victim works on a member, and others are begun or done between two kills, so that
    slow machines get on too.
    """
    rng, killed = random.Random(0), []
    text = log.with_suffix(".txt").open("w")
    log.touch()

    def start():
        command = [sys.executable, "-c", PROGRAM, str(log), *sweep.arguments("run")]
        return subprocess.Popen(
            command, env=environment_of_users(), cwd=ROOT, stdout=text, stderr=text
        )

    running, due = [start() for _ in range(workers)], 0
    end = time.monotonic() + limit_s
    try:
        while any(process.poll() is None for process in running):
            assert time.monotonic() < end, "the sweep does not end"
            time.sleep(rng.uniform(0, 0.5))
            lines = lines_of(log)
            begun = {pid for _, _, _, pid, _ in lines}
            victims = [k for k, p in enumerate(running) if p.poll() is None]
            victims = [k for k in victims if running[k].pid in begun]
            if victims and len(lines) > due and len(killed) < kills:
                index, due = rng.choice(victims), len(lines) + rng.randint(0, 6)
                killed.append((running[index].pid, time.monotonic()))
                running[index].send_signal(signal.SIGKILL)
                running[index].wait()
                running[index] = start()
    finally:
        for process in running:
            process.kill()
            process.wait()
        text.close()
    statuses = [process.returncode for process in running]
    assert statuses == [0] * workers, log.with_suffix(".txt").read_text()
    return killed


def check_that_one_worked_at_a_time(log, kills, keys):
    """Checks the log: one worker at a time for each member, and none once it is done."""
    ended, begun = {}, {}
    for what, key, number, pid, at in lines_of(log):
        span = (key, number)
        if what == "begin":
            assert span not in begun
            begun[span] = pid, at
        else:
            assert begun[span][0] == pid
            ended[span] = what, at
    assert {key for key, _ in begun} == set(keys)
    died = {}
    for pid, at in kills:
        died.setdefault(pid, at)
    for (key, number), (_, at) in begun.items():
        for other in range(1, number):
            # Who was killed before the line of its claim could be written did not begin.
            if (key, other) not in begun:
                continue
            pid = begun[key, other][0]
            what, until = ended.get((key, other), ("killed", died.get(pid)))
            assert until < at, f"{key}: claim {number} began before {other} ended"
            assert what != "done", f"{key}: claimed again after it was done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers, kills, rates, seeds",
    [
        pytest.param(2, 2, 3, 3, id="9 members"),
        pytest.param(8, 60, 4, 50, id="200 members", marks=pytest.mark.exhaustive),
    ],
)
def test_workers_that_are_killed_leave_the_sweep_as_it_would_be(
    tmp_path, workers, kills, rates, seeds
):
    undisturbed = SweepRun(tmp_path / "undisturbed", rates=rates, seeds=seeds)
    undisturbed.run("run")
    # Runs beside a sweep are found by their configs; these must not be.
    sweep = SweepRun(tmp_path / "apart" / "killed", rates=rates, seeds=seeds)
    log = tmp_path / "log"
    killed = killed_now_and_then(
        sweep, log, workers=workers, kills=kills, limit_s=600 + 60 * kills
    )
    assert len(killed) >= kills / 2
    assert not sweep.failures()
    check_that_one_worked_at_a_time(log, killed, sweep.keys())
    assert len(sweep.results()) == rates * seeds
    assert sweep.outcome() == undisturbed.outcome()
