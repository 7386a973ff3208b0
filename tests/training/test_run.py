"""Whole runs: what they write, and that stopping and going on changes no bit."""

import dataclasses
import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
from small import lines, same_result

from finetune_jax.config import flat, resolve
from finetune_jax.core.errors import TrainingError, UserError
from finetune_jax.core.train_state import TrainState
from finetune_jax.evaluation.evaluator import Evaluator
from finetune_jax.parallel.mesh import MeshDevices
from finetune_jax.plans.phase import Phase
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.training.loop import Loop
from finetune_jax.training.run import run
from finetune_jax.training.updates.phase_run import PhaseRun

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = pathlib.Path(__file__).parents[2]
PLAN = (
    Phase(
        name="head", steps=6, rules=small.HEAD, batch_stats="hold", clip_norm=1.0,
        weight_decay=0.1, accumulate_steps=2, peak_lr=1e-2,
    ),
    Phase(
        name="upper", steps=5, optimizer_state="reset",
        rules=(("head/.*", 1.0), ("stage3/.*", 0.5), (".*", 0.0)), peak_lr=1e-2,
    ),
    Phase(
        name="all", steps=5, optimizer_state="carry",
        rules=(("head/.*", 1.0), (".*", 0.1)), peak_lr=1e-2,
    ),
)  # fmt: skip

SHORT = (Phase(name="head", steps=2, rules=small.HEAD, peak_lr=1e-2),)


def config(plan=PLAN, **overrides):
    """Returns a config with dropout and augmentation, logged every update."""
    keys = {
        "model.head.dropout": 0.2,
        "data.augment": (("flip",), ("pad_crop", 1)),
        "evaluate.every_steps": 3,
        "evaluate.best": "validation/loss",
        "report.every_steps": 1,
        "checkpoint.every_steps": 2,
    } | overrides
    arguments = dict(model="cnn", convolutions=(4, 4), dense=(8,))
    return small.config(
        plan=plan,
        overrides=[(key, str(value)) for key, value in keys.items()],
        **arguments,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return run(config(), workdir), workdir


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Returns the workdir of a finished run of two updates."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    run(config(SHORT), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_writes_what_was_promised(undisturbed):
    result, workdir = undisturbed
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result["steps"] == 16 and set(result["frozen_sha256"]) == {
        "head", "upper", "all",
    }  # fmt: skip
    for part in ("final", "best"):
        assert set(result[part]) == {
            f"{split}/{name}"
            for split in ("validation", "test")
            for name in ("accuracy", "loss")
        }
    assert result["test/accuracy"] == result["final"]["test/accuracy"]
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["packages"]["jax"] and manifest["data_fingerprint"]
    assert (workdir / "report" / "learning_curves.png").stat().st_size > 5_000
    assert (workdir / "report" / "confusion_matrix.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_log_has_a_line_for_every_measurement_in_order(undisturbed):
    result, workdir = undisturbed
    found = lines(workdir)
    trained = [line["step"] for line in found if "train/loss" in line]
    assert trained == list(range(1, 17))
    evaluated = {line["step"]: line for line in found if "validation/loss" in line}
    # Before update 0, at intervals, and at the end of each phase.
    assert sorted(evaluated) == [0, 3, 6, 9, 11, 12, 15, 16]
    tested = sorted(line["step"] for line in found if "test/loss" in line)
    assert tested == [0, 6, 11, 16]
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    phases = [line["phase"] for line in found if "train/loss" in line]
    assert phases == ["head"] * 6 + ["upper"] * 5 + ["all"] * 5
    best = min(evaluated.values(), key=lambda line: line["validation/loss"])
    assert result["best_step"] == best["step"]
    assert result["best"]["validation/loss"] == best["validation/loss"]
    steps = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
    assert steps == {0, best["step"], 16}


@pytest.mark.slow
def test_a_finished_run_run_again_gives_the_same_bits(undisturbed, tmp_path):
    again = run(config(), tmp_path / "again")
    assert same_result(again, undisturbed[0])
    assert lines(tmp_path / "again") == lines(undisturbed[1])
    other = run(config(seed=1), tmp_path / "other")
    assert other["params_sha256"] != again["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 13])
@pytest.mark.ci_runs("6")
def test_a_run_that_dies_anywhere_ends_in_the_same_bits(
    undisturbed, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, step)
        run(config(), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    result = run(config(), tmp_path / "run")
    assert same_result(result, undisturbed[0])
    assert lines(tmp_path / "run") == lines(undisturbed[1])


@pytest.mark.exhaustive
def test_a_run_stopped_after_every_update_ends_in_the_same_bits(undisturbed, tmp_path):
    result, stops = small.run_with_stops(config(), tmp_path / "run")
    assert stops == 16
    assert same_result(result, undisturbed[0])
    assert lines(tmp_path / "run") == lines(undisturbed[1])


@pytest.mark.slow
def test_a_log_cut_short_by_a_kill_is_mended(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(small.Killed):

        def die(self, state, **due):
            if int(state.step) == 3:
                raise small.Killed

            return save(self, state, **due)

        save = Loop._save
        patch.setattr(Loop, "_save", die)
        run(config(), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')
    run(config(), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(undisturbed[1])


@pytest.mark.slow
def test_a_plateau_ends_a_phase_and_a_resume_knows_it(tmp_path, monkeypatch):
    plan = (
        Phase(
            name="head", steps=20, rules=small.HEAD, batch_stats="hold", peak_lr=0.0,
            plateau_metric="validation/loss", plateau_patience=2,
        ),
        Phase(name="all", steps=4),
    )  # fmt: skip
    result = run(config(plan), tmp_path / "one")
    # Equal at 3, 6 and 9: the first is the best, and two bring nothing.
    assert result["steps"] == 9 + 4

    small.die_before(monkeypatch, 7, 11)
    for _ in range(2):
        with pytest.raises(small.Killed):
            run(config(plan), tmp_path / "two")
    assert same_result(run(config(plan), tmp_path / "two"), result)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


@pytest.mark.slow
def test_phases_that_differ_in_rate_or_length_share_a_program(tmp_path, monkeypatch):
    compiled = []
    compile_train = MeshDevices.compile_train

    def counted(self, *arguments):
        compiled.append(1)
        return compile_train(self, *arguments)

    monkeypatch.setattr(MeshDevices, "compile_train", counted)
    plan = tuple(
        Phase(
            name=f"{name}{cycle}", steps=1 + cycle, peak_lr=1e-3 / (1 + cycle),
            rules=rules, schedule=schedule,
        )
        for cycle, schedule in enumerate(("cosine", "linear", "constant"))
        for name, rules in (
            ("head", small.HEAD), ("body", (("head/.*", 0.0), (".*", 1.0))),
        )
    )  # fmt: skip
    result = run(config(plan), tmp_path / "run")
    assert result["steps"] == 12 and len(compiled) == 2


def test_another_run_in_a_workdir_is_refused_and_nothing_changes(short, tmp_path):
    workdir = short
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as found:
        run(config(SHORT, seed=5), workdir)
    assert "config.seed: 5 here, 0 there" in str(found.value)
    assert before == {
        p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()
    }


def test_a_run_whose_weights_or_data_changed_is_not_taken_up(short, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(short, workdir)
    (workdir / "result.json").unlink()
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["data_fingerprint"] = "other"
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="began with other inputs .data_fingerprint"):
        run(config(SHORT), workdir)


def test_a_damaged_first_checkpoint_stops_a_resume_with_a_message(short, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(short, workdir)
    shutil.rmtree(workdir / "checkpoints" / "0")
    with pytest.raises(TrainingError, match="checkpoint 0"):
        run(config(SHORT), workdir)


def test_a_checkpoint_of_other_shapes_is_refused(short):
    from finetune_jax import main

    with pytest.raises(UserError, match="was saved by another model"):
        main.run([
            "--mode=evaluate", f"--workdir={short}", "--config.model.dense=(9,)",
        ])  # fmt: skip


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    plan = (Phase(name="all", steps=9, optimizer="sgd", peak_lr=1e30),)
    with pytest.raises(TrainingError, match="step [2-9], phase 'all'"):
        run(config(plan), tmp_path / "run")


@pytest.mark.slow
def test_a_run_holds_one_copy_of_what_it_trains(tmp_path, monkeypatch):
    update, measure, held, living = PhaseRun.call, Evaluator.measure, [], []
    gc.collect()
    # Other tests of this process may keep states in their fixtures.
    others = [found for found in gc.get_objects() if type(found) is TrainState]

    def on_host():
        states = (found for found in gc.get_objects() if type(found) is TrainState)
        states = (found for found in states if not any(found is o for o in others))
        return sum(isinstance(found.step, np.ndarray) for found in states)

    def watched(self, *arguments, **rate):
        held.append(on_host())
        return update(self, *arguments, **rate)

    def watched_measure(self, placed, splits, **prefix):
        gc.collect()
        living.append(on_host())
        return measure(self, placed, splits, **prefix)

    monkeypatch.setattr(PhaseRun, "call", watched)
    monkeypatch.setattr(Evaluator, "measure", watched_measure)
    plan = tuple(dataclasses.replace(phase, steps=2) for phase in PLAN)
    run(config(plan), tmp_path / "run")
    assert held and not any(held)
    # The first, and the best, lie on the host where the devices read them.
    assert max(living) == 1


def test_what_is_frozen_and_moves_stops_the_run(tmp_path, monkeypatch):
    enter = Loop._enter

    def wrong(self, *arguments):
        state = enter(self, *arguments)
        self.progress.frozen_sha256["head"] = "0" * 64
        return state

    monkeypatch.setattr(Loop, "_enter", wrong)
    with pytest.raises(TrainingError, match="Frozen values of phase .* have changed"):
        run(config(), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "jit"])
@pytest.mark.ci_runs("jit")
def test_eight_devices_run_the_whole_story(undisturbed, tmp_path, mode):
    found = config(**{"parallel.mode": mode, "parallel.devices": 8})
    result = run(found, tmp_path / "run")
    assert result["steps"] == 16
    first, first_one = lines(tmp_path / "run")[0], lines(undisturbed[1])[0]
    assert first["test/loss"] == pytest.approx(first_one["test/loss"], rel=1e-5)


COMMAND = [sys.executable, "-m", "finetune_jax.main"]


def written_config(tmp_path):
    """Writes a config file for the command line; returns its path."""
    path = tmp_path / "some_run.py"
    resolved = config()
    given = {k: v for k, v in flat(resolved).items() if not k.startswith("plan")}
    path.write_text(
        "import sys\nimport ml_collections\n"
        "from finetune_jax import config as configs\n"
        "from finetune_jax.plans.phase import Phase, as_config\n"
        f"VALUES = {given!r}\n"
        f"PLAN = {[dict(vars(phase)) for phase in PLAN]!r}\n"
        "def get_config():\n"
        "    config = configs.default()\n"
        "    with config.unlocked():\n"
        "        config.update_from_flattened_dict(VALUES)\n"
        "    config.plan = as_config([Phase(**phase) for phase in PLAN])\n"
        "    return config\n"
    )
    return path


def started(path, workdir):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [*COMMAND, f"--config={path}", f"--workdir={workdir}"],
        cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_step(process, workdir, step):
    """Returns once the log has reached a step; fails if the run ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = read_metrics(workdir / "metrics.jsonl")
        if found and found[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in time")


KILL, TERMINATE = signal.SIGKILL, signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [((8, KILL), (9, TERMINATE)), ((3, KILL), (8, KILL), (9, TERMINATE), (13, KILL))],
    ids=["once", "each phase"],
)
@pytest.mark.ci_runs("once")
def test_sigkill_and_sigterm_end_in_the_same_bits(tmp_path, signals):
    path = written_config(tmp_path)
    process = started(path, tmp_path / "whole")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.startswith(f"workdir {tmp_path / 'whole'}")
    assert output.rstrip().endswith(f"workdir {tmp_path / 'whole'}")
    workdir = tmp_path / "killed"
    for step, number in signals:
        process = started(path, workdir)
        wait_for_step(process, workdir, step)
        process.send_signal(number)
        output = process.communicate()[0]
        wanted = 75 if number == TERMINATE else -number
        assert process.returncode in (wanted, 0), output
    process = started(path, workdir)
    assert process.wait() == 0
    process.stdout.close()
    ours, theirs = (
        json.loads((tmp_path / name / "result.json").read_text())
        for name in ("killed", "whole")
    )
    assert same_result(ours, theirs)
    assert lines(workdir) == lines(tmp_path / "whole")


def test_resolving_a_written_config_gives_it_back(tmp_path):
    from finetune_jax import config as configs

    found, problems = resolve(configs.load(str(written_config(tmp_path))))
    assert not problems and not configs.differences(found, config())
