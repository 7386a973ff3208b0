"""A run is measured again: data that have changed since are told."""

import json

import numpy as np
import pytest
import small
from other_domains import config

from finetune_jax import main
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run

pytestmark = pytest.mark.usefixtures("no_pictures")


def write(path, seed, classes=("red", "green")):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(path, x=x, y=np.arange(40) % 2, class_names=list(classes))


@pytest.mark.slow
def test_changed_data_are_told_when_a_finished_run_is_evaluated(tmp_path, capsys):
    own, other, workdir = tmp_path / "own.npz", tmp_path / "b.npz", tmp_path / "run"
    write(own, 0)
    write(other, 1)
    also = ({"label": "b", "name": "arrays", "dir": str(other)},)
    plan = (Phase(name="all", steps=1, peak_lr=1e-2),)
    run(config(also, plan=plan, data__name="arrays", data__dir=str(own)), workdir)

    def evaluated():
        capsys.readouterr()
        assert main.run(["--mode=evaluate", f"--workdir={workdir}"]) == 0
        said = capsys.readouterr().out
        lines = [x for x in said.splitlines() if x.startswith("warning: ")]
        found = json.loads((workdir / "evaluation.json").read_text())
        assert [f"warning: {x}" for x in found.get("warnings", ())] == lines
        return lines

    assert not evaluated()
    write(own, 2)
    (line,) = evaluated()
    assert "config.data: the data are not those of the run" in line
    assert "splits may mix training and test examples" in line
    write(own, 0)
    write(other, 3, ("0", "1"))
    changed, pairs = evaluated()
    assert "config.evaluate.also, b: the data are not those of the run" in changed
    assert "'0' is 'red'" in pairs
    write(other, 1)
    write(own, 0, ("green", "red"))
    (line,) = evaluated()
    assert (
        "the classes are in another order than when the run began, green, red" in line
    )


def test_a_split_is_measured_under_its_own_name(tmp_path, capsys):
    workdir = tmp_path / "run"
    plan = (Phase(name="all", steps=1, peak_lr=1e-2),)
    run(small.config(model="mlp", plan=plan, hidden=(4,)), workdir)
    flags = "--config.data.test=train", "--config.data.validation=validation[:50%]"
    assert main.run(["--mode=evaluate", f"--workdir={workdir}", *flags]) == 0
    said = capsys.readouterr().out
    assert "data.train and data.test share 1078 examples" in said
    assert "validation is config.data.validation='validation[:50%]'" in said
    found = json.loads((workdir / "evaluation.json").read_text())
    assert "train/accuracy" in found and "test/accuracy" not in found
    assert found["splits"] == {"validation": "validation[:50%]"}
