"""Workers of a sweep: real runs of iris, a second or less each."""

import errno
import json
import pathlib
import shutil
import threading
import time

import pytest

from finetune_jax import config as configs
from finetune_jax import sweep as program
from finetune_jax.core.errors import TrainingError, UserError
from finetune_jax.sweeps.claims import Claims
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import member_key
from finetune_jax.sweeps.schedule import Schedule
from finetune_jax.training.run import run

FILE = """
from finetune_jax import sweeps
from finetune_jax.config import load

def get_sweep(arg=""):
    base = load("configs/iris_mlp.py")
    base.plan[0].epochs, base.plan[0].steps = None, 12
    base.evaluate.every_epochs = None
    base.parallel.devices = 1
    return sweeps.Sweep(base=base, {arguments}, threads=1, claim_timeout_s=6.0)
"""
ARMS = "arms={'slow': {'plan[0].peak_lr': 1e-3}, 'fast': {'plan[0].peak_lr': 0.1}}"
DIGESTS = ("params_sha256", "state_sha256", "final", "best", "best_step")


def write(folder, arguments):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "sweep.py").write_text(FILE.replace("{arguments}", arguments))
    return folder / "sweep.py"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # A worker sets it for its process.
    monkeypatch.setenv("NPROC", "1")


def act(folder, verb, *more):
    arguments = [f"--sweep={folder / 'sweep.py'}", f"--dir={folder / 'run'}"]
    return program.run([*arguments, verb, *more])


def opened(folder):
    sweep, _ = program.load(str(folder / "sweep.py"))
    found = SweepFolder(folder / "run", sweep)
    return found, Schedule(sweep).wanted(found.outcome)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a finished sweep of two arms and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    write(folder, f"{ARMS}, seeds=2, metric='test/accuracy'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPROC", "1")
        assert act(folder, "run") == 0
    return folder


def test_a_member_has_the_bits_of_a_run_of_its_own(finished, tmp_path):
    found, wanted = opened(finished)
    assert wanted.is_all and len(wanted.members) == 4
    for one in wanted.members[-2:]:
        result = run(one.config, tmp_path / one.key)
        own = found.outcome(one.key).result
        assert {k: own[k] for k in DIGESTS} == {k: result[k] for k in DIGESTS}
        assert own["sweep"]["arm"] == one.arm
        assert own["sweep"]["seed"] == dict(one.seed)
        assert own["sweep"]["overrides"] == dict(one.overrides)


def test_members_of_one_model_compile_each_program_once(finished):
    found, wanted = opened(finished)
    programs = [found.outcome(m.key).result["programs"] for m in wanted.members]
    assert programs[0]["programs"] >= 2
    assert [p["programs"] for p in programs[1:]] == [0, 0, 0]


def test_a_sweep_that_is_run_again_runs_nothing(finished, capsys):
    index = json.loads((finished / "run" / "sweep.json").read_text())
    table = (finished / "run" / "table.csv").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert act(finished, "run") == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert json.loads((finished / "run" / "sweep.json").read_text()) == index
    assert (finished / "run" / "table.csv").read_bytes() == table
    assert act(finished, "status") == 0
    assert "4 members: 4 complete" in capsys.readouterr().out
    assert set(index["members"]) == {p.parent.name for p in stamps}


def test_links_name_the_members(finished):
    place = finished / "run" / "by_arm" / "fast" / "seed1"
    result = json.loads((place / "result.json").read_text())
    assert (result["sweep"]["arm"], result["sweep"]["seed"]["init"]) == ("fast", 1)


def test_an_added_arm_runs_alone_and_others_are_found(finished, tmp_path, capsys):
    more = ARMS[:-1] + ", 'more': {'plan[0].peak_lr': 0.5}}"
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    write(tmp_path, f"{more}, seeds=2, metric='test/accuracy'")
    assert act(tmp_path, "run") == 0
    said = capsys.readouterr().out
    assert said.count("more, seed") == 2 and "slow, seed" not in said
    # Another sweep beside it finds what has run.
    write(tmp_path / "other", f"{ARMS}, seeds=2, metric='test/loss'")
    arguments = [
        f"--sweep={tmp_path / 'other' / 'sweep.py'}",
        f"--dir={tmp_path / 'two'}",
    ]
    assert program.run([*arguments, "run"]) == 0
    assert capsys.readouterr().out.count("finished in") == 4


def test_members_of_other_code_are_told_and_run_again(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    write(tmp_path, f"{ARMS}, seeds=2, metric='test/accuracy'")
    _, wanted = opened(tmp_path)
    path = tmp_path / "run" / wanted.members[0].key / "manifest.json"
    manifest = json.loads(path.read_text()) | {"code_sha256": "other"}
    path.write_text(json.dumps(manifest))
    assert act(tmp_path, "status") == 0
    assert "1 finished members ran with other code" in capsys.readouterr().out
    assert act(tmp_path, "retry", "--changed") == 0
    assert act(tmp_path, "run") == 0
    said = capsys.readouterr().out
    assert said.count("slow, seed 0:") == 1 and said.count("seed 1:") == 0
    assert act(tmp_path, "status") == 0
    assert "other code" not in capsys.readouterr().out


def test_other_data_is_told(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    write(tmp_path, f"{ARMS}, seeds=2, metric='test/accuracy'")
    _, wanted = opened(tmp_path)
    path = tmp_path / "run" / wanted.members[0].key / "manifest.json"
    manifest = json.loads(path.read_text()) | {"data_fingerprint": "other"}
    path.write_text(json.dumps(manifest))
    assert act(tmp_path, "status") == 0
    assert "name the same config.data" in capsys.readouterr().out
    assert act(tmp_path, "retry", "--changed") == 0
    assert "2 finished with other code or data; start `run`" in capsys.readouterr().out


def test_a_member_that_fails_stops_no_other(tmp_path, capsys):
    sgd = "'plan[0].optimizer': 'sgd'"
    arms = f"arms={{'one': {{{sgd}}}, 'nan': {{{sgd}, 'plan[0].peak_lr': 1e30}}, "
    arms += f"'fine': {{{sgd}, 'plan[0].peak_lr': 0.5}}}}"
    write(tmp_path, f"{arms}, seeds=1, metric='test/accuracy'")
    assert act(tmp_path, "run") == 1
    said = capsys.readouterr().out
    assert "nan, seed 0 failed: Not finite" in said and "fine, seed 0: test/acc" in said
    found, wanted = opened(tmp_path)
    _, nan, fine = (member.key for member in wanted.members)
    (failure,) = found.failures(nan)
    # The run after it compiles nothing.
    assert found.outcome(fine).result["programs"]["programs"] == 0
    assert "Traceback" in pathlib.Path(failure.log).read_text() and failure.log in said
    assert act(tmp_path, "run") == 1  # It is not tried again by itself.
    assert len(found.failures(nan)) == 1
    assert act(tmp_path, "retry") == 0
    assert "run again: 1 failed; start `run`" in capsys.readouterr().out
    assert not found.failures(nan)


def test_a_member_is_tried_again_after_an_error_of_the_machine(
    tmp_path, monkeypatch, capsys
):
    from finetune_jax.sweeps import worker

    write(tmp_path, "seeds=1, metric='test/accuracy', attempts=3")
    errors = [RuntimeError("out of memory"), RuntimeError("once more")]

    def sometimes(*arguments):
        if errors:
            raise errors.pop()
        return run(*arguments)

    monkeypatch.setattr(worker, "run", sometimes)
    assert act(tmp_path, "run") == 0
    said = capsys.readouterr().out
    assert "RuntimeError: once more" in said and "2 more attempts" in said
    assert "[1/1] base, seed 0: test/accuracy" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        TrainingError("checkpoint 3 cannot be saved in x: the disk is full; make room, "
                      "and run again with the same --workdir, from the last checkpoint"),
    ],
    ids=("file", "checkpoint"),
)  # fmt: skip
def test_a_full_disk_ends_the_worker_and_is_no_failure(tmp_path, monkeypatch, error):
    from finetune_jax.sweeps import worker

    write(tmp_path, "seeds=1, metric='test/accuracy'")

    def full(*arguments):
        raise error

    monkeypatch.setattr(worker, "run", full)
    with pytest.raises(type(error)):
        act(tmp_path, "run")
    found, wanted = opened(tmp_path)
    key = wanted.members[0].key
    assert not found.failures(key)
    assert Claims(found.claims, timeout_s=6.0).state(key) == "released"


def test_a_claimed_member_is_left_to_its_worker(tmp_path, capsys):
    write(tmp_path, "seeds=2, metric='test/accuracy'")
    found, wanted = opened(tmp_path)
    found.make()
    other = Claims(found.claims, timeout_s=6.0)
    key = wanted.members[0].key
    claim = other.take(key, lambda: False)
    thread = threading.Thread(
        target=lambda: (time.sleep(8), claim.release(is_done=False))
    )
    thread.start()
    assert act(tmp_path, "run") == 0
    thread.join()
    said = capsys.readouterr().out
    assert "[1/2] base, seed 1" in said
    assert "[2/2] base, seed 0" in said or "run elsewhere" in said


def test_only_the_best_keeps_its_states(tmp_path):
    write(
        tmp_path,
        f"{ARMS}, seeds=2, metric='test/accuracy', keep='best', pages=False, "
        "tune_by='validation/loss'",
    )
    assert act(tmp_path, "run") == 0
    found, wanted = opened(tmp_path)
    losses = {
        m.key: found.outcome(m.key).result["best"]["validation/loss"]
        for m in wanted.members
    }
    kept = [key for key in losses if (found.workdir(key) / "checkpoints").is_dir()]
    assert kept == [min(losses, key=lambda key: losses[key])]
    assert not list(found.root.glob("*/report/index.html"))


def test_the_index_chooses_a_member(tmp_path):
    write(tmp_path, f"{ARMS}, seeds=1, metric='test/accuracy'")
    assert act(tmp_path, "run", "--index=1") == 0
    found, wanted = opened(tmp_path)
    assert [found.outcome(m.key) is not None for m in wanted.members] == [False, True]
    with pytest.raises(UserError, match="--index: 2, but 2 members are known"):
        act(tmp_path, "run", "--index=2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("metric='test/acuracy'", "no run has 'test/acuracy'; did you mean"),
        ("tune={'plan[0].peak_lr': (1.0,)}, tune_by='validation/x'",
         "tune_by: no run has 'validation/x'"),
        ("arms={'a': {'model.name': 'reznet20'}}", "config.model.name"),
        ("arms={'a': {'data.validation': None}, 'b': {'data.test': None}}", "(b, seed 0)"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(tmp_path, arguments, words):
    write(tmp_path, arguments)
    with pytest.raises(UserError) as caught:
        act(tmp_path, "run")
    assert words in str(caught.value)
    assert not list(tmp_path.glob("run/*/manifest.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["walk"], "VERB"),
        (["run"], "--sweep: missing"),
        (["--sweep=x.py", "run", "a"], "only `compare` takes workdirs"),
        (["--sweep=x.py", "run", "--jobs=0"], "--jobs: 0"),
        (["--sweep=x.py", "run", "--launcher=slum"], "did you mean 'slurm'"),
        (["--sweep=x.py", "run"], "no file 'x.py'"),
        (["run", "--joobs=1"], "--joobs"),
        (["compare", "one"], "at least two runs"),
    ],
)
def test_mistakes_of_the_command_line_are_told(arguments, words):
    with pytest.raises(UserError) as caught:
        program.run(arguments)
    assert words in str(caught.value)


def test_another_number_of_threads_is_refused(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    write(tmp_path, f"{ARMS}, seeds=2, metric='test/accuracy'")
    text = (tmp_path / "sweep.py").read_text().replace("threads=1", "threads=2")
    (tmp_path / "sweep.py").write_text(text)
    with pytest.raises(UserError, match="Sweep.threads: 2, but the sweep .* with 1"):
        act(tmp_path, "run")


def test_the_config_of_a_workdir_has_the_key_of_its_folder(finished):
    _, wanted = opened(finished)
    one = wanted.members[0]
    text = (finished / "run" / one.key / "config.json").read_text()
    assert member_key(configs.from_json(text, "config.json")) == one.key
