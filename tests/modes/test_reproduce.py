"""`--mode=reproduce`: a rerun is told from the same bits, and from where it differs."""

import json
import shutil

import pytest
from command_line import IRIS, refused

from finetune_jax import main as program
from finetune_jax.modes.reproduce import causes, verdict

LINES = [
    {"step": 0, "phase": "all", "test/loss": 1.5, "time/step_s": 0.1},
    {"step": 1, "phase": "all", "train/loss": 1.25, "train/accuracy": None},
]
RESULT = {"params_sha256": "a", "state_sha256": "b", "frozen_sha256": {"all": "c"}}


def changed(line, **values):
    return [row | (values if i == line else {}) for i, row in enumerate(LINES)]


def test_seconds_do_not_count():
    found = verdict(LINES, changed(0, **{"time/step_s": 9.0}), RESULT, RESULT)
    assert found["verdict"] == "same bits"


@pytest.mark.parametrize(
    ("others", "wanted", "first"),
    [
        (changed(1, **{"train/loss": 1.2501}), "same within the tolerance",
         (1, "train/loss")),
        (changed(1, **{"train/loss": 1.3}), "different", (1, "train/loss")),
        (changed(1, **{"train/accuracy": 1.0}), "different", (1, "train/accuracy")),
        (LINES[:1], "different", (1, "step")),
        ([*LINES, {"step": 2, "phase": "all"}], "different", (2, "step")),
    ],
)  # fmt: skip
def test_it_says_from_where_lines_differ(others, wanted, first):
    found = verdict(LINES, others, RESULT, {**RESULT, "params_sha256": "x"})
    assert found["verdict"] == wanted
    assert (found["first"]["step"], found["first"]["metric"]) == first
    assert found["digests_that_differ"] == ["params_sha256"]


def test_digests_alone_may_differ():
    found = verdict(LINES, LINES, RESULT, {**RESULT, "state_sha256": "x"})
    assert found["verdict"] == "same within the tolerance"


def test_causes_are_what_differs_in_the_environment():
    then = {
        "nproc": "2",
        "packages": {"jax": "1", "flax": "1"},
        "seed": 0,
        "command": 1,
    }
    now = {"nproc": "1", "packages": {"jax": "2", "flax": "1"}, "seed": 1, "command": 2}
    assert causes(then, now) == {
        "nproc": {"then": "2", "now": "1"},
        "packages.jax": {"then": "1", "now": "2"},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [f"{IRIS}:tiny", f"--workdir={workdir}", "--config.parallel.devices=1"]
    assert program.run(arguments) == 0
    return workdir


def reproduced(workdir, *arguments):
    status = program.run(["--mode=reproduce", f"--workdir={workdir}", *arguments])
    newest = max(
        workdir.glob("reproduce*/verdict.json"), key=lambda p: p.stat().st_mtime
    )
    return status, json.loads(newest.read_text())


def test_a_rerun_has_the_same_bits(finished):
    before = sorted(path.name for path in finished.iterdir())
    status, found = reproduced(finished)
    assert (status, found["verdict"], found["environment"]) == (0, "same bits", {})
    after = sorted(path.name for path in finished.iterdir())
    assert after == sorted([*before, "reproduce"])


@pytest.mark.slow
def test_another_seed_differs_from_the_first_line_on(finished):
    status, found = reproduced(finished, "--config.seed=1")
    assert (status, found["verdict"], found["first"]["step"]) == (3, "different", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(seed=1),
        lambda manifest: manifest["config"]["plan"][0].update(peak_lr=0.2),
    ],
)
def test_an_altered_manifest_is_found_out(finished, tmp_path, change):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("reproduce*"))
    manifest = json.loads((workdir / "manifest.json").read_text())
    change(manifest)
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    status, found = reproduced(workdir)
    assert (status, found["verdict"]) == (3, "different")


def test_what_is_not_finished_cannot_be_reproduced(finished, tmp_path):
    assert "holds no run" in refused("--mode=reproduce", f"--workdir={tmp_path}")
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("reproduce*"))
    (workdir / "result.json").unlink()
    assert "is not finished" in refused("--mode=reproduce", f"--workdir={workdir}")
    (workdir / "manifest.json").write_text("{}")
    assert "no config" in refused("--mode=reproduce", f"--workdir={workdir}")
