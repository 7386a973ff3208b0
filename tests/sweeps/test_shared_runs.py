"""Runs with several names, sources, adopted runs, and workers that meet them."""

import json
import pathlib
import shutil
import threading

import pytest

from finetune_jax import sweep as program
from finetune_jax import sweeps
from finetune_jax.core.files import bytes_below
from finetune_jax.report.workdir import locked
from finetune_jax.sweeps.claims import Claims
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.schedule import Outcome, Schedule
from finetune_jax.sweeps.table import table_of
from finetune_jax.sweeps.worker import Worker, environment_of
from finetune_jax.training.preemption import Stop

IRIS = "configs/iris_mlp.py"
FILE = """
from finetune_jax import sweeps
from finetune_jax.config import load

def get_sweep(arg=""):
    base = load("configs/iris_mlp.py")
    base.plan[0].epochs, base.plan[0].steps = None, 4
    base.evaluate.every_epochs = None
    base.parallel.devices = 1
    SGD = {"plan[0].optimizer": "sgd"}
    return sweeps.Sweep(base=base, metric="test/accuracy", threads=1, pages=False,
        claim_timeout_s=4.0, **{"seeds": 1, **dict(ARGUMENTS)})
"""
FROM_SGD = "{'pre': SGD, 'b': {'init.pretrained': 'sweep:src'}}"
SOURCE = "{'src': sweeps.Source(overrides=SGD)}"


class Place:
    """A sweep file and its folder."""

    def __init__(self, folder, arguments):
        self.root = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.file = folder.parent / f"{folder.name}.py"
        self.file.write_text(FILE.replace("ARGUMENTS", arguments))

    def act(self, verb, *more):
        return program.run([f"--sweep={self.file}", f"--dir={self.root}", verb, *more])

    def opened(self):
        sweep, _ = program.load(str(self.file))
        found = SweepFolder(self.root, sweep)
        return found, Schedule(sweep).wanted(found.outcome)

    def worker(self):
        folder, wanted = self.opened()
        folder.make()
        environment = environment_of(wanted.members[0].config)
        return Worker(
            name="x", folder=folder, schedule=Schedule(folder.sweep), stop=Stop(),
            environment=environment, prepare=lambda config: None,
            claims=Claims(folder.claims, timeout_s=4.0),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("NPROC", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "arms"),
    [
        (
            "arms={'tuned': sweeps.Arm(tune={'plan[0].peak_lr': (1e-3, 0.1)}), "
            "'fixed': {'plan[0].peak_lr': 0.1}, "
            "'again': sweeps.Arm(tune={'plan[0].peak_lr': (0.1, 1e-4)})}, seeds=2",
            ("tuned", "fixed", "again"),
        ),
        (f"arms={FROM_SGD}, sources={SOURCE}, keep='none'", ("pre", "b")),
    ],
    ids=["tuned", "source"],
)
def test_a_run_of_several_arms_counts_for_each_of_them(tmp_path, arguments, arms):
    place = Place(tmp_path / "run", arguments)
    assert place.act("run") == 0
    folder, wanted = place.opened()
    table = table_of(folder, wanted)
    seeds = len(folder.sweep.all_seeds)
    assert {r.arm: (len(r.runs), r.missing) for r in table.rows} == dict.fromkeys(
        arms, (seeds, 0)
    )
    links = [tmp_path / "run" / "by_arm" / arm / "seed0" for arm in arms]
    assert all((link / "result.json").is_file() for link in links)
    index = json.loads((tmp_path / "run" / "sweep.json").read_text())["members"]
    named = {one["arm"] for first in index.values() for one in (first, *first["also"])}
    assert set(arms) <= named


def test_a_removed_arm_is_told_and_its_links_go(tmp_path, capsys):
    arms = "arms={'one': {}, 'sgd': SGD}"
    assert Place(tmp_path / "run", arms).act("run") == 0
    assert (tmp_path / "run" / "by_arm" / "sgd" / "seed0").is_symlink()
    capsys.readouterr()
    fewer = Place(tmp_path / "run", "arms={'one': {}}")
    assert fewer.act("run") == 0
    assert "1 finished run in the folder" in capsys.readouterr().out
    assert not (tmp_path / "run" / "by_arm" / "sgd" / "seed0").is_symlink()


def test_other_weights_at_one_address_are_told(tmp_path, capsys):
    place = Place(tmp_path / "run", f"arms={FROM_SGD}, sources={SOURCE}, seeds=2")
    assert place.act("run") == 0
    _, wanted = place.opened()
    key = next(m.key for m in wanted.members if m.arm == "b")
    path = tmp_path / "run" / key / "manifest.json"
    manifest = json.loads(path.read_text())
    weights = dict.fromkeys(manifest["weights_sha256"], "other")
    path.write_text(json.dumps(manifest | {"weights_sha256": weights}))
    capsys.readouterr()
    assert place.act("status") == 0
    said = capsys.readouterr().out
    assert "b, seed 0; b, seed 1 name the same weights" in said
    assert place.act("retry", "--changed") == 0
    assert place.act("run") == 0
    capsys.readouterr()
    assert place.act("status") == 0
    assert "name the same" not in capsys.readouterr().out


@pytest.mark.slow
def test_runs_elsewhere_are_taken_only_if_they_can_be_used(tmp_path, capsys):
    arguments = f"arms={FROM_SGD}, sources={SOURCE}"
    first = Place(tmp_path / "first", "arms={'one': SGD}, keep='none'")
    assert first.act("run") == 0
    second = Place(tmp_path / "second", arguments)
    assert second.act("run") == 0
    assert "has no checkpoints; runs again" in capsys.readouterr().out
    # Members that start from a source that was found, too.
    shutil.rmtree(tmp_path / "first")
    third = Place(tmp_path / "third", arguments)
    assert third.act("run") == 0
    assert capsys.readouterr().out.count("finished in") == 2
    # Their own source is another run: what started from it is not taken.
    shutil.rmtree(tmp_path / "second")
    assert third.act("run") == 0
    said = capsys.readouterr().out
    assert said.count("is gone") == 2
    folder, wanted = third.opened()
    assert all(folder.outcome(m.key).state == "complete" for m in wanted.members)


def test_a_run_that_finishes_meanwhile_keeps_its_states(tmp_path):
    place = Place(tmp_path / "run", "arms={'a': {}, 'b': SGD}, keep='best'")
    worker = place.worker()
    folder = worker.folder
    keys = [m.key for m in place.opened()[1].members]
    for key, loss in zip(keys, (1.0, 0.5)):
        (folder.workdir(key) / "checkpoints").mkdir(parents=True)
        best = {"validation/accuracy": 1 - loss, "validation/loss": loss}
        text = json.dumps({"best": best})
        if key == keys[0]:
            (folder.workdir(key) / "result.json").write_text(text)
        else:
            late = text
    seen = folder.drop_states

    def dropped(others):
        # The other worker's run ends between the scan and the removal.
        (folder.workdir(keys[1]) / "result.json").write_text(late)
        seen(others)

    folder.drop_states = dropped
    worker._drop_states()
    assert (folder.workdir(keys[1]) / "checkpoints").is_dir()


def test_workers_wait_for_a_source_that_runs_elsewhere(tmp_path, monkeypatch):
    place = Place(
        tmp_path / "run",
        "arms={'b': {'init.pretrained': 'sweep:src'}}, "
        "sources={'src': sweeps.Source(overrides=SGD)}",
    )
    worker = place.worker()
    (source,) = worker._wanted().sources
    assert worker.claims.take(source, lambda: False)
    now = [1e6]
    monkeypatch.setattr("finetune_jax.sweeps.worker.time.monotonic", lambda: now[0])
    worker._idle_since = 1.0
    assert worker._choose(None) == ("wait", "")


@pytest.mark.slow
def test_a_workdir_in_use_stops_no_other_member(tmp_path, capsys):
    place = Place(tmp_path / "run", "arms={'a': {}, 'b': SGD}")
    folder, wanted = place.opened()
    folder.make()
    workdir = folder.workdir(wanted.members[0].key)
    workdir.mkdir()
    with locked(workdir):
        assert place.act("run") == 0
    said = capsys.readouterr().out
    assert 1 <= said.count("run first") <= 3 and "[1/2] b, seed 0" in said
    assert "run elsewhere" in said
    assert len(list((folder.root / "logs").iterdir())) <= 4


def test_the_number_of_runs_is_known_before_tuning_ends():
    tune = {"plan[0].peak_lr": (0.01, 0.1)}
    cases = {"all": {}, "few": {"data.train": "train[:30]"}}
    sweep = sweeps.Sweep(base=IRIS, cases=cases, tune=tune, tune_case="few", seeds=3)
    schedule, ended = Schedule(sweep), {}
    first = schedule.wanted(ended.get)
    for one in first.members:
        best = {"validation/loss": one.tuned["plan[0].peak_lr"]}
        ended[one.key] = Outcome(state="complete", result={"best": best})
    last = schedule.wanted(ended.get)
    assert len(first.members) == 2 and first.more == 5
    assert len(last.members) == 7 and last.more == 0 and last.is_all


def test_sizes_of_folders_that_change_are_read(tmp_path):
    is_over = threading.Event()

    def change():
        while not is_over.is_set():
            for name in map(str, range(20)):
                pathlib.Path(tmp_path, name, "x").mkdir(parents=True)
                shutil.rmtree(tmp_path / name)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {bytes_below(tmp_path) for _ in range(100)} == {0}
    finally:
        is_over.set()
        thread.join()
