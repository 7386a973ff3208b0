"""The command line of sweeps refuses, previews and tells before anything runs."""

import os
import pathlib
import subprocess
import sys

import pytest
from sweep_runs import environment_of_users

from finetune_jax import sweep as program
from finetune_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
FILE = """
from finetune_jax import sweeps

def get_sweep(arg=""):
    keys = {{"plan[0].epochs": None, "plan[0].steps": 4, "parallel.devices": {devices!r}}}
    return sweeps.Sweep(base={base!r}, arms={{"a": keys}}, seeds=2, {more})
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("NPROC", "1")
    write("s.py")


def write(path, more="", devices=1):
    base = str(ROOT / "configs" / "iris_mlp.py")
    file = pathlib.Path(path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(FILE.format(base=base, more=more, devices=devices))


def act(*arguments, sweep="s.py"):
    return program.run([f"--sweep={sweep}", *arguments])


def message(*arguments, sweep="s.py"):
    with pytest.raises(UserError) as caught:
        act(*arguments, sweep=sweep)
    return str(caught.value)


RUNS = (
    ("run",),
    ("run", "--dry-run"),
    ("run", "--jobs=2"),
    ("run", "--launcher=slurm", "--jobs=2"),
    ("run", "--launcher=slurm", "--dry-run"),
    ("run", "--launcher=command", "--dry-run"),
)


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
@pytest.mark.parametrize("visible", ["", "0,1"])
def test_problems_of_every_stage_are_told_before_a_folder_is_made(
    arguments, visible, monkeypatch
):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    more = "keep='some', metric='test/acuracy', cases={'': {}, 'x': {'data.dri': 1}, "
    more += "'y': {'model.name': 'mpl'}}, slurm={'array': '1'}, "
    write("s.py", more + "command='{wrker}'")
    text = message(*arguments)
    for words in (
        "Sweep.keep: 'some'",
        "config.data.dri: ",
        "no run has 'test/acuracy'",
    ):
        assert words in text
    assert ("slurm['array']" in text) == ("slurm" in str(arguments))
    assert ("unknown field {wrker}" in text) == ("command" in str(arguments))
    assert not pathlib.Path("runs").exists()


def test_a_launcher_that_cannot_start_makes_no_folder(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch is missing" in message("run", "--launcher=slurm")
    assert "Sweep.command: missing" in message("run", "--launcher=command")
    assert not pathlib.Path("runs").exists()


def test_data_that_is_not_there_is_told_before_workers_start(capsys):
    write("s.py", "cases={'': {'data.name': 'folder', 'data.dir': 'nowhere'}}")
    text = "config.data.dir: 'nowhere' does not exist on this machine (a, seed 0)"
    assert text in message("run", "--jobs=2")
    assert act("run", "--launcher=slurm", "--dry-run") == 0  # It may exist there.
    told = capsys.readouterr()
    assert f"warning: {text}" in told.err and "warning" not in told.out


def test_workers_with_other_devices_are_checked_for_their_number(tmp_path):
    devices = "'parallel.fsdp': 4, 'parallel.model': 2, 'data.batch_size': 16"
    write("s.py", f"cases={{'': {{{devices}}}}}, processes=2", devices=None)
    arguments = [f"--sweep={tmp_path / 's.py'}", "run", "--dry-run", "--launcher=slurm"]
    done = subprocess.run(
        [sys.executable, "-m", "finetune_jax.sweep", *arguments],
        env=environment_of_users(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --ntasks=2" in done.stdout


def test_a_folder_without_runs_has_no_status(tmp_path):
    for verb in ("status", "report", "retry"):
        text = message(verb)
        assert text.startswith("--sweep: ") and "has no runs of a sweep yet" in text
    (tmp_path / "mine").mkdir()
    assert message("report", "--dir=mine").startswith(f"--dir: {tmp_path}/mine has no")
    assert not list((tmp_path / "mine").iterdir())


def test_a_dry_run_previews_members_and_one_member(capsys):
    assert act("run", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 members: 2 waiting" and len(lines) == 2
    assert lines[1].startswith("env NPROC=1 ")
    assert act("run", "--dry-run", "--index=1") == 0
    first, command = capsys.readouterr().out.splitlines()
    assert first.startswith("a, seed 1 (") and first.endswith("): to run")
    assert command.endswith(" --index=1")
    assert "2 members are known" in message("run", "--dry-run", "--index=2")


def test_members_have_numbers_and_hashes_and_others_leave_their_folder(capsys):
    assert act("run", "--index=1") == 0
    capsys.readouterr()
    # The first worker has decided the number of threads.
    os.environ["NPROC"] = "2"
    assert act("run", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 members: 1 complete, 1 waiting"
    assert lines[1].startswith("env NPROC=1 ")
    assert act("status") == 0
    *_, (state, number, key, *_) = map(
        str.split, capsys.readouterr().out.strip().splitlines()
    )
    assert (state, number) == ("waiting", "0")
    assert act("run", "--dry-run", f"--index={key}") == 0
    assert f"a, seed 0 ({key}): to run" in capsys.readouterr().out
    assert act("run", "--index=1") == 0
    assert "already complete" in capsys.readouterr().out
    # Another file, another argument, and the same file at another place.
    write("other/s.py")
    before = pathlib.Path("runs/s/sweep.json").read_text()
    for verb in ("run", "status", "report", "retry"):
        assert "has the runs of another sweep, 's' of" in message(
            verb, sweep="other/s.py"
        )
        assert "another sweep" in message(verb, "--dir=runs/s", sweep="s.py:x")
    assert pathlib.Path("runs/s/sweep.json").read_text() == before
    pathlib.Path("s.py").unlink()
    assert act("status", sweep="other/s.py") == 0
    assert "are of ../../s.py, which is gone" in capsys.readouterr().out
