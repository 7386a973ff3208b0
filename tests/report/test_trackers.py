"""TensorBoard and W&B get the numbers of metrics.jsonl, whatever happens to the run."""

import json
import os
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import small
from tracker_runs import OVERRIDES, ROOT, config

from finetune_jax.core.errors import UserError
from finetune_jax.report.metrics_log import MetricsLog, read_metrics
from finetune_jax.report.trackers import make_trackers
from finetune_jax.training.run import run

pytestmark = pytest.mark.usefixtures("no_pictures")


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
        assert len(data) >= 16 + length, (
            "a file that was closed ends with a whole event"
        )
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


@pytest.mark.slow
def test_without_the_key_nothing_is_written(tmp_path):
    run(config(), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb_id").exists()


@pytest.mark.slow
def test_a_resumed_run_shows_every_number_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 5)
        run(config(tensorboard=True), tmp_path / "run")
    first = shown(tmp_path / "run")
    assert first == logged(tmp_path / "run")
    # The line of step 4 was written, but the state after it was not saved.
    assert max(step for step, _, _ in first) == 4
    run(config(tensorboard=True), tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    found = shown(tmp_path / "run")
    assert found == logged(tmp_path / "run")
    kept = [one for one in first if one[0] <= 3]
    assert found[: len(kept)] == kept
    assert len({one[:2] for one in found}) == len(found)


@pytest.mark.slow
def test_a_finished_run_run_again_shows_the_same(tmp_path):
    run(config(tensorboard=True), tmp_path / "run")
    before = shown(tmp_path / "run")
    run(config(tensorboard=True), tmp_path / "run")
    assert shown(tmp_path / "run") == before == logged(tmp_path / "run")


KILLED = """
import os, sys, pathlib
sys.path[:0] = ['tests']
import tracker_runs as tests
from finetune_jax.training.updates.phase_run import PhaseRun
from finetune_jax.training.run import run

call = PhaseRun.call

def dies(self, placed, stop, **rate):
    if self.step == 5:
        os._exit(9)
    return call(self, placed, stop, **rate)

PhaseRun.call = dies
run(tests.config(tensorboard=True), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_kill_without_warning_loses_nothing(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert max(step for step, _, _ in logged(workdir)) == 4
    run(config(tensorboard=True), workdir)
    assert shown(workdir) == logged(workdir)


def test_attempts_that_begin_in_one_second_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    for line, step in enumerate((0, 9, 10)):
        log = opened_log(tmp_path, tensorboard=True, first_step=step, keep_lines=line)
        log.write({"step": step, "phase": "all", "train/loss": 0.5})
        log.close()
    assert [step for step, _, _ in shown(tmp_path)] == [0, 9, 10]


def opened_log(workdir, *, first_step=0, keep_lines=0, **report):
    report = {"tensorboard": False, "wandb": None} | report
    trackers = make_trackers(report, dict, workdir=workdir, first_step=first_step)
    path = workdir / "metrics.jsonl"
    return MetricsLog(path, keep_lines=keep_lines, trackers=trackers)


def test_trackers_see_that_a_number_is_not_finite(tmp_path):
    log = opened_log(tmp_path, tensorboard=True)
    log.write({"step": 2, "phase": "all", "a/nan": float("nan"), "a/inf": float("inf"),
               "a/none": None, "a/flag": True, "a/one": 1})  # fmt: skip
    log.close()
    # JSON has no word for them, so that the log says null.
    assert logged(tmp_path) == [(2, "a/flag", 1), (2, "a/one", 1)]
    found = {name: number for _, name, number in shown(tmp_path)}
    assert found.keys() == {"a/nan", "a/inf", "a/one"}
    assert np.isnan(found["a/nan"]) and found["a/inf"] == np.inf


# Weights & Biases


class FakeWandb(types.ModuleType):
    """A module that has of W&B what its documentation has, and keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, *, id=None, **options):
        self.runs.append(FakeRun(id or f"id{len(self.runs)}", id, options))
        return self.runs[-1]


class FakeRun:
    def __init__(self, id, asked, options):
        self.id, self.asked, self.options = id, asked, options
        self.told, self.finished = [], 0

    def log(self, values, step):
        assert not self.finished
        self.told += [(step, name, np.float32(v)) for name, v in values.items()]

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_every_number_at_its_step(wandb, tmp_path):
    run(config(wandb="flowers"), tmp_path / "one")
    (made,) = wandb.runs
    assert made.told == logged(tmp_path / "one")
    assert made.finished == 1
    assert made.options["project"] == "flowers"
    assert made.options["name"] == "one"
    assert made.options["dir"] == str(tmp_path / "one")
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    assert made.options["config"] == written


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_run_of_wandb(wandb, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 5)
        run(config(wandb="flowers"), tmp_path / "run")
    run(config(wandb="flowers"), tmp_path / "run")
    first, second = wandb.runs
    assert second.asked == first.id
    assert first.options["resume"] == second.options["resume"] == "allow"
    assert first.finished == second.finished == 1
    kept = [one for one in first.told if one[0] <= 3]
    assert kept + second.told == logged(tmp_path / "run")
    run(config(wandb="flowers"), tmp_path / "other")
    assert wandb.runs[2].id != first.id


@pytest.mark.slow
def test_both_trackers_may_be_on(wandb, tmp_path):
    run(config(wandb="flowers", tensorboard=True), tmp_path / "run")
    assert wandb.runs[0].told == shown(tmp_path / "run") == logged(tmp_path / "run")


@pytest.mark.parametrize(
    ("package", "report", "extra"),
    [
        ("tensorboardX", {"tensorboard": True}, "tensorboard"),
        ("wandb", {"wandb": "flowers"}, "wandb"),
    ],
)
@pytest.mark.fast_runs("wandb-report1-wandb")
def test_a_missing_package_is_named_with_its_extra(
    package, report, extra, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, package, None)
        with pytest.raises(UserError) as error:
            run(config(**report), tmp_path / "run")
    assert str(error.value) == (
        f"config.report.{extra} needs a package that is not installed: "
        f"python -m pip install 'finetune_jax[{extra}]'"
    )
    # The same command runs without it, too, once the key is gone.
    assert run(config(), tmp_path / "run")["steps"] == 6


def records(path):
    """Yields the records of a file of W&B: a log of LevelDB in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if 2**15 - place % 2**15 < 7:  # The rest of a block that holds no header.
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_itself_takes_every_number_without_network(tmp_path):
    pytest.importorskip("wandb")
    workdir = tmp_path / "run"
    flags = {"report.wandb": "flowers"} | OVERRIDES
    command = [
        sys.executable, "-m", "finetune_jax.main", f"--workdir={workdir}",
        "--config=configs/iris_mlp.py:tiny",
        *(f"--config.{key}={value}" for key, value in flags.items()),
    ]  # fmt: skip
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    for _ in range(2):
        # Without it, the run is taken up again; there is nothing left to do but to end.
        (workdir / "result.json").unlink(missing_ok=True)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    first, second = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name
    found = []
    for record in records(first):
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        step = record.history.step.num
        found += [
            (step, name, np.float32(value))
            for name, value in items.items()
            if not name.startswith("_")
        ]
    assert sorted(found) == sorted(logged(workdir))
