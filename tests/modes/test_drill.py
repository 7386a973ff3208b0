"""A drill kills a short version of a run, and says whether it ends in the same bits."""

import json
import pathlib
import signal

import pytest
from command_line import IRIS, ROOT, refused

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.config.short import EXAMPLES, STEPS, device_count, short_overrides
from finetune_jax.modes import drill
from finetune_jax.plans import Phase, as_config
from finetune_jax.plans.phase import plan_problems

FILES = sorted((ROOT / "configs").glob("*.py"))


def resolved(config, overrides=()):
    found, problems = configs.resolve(config, [*overrides])
    assert not problems and not plan_problems(found.plan)
    return found


def short(config, devices=2):
    config = resolved(config)
    overrides = short_overrides(config, devices)
    return config, resolved(config, overrides.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_short_config_has_the_phases_of_the_whole_one(file):
    argument = ":visits.csv" if file.stem == "table" else ""
    whole, small = short(configs.load(f"{file}{argument}"))
    for before, after in zip(whole.plan, small.plan, strict=True):
        assert after.steps <= STEPS and after.epochs is None
        parts = after.accumulate_steps * 2
        assert whole.data.batch_size % parts or small.data.batch_size % parts == 0
        for key in ("name", "rules", "optimizer", "accumulate_steps", "peak_lr"):
            assert after[key] == before[key]
    assert small.model == whole.model and small.task == whole.task
    assert small.data.batch_size <= whole.data.batch_size


def test_whole_splits_are_cut_and_parts_are_kept():
    config = configs.default()
    config.plan = as_config([Phase(epochs=1)])
    config.data.update(train="train", validation="train[80%:]", test="a+b")
    _, small = short(config)
    assert small.data.train == f"train[:{EXAMPLES}]"
    assert (small.data.validation, small.data.test) == ("train[80%:]", "a+b")
    config.data.sampling = "balanced"
    assert short(config)[1].data.train == "train"


def test_a_short_batch_divides_into_the_same_micro_batches_on_all_devices():
    config = configs.default()
    config.plan = as_config([Phase(epochs=1, accumulate_steps=3)])
    config.data.batch_size = 48
    assert short(config)[1].data.batch_size == 12
    assert short(config, devices=4)[1].data.batch_size == 12
    config.data.batch_size = 6
    assert short(config)[1].data.batch_size == 6


@pytest.mark.parametrize(
    "fsdp, model, devices, kept", [(1, 1, 2, True), (2, 2, 4, True), (16, 1, 2, False)]
)
def test_the_mesh_is_kept_where_it_is_small(fsdp, model, devices, kept):
    config = configs.default()
    config.plan = as_config([Phase(epochs=1)])
    config.parallel.update(fsdp=fsdp, model=model)
    assert device_count(resolved(config)) == devices
    _, small = short(config, devices)
    assert small.parallel.devices == devices
    found = small.parallel.fsdp, small.parallel.model
    assert found == ((fsdp, model) if kept else (devices, 1))


def test_events_are_in_order_and_take_turns():
    events = drill.planned([10, 11, 20], ["head", "one", "all"])
    assert [
        (event.place, event.step, event.kind, event.process) for event in events
    ] == [
        ("phase 'head'", 1, "update", 1),
        ("phase 'head'", 5, "update", 1),
        ("a save", 5, "save", 0),
        ("end of phase 'head'", 10, "checkpoint", 0),
        ("end of phase 'one'", 11, "checkpoint", 0),
        ("phase 'all'", 15, "update", 1),
        ("end of phase 'all'", 20, "checkpoint", 1),
    ]
    assert [event.number for event in events].count(signal.SIGTERM) == 1


def event(kind, step=4, number=signal.SIGKILL):
    return drill.Event(place="here", step=step, kind=kind, process=0, number=number)


def log(folder, *steps):
    """Writes the metrics of a new attempt."""
    text = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    part = folder / "part"
    part.write_text(text)
    part.replace(folder / "metrics.jsonl")


def test_an_event_waits_for_this_attempt(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("0", "3", "6.orbax-checkpoint-tmp"):
        (checkpoints / name).mkdir(parents=True)
    log(tmp_path, 0, 5)  # Of an attempt that was killed at step 6.
    seen = drill.Watched(tmp_path)
    assert seen.begin == 3 and seen.logged() == -1 and not seen.is_saving()
    assert not seen.has_come(event("update"))
    log(tmp_path, 0, 3)
    for kind in ("update", "checkpoint"):  # It has made no update yet.
        assert not seen.has_come(event(kind, step=2))
    log(tmp_path, 0, 4)
    assert seen.has_come(event("update")) and not seen.has_come(event("checkpoint"))
    (checkpoints / "6.orbax-checkpoint-tmp").rmdir()
    assert not seen.has_come(event("save"))
    (checkpoints / "6.orbax-checkpoint-tmp").mkdir()
    assert seen.has_come(event("save"))
    (checkpoints / "6.orbax-checkpoint-tmp").rename(checkpoints / "6")
    assert not seen.has_come(event("save")) and seen.has_come(event("checkpoint"))
    assert not seen.has_come(event("checkpoint", step=7))


def test_the_command_is_that_of_the_user_without_mode_and_workdir():
    given = ["--mode", "drill", "--config=a.py", "--workdir=b", "--config.seed", "3"]
    assert drill.of_flags(given) == ["--config=a.py", "--config.seed", "3"]


def test_what_a_drill_cannot_run_is_refused(tmp_path):
    population = "--config.population=((('seed', 1),),)"
    text = refused("--mode=drill", IRIS, population)
    assert "config.population: 1 members; drill one of them: population=()" in text
    text = refused("--mode=drill", IRIS, f"--config.extend={tmp_path}")
    assert "config.extend" in text
    (tmp_path / "config.json").write_text(configs.to_json(resolved(configs.load(
        IRIS.removeprefix("--config=")
    ))))  # fmt: skip
    text = refused("--mode=drill", f"--workdir={tmp_path}", "--config.seed=1")
    assert "--config: missing" in text


@pytest.fixture
def finished(tmp_path):
    """Returns a drill with two finished runs that are the same."""
    options = drill.Options(config="", workdir=None)
    done = drill.Drill(resolved(configs.load(IRIS[9:])), options, tmp_path)
    result = {"params_sha256": "a", "state_sha256": "b", "final": {"x": 1.0}}
    for folder in (done.alone, done.killed):
        for step in (0, 4):
            meta = folder / "checkpoints" / str(step) / "meta"
            meta.mkdir(parents=True)
            (meta / "metadata").write_text('{"leaves": {"params/a": "1"}}')
        (folder / "result.json").write_text(json.dumps(result))
        log(folder, 0, 4)
    return done


def outcome(**changed):
    given = {"event": event("save"), "step": 4, "ends": "0: 1, 1: SIGKILL"}
    return drill.Outcome(**{**given, "is_same": True, **changed})


def test_the_verdict_needs_equal_results_bits_and_ends(finished):
    assert finished.report([outcome(), outcome(is_same=None)], [0.1])["is_same"]
    assert not finished.report([outcome(is_same=False)], [])["is_same"]
    assert not finished.report([outcome(ends="0: hangs, 1: 75")], [])["is_same"]
    (finished.killed / "result.json").write_text('{"params_sha256": "other"}')
    assert not finished.report([outcome()], [])["is_same"]


def test_other_metrics_are_another_run(finished):
    log(finished.killed, 0, 3, 4)
    found = finished.report([outcome()], [])
    assert not found["is_same"] and found["comparison"]["first"]["step"] == 4


def run_drill(workdir, config):
    status = main.run(["--mode=drill", f"--config={config}", f"--workdir={workdir}"])
    return status, json.loads((workdir / "drill" / "drill.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_save_is_the_same(tmp_path, monkeypatch, capfd):
    def planned(ends, names):
        return [e for e in everything(ends, names) if e.kind == "save"]

    everything = drill.planned
    monkeypatch.setattr(drill, "planned", planned)
    status, report = run_drill(tmp_path, ROOT / "configs" / "iris_mlp.py")
    assert status == 0, report
    text = capfd.readouterr().out
    assert "SIGKILL of process 0, a save" in text and "verdict: same bits" in text
    (save,) = report["events"]
    assert save["ends"].startswith("0: SIGKILL") and 0 <= save["resumed"] < STEPS
    assert report["save_s"] > 0 and report["checkpoint_bytes"] > 0
    assert not (tmp_path / "drill" / "killed" / "checkpoints").exists()


THREE_PHASES = """
from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config

HEAD = (("head/.*", 1.0), (".*", 0.0))


def get_config(arg=""):
    config = configs.default()
    config.data.update(
        validation="validation", test="test", image_size=8, augment=(("flip",),)
    )
    config.model.name = "cnn"
    config.model.convolutions, config.model.dense = (4, 4), (8,)
    config.plan = as_config((
        Phase(name="head", epochs=2, rules=HEAD, accumulate_steps=2),
        Phase(name="all", epochs=3, optimizer="adam"),
        Phase(name="sgd", steps=5, optimizer="sgd", optimizer_state="reset"),
    ))
    config.evaluate.update(best="validation/loss", ema_decay=0.9)
    return config
"""


@pytest.mark.exhaustive
def test_every_event_of_three_phases_leaves_the_same_bits(tmp_path):
    file = tmp_path / "three.py"
    file.write_text(THREE_PHASES)
    status, report = run_drill(pathlib.Path(tmp_path / "run"), file)
    assert status == 0, report
    assert len(report["events"]) == 8
    assert all(found["step"] is not None for found in report["events"])
