"""TensorBoard and W&B get the numbers of metrics.jsonl, whatever happens to the run."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from finetune_jax import config as configs
from finetune_jax.errors import UserError
from finetune_jax.loop import Loop
from finetune_jax.report.log import MetricsLog, read_metrics
from finetune_jax.report.trackers import make_trackers
from finetune_jax.run import run

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = {
    "parallel.devices": 1,
    "plan[0].steps": 6,
    "evaluate.every_steps": 3,
    "checkpoint.every_steps": 2,
}


class Killed(BaseException):
    """Stands for a kill; files are still closed."""


def config(**report):
    given = configs.load(str(ROOT / "configs" / "iris_mlp.py:tiny"))
    overrides = OVERRIDES | {f"report.{key}": value for key, value in report.items()}
    found, problems = configs.resolve(
        given, [(key, str(value)) for key, value in overrides.items()]
    )
    assert not problems
    return found


def dying_at(monkeypatch, step):
    """Makes runs die before update `step`; they have saved at the one before."""
    update = Loop._update

    def dies(self, placed, phase, batches, number, *rest):
        if number == step:
            raise Killed
        return update(self, placed, phase, batches, number, *rest)

    monkeypatch.setattr(Loop, "_update", dies)


def logged(workdir):
    """Returns (step, name, number) of everything in metrics.jsonl."""
    return [
        (line["step"], name, np.float32(value))
        for line in read_metrics(workdir / "metrics.jsonl")
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    ]


# TensorBoard


def events(path):
    """Yields the events of a file: length, checksum, event, checksum; until it ends."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        assert len(data) >= 16 + length, "a file that was closed ends with a whole event"
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def shown(workdir):
    """Returns (step, name, number) of everything that TensorBoard shows."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[0] < event.step]
            for value in event.summary.value:
                found.append((event.step, value.tag, np.float32(value.simple_value)))
    return found


def test_event_files_hold_exactly_the_numbers_of_the_log(tmp_path):
    run(config(tensorboard=True), tmp_path / "run")
    found = shown(tmp_path / "run")
    assert found == logged(tmp_path / "run")
    names = {name for _, name, _ in found}
    assert names >= {"train/loss", "validation/loss", "test/accuracy", "time/step_s"}
    assert {step for step, _, _ in found} == set(range(7))


def test_without_the_key_nothing_is_written(tmp_path):
    run(config(), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb_id").exists()


# Update 5 has been made and logged, but what was saved last is the state after 4.
def test_a_resumed_run_shows_every_number_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, 5)
        patch.setattr(Loop, "read", reads_at_once(Loop.read))
        run(config(tensorboard=True), tmp_path / "run")
    first = shown(tmp_path / "run")
    assert first == logged(tmp_path / "run")
    assert max(step for step, _, _ in first) == 5
    run(config(tensorboard=True), tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    found = shown(tmp_path / "run")
    assert found == logged(tmp_path / "run")
    kept = [one for one in first if one[0] <= 4]
    assert found[: len(kept)] == kept
    assert len({one[:2] for one in found}) == len(found)


def reads_at_once(read):
    """Returns a `Loop.read` that has nothing left to read one update later."""

    def reads(self):
        read(self)
        update = self.__dict__.get("_unread")
        assert update is None

    return reads


def test_attempts_that_begin_in_one_second_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    report = {"tensorboard": True, "wandb": None}
    for first_step in (0, 9, 10):
        log = make_log(report, tmp_path, first_step, keep_lines=first_step)
        log.write({"step": first_step, "phase": "all", "train/loss": 0.5})
        log.close()
    assert [step for step, _, _ in shown(tmp_path)] == [0, 9, 10]


def make_log(report, workdir, first_step, keep_lines):
    trackers = make_trackers(report, dict, workdir=workdir, first_step=first_step)
    return MetricsLog(
        workdir / "metrics.jsonl", keep_lines=keep_lines, trackers=trackers
    )
