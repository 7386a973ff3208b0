"""Signals end a program in a bounded time, whatever its main thread does."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys, time
from finetune_jax.training.preemption import stop_on_signals
with stop_on_signals(float(sys.argv[1])) as stop:
    stop.at_risk = sys.argv[2] == "True"
    print("ready", flush=True)
    begin = time.monotonic()
    while time.monotonic() - begin < 20:
        if stop.asked() and sys.argv[3] == "saves":
            stop.at_risk = False
            print("saved", flush=True)
            sys.exit(75)
        sum(range(10_000_000))  # In C, where no handler in Python runs.
"""


def started(grace_s, *, at_risk, does):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(grace_s), str(at_risk), does],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process, within):
    begin = time.monotonic()
    output, errors = process.communicate(timeout=within)
    return process.returncode, output, errors, time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_where_nothing_is_at_risk_a_signal_ends_it_at_once(number):
    process = started(60, at_risk=False, does="computes")
    process.send_signal(number)
    status, _, errors, _ = ended(process, within=5)
    assert status == 75 and number.name in errors


def test_the_terminal_is_told_while_a_sweep_writes_a_log(tmp_path):
    log = tmp_path / "log.txt"
    redirected = f"contextlib.redirect_stderr(open({str(log)!r}, 'w'))"
    begin = f"import contextlib, sys\nwith {redirected}:"
    program = begin + PROGRAM.replace("\n", "\n    ")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "60", "False", "computes"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    status, _, errors, _ = ended(process, within=5)
    assert status == 75 and "stopped: SIGTERM" in errors and not log.read_text()


def test_what_is_at_risk_is_saved_first():
    process = started(60, at_risk=True, does="saves")
    process.send_signal(signal.SIGTERM)
    status, output, errors, _ = ended(process, within=10)
    assert (status, output, errors) == (75, "saved\n", "")


def test_when_the_grace_period_is_over_it_ends():
    process = started(1, at_risk=True, does="computes")
    process.send_signal(signal.SIGTERM)
    status, _, errors, seconds = ended(process, within=10)
    assert status == 75 and "no checkpoint within 1 s" in errors and seconds > 0.5


def test_a_second_signal_ends_it_at_once():
    process = started(60, at_risk=True, does="computes")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, _, errors, _ = ended(process, within=5)
    assert status == 75 and "second" in errors
