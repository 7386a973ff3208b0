"""A run that goes on from a finished one is the longer run, or is refused."""

import dataclasses
import json
import shutil

import pytest
import small
from command_line import refused

from finetune_jax import main as program
from finetune_jax.config import flat
from finetune_jax.core.errors import UserError
from finetune_jax.plans.phase import Phase
from finetune_jax.report.workdir import read_manifest
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run

FIELDS: dict = dict(optimizer="adam", schedule="constant", peak_lr=1e-2)
HEAD = Phase(name="head", steps=2, rules=small.HEAD, **FIELDS)
ALL = Phase(name="all", epochs=1, optimizer_state="carry", **FIELDS)
LONGER = Phase(name="all", epochs=2, optimizer_state="carry", **FIELDS)
LAST = Phase(name="last", steps=2, rules=small.HEAD, **FIELDS)
VALUES = {
    "data.train": "train[:96]",
    "data.validation": "validation[:32]",
    "data.test": "None",
    "evaluate.best": "validation/loss",
    "evaluate.every_steps": "1",
    "evaluate.ema_decay": "0.9",
    "report.every_steps": "1",
}


def config(*phases, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    pairs = tuple({**VALUES, **overrides}.items())
    return small.config(model="mlp", hidden=(16,), plan=phases, overrides=pairs)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("parent") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_jax.training.run.write_report", lambda *_: None)
        run(config(HEAD, ALL), workdir)
    return workdir


def extended(parent, *phases, **overrides):
    return config(*phases, extend=str(parent), **overrides)


@pytest.mark.slow
def test_more_epochs_and_a_phase_have_the_bits_of_the_longer_run(
    parent, tmp_path, no_pictures
):
    straight = run(config(HEAD, LONGER, LAST), tmp_path / "straight")
    wanted, workdir = extended(parent, HEAD, LONGER, LAST), tmp_path / "extended"
    # Stopped after an update, it does not need the finished run any more.
    with pytest.raises(Preempted):
        run(wanted, workdir, small.stop_at_once())
    moved = parent.with_name("moved")
    parent.rename(moved)
    try:
        result = run(wanted, workdir)
    finally:
        moved.rename(parent)
    assert small.same_result(result, straight)
    lines = small.lines(tmp_path / "straight")
    then = small.lines(parent)[-1]["step"]
    assert small.lines(workdir) == [line for line in lines if line["step"] >= then]
    [entry] = read_manifest(workdir)["lineage"]
    before = json.loads((parent / "result.json").read_text())
    assert entry["workdir"] == str(parent) and entry["step"] == before["steps"] == then
    assert entry["state_sha256"] == before["state_sha256"]
    assert any("plan[1].epochs: 2.0 here, 1.0 there" in x for x in entry["differences"])


@pytest.mark.slow
def test_it_may_go_on_from_the_best_checkpoint_and_be_extended_again(
    parent, tmp_path, no_pictures
):
    best = extended(parent, HEAD, LONGER, extend_from="best", evaluate__best="None")
    run(best, tmp_path / "best")
    before = json.loads((parent / "result.json").read_text())
    lineage = read_manifest(tmp_path / "best")["lineage"]
    assert lineage[0]["step"] == before["best_step"]
    again = extended(tmp_path / "best", HEAD, LONGER, LAST, evaluate__best="None")
    assert run(again, tmp_path / "again")["steps"] == 10
    places = [
        entry["workdir"] for entry in read_manifest(tmp_path / "again")["lineage"]
    ]
    assert places == [str(tmp_path / "best"), str(parent)]


FASTER = dataclasses.replace(LONGER, peak_lr=1.0)


@pytest.mark.parametrize(
    ("phases", "overrides", "message"),
    [
        ((HEAD, ALL), {}, r"config.plan\[1\]: 3 updates, but 3 are made"),
        ((HEAD,), {}, r"config.plan\[1\]: missing; 'all' was trained there"),
        ((HEAD, FASTER), {}, r"config.plan\[1\].peak_lr: 1.0, but 0.01 in the run"),
        ((LAST, LONGER), {}, r"config.plan\[0\].name: 'last', but 'head'"),
        (
            (HEAD, LONGER),
            {"model__hidden": "(8,)"},
            r"model \(8,\), checkpoint \(16,\)",
        ),
    ],
)
def test_another_plan_or_model_is_refused(
    phases, overrides, message, parent, tmp_path, no_pictures
):
    with pytest.raises(UserError, match=message):
        run(extended(parent, *phases, **overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_is_gone_or_not_finished_is_refused(parent, tmp_path, no_pictures):
    with pytest.raises(UserError, match=r"config.extend: no run in .*gone"):
        run(extended(tmp_path / "gone", HEAD, LONGER), tmp_path / "run")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(parent, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(UserError, match="is not finished; resume it first: "):
        run(extended(unfinished, HEAD, LONGER), tmp_path / "run")
    shutil.copytree(parent, tmp_path / "slim")
    last = json.loads((parent / "result.json").read_text())["steps"]
    shutil.rmtree(tmp_path / "slim" / "checkpoints" / str(last))
    with pytest.raises(UserError, match="config.extend_from: 'final'"):
        run(extended(tmp_path / "slim", HEAD, LONGER), tmp_path / "run")


@pytest.mark.slow
def test_the_flag_goes_on_and_the_run_can_be_reproduced(parent, tmp_path, no_pictures):
    assert "no run in" in refused(f"--extend={tmp_path}")
    assert "--mode=train" in refused(
        f"--extend={parent}", "--mode=evaluate", f"--workdir={parent}"
    )
    workdir = f"--workdir={tmp_path / 'run'}"
    assert (
        program.run([f"--extend={parent}", workdir, "--config.plan[1].epochs=2"]) == 0
    )
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert flat(found)["extend"] == str(parent)
    assert program.run(["--mode=reproduce", workdir]) == 0
    verdict = json.loads((tmp_path / "run/reproduce/verdict.json").read_text())
    assert verdict["verdict"] == "same bits"
