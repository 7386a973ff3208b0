"""Lines of progress: when they are printed, and what they say."""

import io
import re
import time

import pytest
from rich.console import Console

from finetune_jax.report.speed import Speed
from finetune_jax.report.tables import population_lines, result_lines
from finetune_jax.report.terminal import LatestUpdate, PhaseLine, Terminal

PHASE = PhaseLine(
    name="head", index=0, phases=2, end=600, total=900, steps_per_epoch=10, batch_size=8
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def updates(terminal, clock, calls, *, seconds, step=0, compile_s=0.0):
    """Makes calls of ten updates each, whose metrics are known one call later."""
    for number in range(1, calls + 1):
        clock.now += seconds
        known = LatestUpdate(step=step + 10 * (number - 1), loss=0.25, rate=0.001)
        latest = known if known.step else None
        terminal.advance(
            step + 10 * number,
            latest,
            train_s=clock.now - compile_s,
            compile_s=compile_s,
        )


def test_without_a_terminal_a_line_comes_every_half_minute(capsys):
    clock = Clock()
    terminal = Terminal(clock=clock)
    terminal.begin_phase(PHASE, 0)
    updates(terminal, clock, calls=50, seconds=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # In 100 seconds.
    assert re.match(
        r"\d\d:\d\d:\d\d  step 140 of 900  head \(1 of 2\)  epoch 14\.0  loss 0\.2500"
        r"  rate 0\.001  40 examples/s  92 s left in this phase$",
        lines[0],
    )


def test_compiling_is_in_no_estimate():
    clock = Clock()
    speed = Speed(clock)
    clock.now = 100.0  # The first call compiles for 98 seconds.
    speed.add(10, train_s=2, compile_s=98)
    assert speed.updates_per_s() is None and speed.seconds_left(50) is None
    clock.now = 152.0  # The second one compiles for 48 seconds.
    speed.add(20, train_s=6, compile_s=146)
    assert speed.updates_per_s() == pytest.approx(2.5)
    assert speed.seconds_left(50) == pytest.approx(12)


def test_measurements_are_in_the_time_left_but_not_in_the_speed():
    clock = Clock()
    speed = Speed(clock)
    speed.add(0, train_s=0, compile_s=0)
    clock.now = 10.0  # Five seconds of updates, five of measurements.
    speed.add(10, train_s=5, compile_s=0)
    assert speed.updates_per_s() == pytest.approx(2)
    assert speed.seconds_left(20) == pytest.approx(10)


def test_long_work_without_updates_is_told(capsys):
    terminal = Terminal(every_s=0.05)
    with terminal.working("measuring"):
        time.sleep(0.12)
    with terminal.working("measuring"):
        pass
    assert capsys.readouterr().out.count("still measuring, for 0 s") == 2


def test_members_of_a_population_share_the_half_minute(capsys):
    clock = Clock()
    parent = Terminal(clock=clock)
    members = [
        Terminal(quiet=True, label=f"member 00{n}", parent=parent, clock=clock)
        for n in range(3)
    ]
    for member in members:
        member.begin_phase(PHASE, 0)
    for _ in range(40):
        for member in members:
            updates(member, clock, calls=1, seconds=1, step=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("  member 00" in line for line in lines)


def test_the_bar_has_loss_epoch_and_the_total_over_phases(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    terminal = Terminal(clock=clock)
    terminal._console = Console(file=stream, force_terminal=True, width=160)
    terminal._is_live = True
    terminal.begin_phase(PHASE, 0)
    updates(terminal, clock, calls=5, seconds=2)
    terminal._bar.refresh()
    terminal.end_phase()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "head (1 of 2)" in shown and "50/900" in shown
    assert "epoch 5.0  loss 0.2500  rate 0.001  40 examples/s" in shown


def test_long_lines_of_metrics_are_folded(capsys):
    values = {f"validation/metric_{n}": 0.5 for n in range(12)}
    Terminal().metrics(85, "head", values, epoch=5.0)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\d\d:\d\d:\d\d  step     85  epoch   5.0  head  ", lines[0])
    assert len(lines) == 4 and max(map(len, lines)) <= 160
    assert len({line.index("validation") for line in lines}) == 1


def test_a_result_is_aligned_whatever_the_length_of_its_names():
    metrics = {"validation/normalised_entropy": 1.0555, "test/loss": 10.5}
    lines = result_lines(
        {"final": metrics, "best": metrics, "best_step": 3, "steps": 9}
    )
    assert lines == [
        "                                 final     best",
        "validation/normalised_entropy   1.0555   1.0555",
        "test/loss                      10.5000  10.5000",
        "best at step 3 of 9",
    ]


def test_a_population_has_a_heading_and_short_labels():
    rows = [
        {
            "settings": {"plan[0].peak_lr": 0.1, "plan[0].weight_decay": 0.0},
            "members": [0, 1],
            "failed": [],
            "mean": {"validation/accuracy": 0.9},
            "interval_95": {"validation/accuracy": 0.05},
        },
        {
            "settings": {"plan[0].peak_lr": 10.0, "plan[0].weight_decay": 0.0},
            "members": [2],
            "failed": [2],
            "mean": {},
            "interval_95": {},
        },
    ]
    assert population_lines(rows)[1:] == [
        "   peak_lr  weight_decay  members  failed  validation/accuracy",
        "1      0.1           0.0        2       0      0.9000 ± 0.0500",
        "2     10.0           0.0        1       1                    -",
    ]


def test_several_programs_are_told_with_their_number_and_seconds(capsys):
    terminal = Terminal()
    for compiled in ((3.0, 3.0), (5.0, 6.5, 6.5)):  # In two phases.
        terminal.begin_phase(PHASE, 0)
        for step, seconds in enumerate(compiled):
            terminal.advance(step, None, train_s=0.0, compile_s=seconds)
    terminal.end_phase()
    assert capsys.readouterr().out.splitlines() == [
        "batches differ in shape: one program is compiled for each",
        "head: 2 programs compiled, 4 s",
    ]
