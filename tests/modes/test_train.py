"""`--mode=train`: its default workdir, and what it says when it stops."""

import shlex
import threading

import pytest
from command_line import IRIS, refused

from finetune_jax import main
from finetune_jax.config.schema import Seeds
from finetune_jax.modes import train
from finetune_jax.modes.options import Options
from finetune_jax.report.tables import checkpoint_line, result_lines
from finetune_jax.report.workdir import new_workdir
from finetune_jax.training.loop import Preempted


def test_default_workdirs_name_config_argument_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = new_workdir("configs/photos.py:folder=/data/my photos", 3).name
    assert name.startswith("photos-folder=-data-my-photos-seed3-2")
    divided = new_workdir("photos.py", Seeds(init=1, order=2, dropout=1)).name
    assert divided.startswith("photos-seed0_1_2-2")


def test_runs_that_start_at_once_have_workdirs_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, start = [], threading.Barrier(8)

    def take():
        start.wait()
        found.append(new_workdir("photos.py", 0))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8 and all(path.is_dir() for path in found)


def test_a_refused_run_leaves_no_default_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(main.UserError):
        main.run([f"{IRIS}:tiny", "--config.data.test=nope"])
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_stopped_run_prints_the_command_that_continues(tmp_path, monkeypatch, capsys):
    def stopped(config, workdir, stop):
        (workdir / "checkpoints").mkdir()
        raise Preempted("stopped and saved at step 12")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run", stopped)
    given = [f"{IRIS}:tiny", "--config.plan[0].peak_lr=0.1"]
    assert main.run(given) == train.EXIT_STATUS
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "stopped and saved at step 12; go on with:"
    words = shlex.split(lines[-1])
    assert words[1:] == [
        "-m", "finetune_jax.main", *given, f"--workdir={lines[0].split()[1]}"
    ]  # fmt: skip


def test_a_given_workdir_is_in_the_command_once(tmp_path):
    given = (IRIS, "--workdir", str(tmp_path))
    options = Options(config="iris.py", workdir=tmp_path, arguments=given)
    assert options.command(tmp_path).endswith(f"main {shlex.join(given)}")
    assert options.advice(tmp_path).startswith("go on with:")
    (tmp_path / "checkpoints" / "120").mkdir(parents=True)
    (tmp_path / "checkpoints" / "85").mkdir()
    assert options.advice(tmp_path).startswith("step 120 is saved; go on with:\n  ")


def test_mistakes_in_different_sections_are_told_together(tmp_path):
    wrong = (
        "--config.model.name=resnet21", "--config.plan[0].optimizer=adma",
        "--config.data.name=foldr",
    )  # fmt: skip
    names = "'resnet32'", "'adam'", "'folder'"
    for mode in ("train", "plan"):
        message = refused(IRIS, *wrong, f"--mode={mode}", f"--workdir={tmp_path}/run")
        assert all(f"did you mean {name}?" in message for name in names)
    # Also beside an unknown key.
    message = refused(IRIS, *wrong, "--config.sede=1", f"--workdir={tmp_path}/run")
    assert all(f"did you mean {name}?" in message for name in (*names, "'seed'"))


def test_an_argument_that_a_config_file_refuses_is_no_crash():
    message = refused(IRIS.replace("iris_mlp", "resnet_head") + ":foo")
    assert "resnet_head.py:foo: no variant 'foo'" in message and "fails" not in message


def test_a_best_checkpoint_without_training_is_warned_of():
    metrics = {"validation/loss": 1.0}
    result = {"final": metrics, "best": metrics, "best_step": 0, "steps": 15}
    assert "untrained model of step 0" in result_lines(result)[-1]
    assert "untrained" not in "".join(result_lines({**result, "best_step": 15}))
    assert "the untrained model" in checkpoint_line(0)
    assert checkpoint_line(15) == "checkpoint of step 15"
