"""Members side by side have the numbers of their single runs, in fewer calls."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import small

import finetune_jax.parallel.compiling
import finetune_jax.sweeps.populations.population
import finetune_jax.sweeps.populations.vectorised
from finetune_jax.core.backend import traced_for
from finetune_jax.parallel.executor import SHORT_S
from finetune_jax.parallel.pmap import PmapDevices
from finetune_jax.plans.phase import Phase
from finetune_jax.report.workdir import read_json
from finetune_jax.sweeps.populations.population import member_configs, run_population
from finetune_jax.sweeps.populations.vectorised import (
    SharedPace,
    VectorisedExecutor,
    members_at_once,
)
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import Stop
from finetune_jax.training.setup import make_setup
from finetune_jax.training.updates.phase_run import PhaseRun

# They end for three reasons: a plateau, a loss that is not finite, and the plan's end.
MEMBERS = (
    (),
    (("seed", 1),),
    (("plan[0].peak_lr", 1e38),),
    (("plan[0].peak_lr", 40.0),),
    (("plan[0].peak_lr", 1.0), ("seed.order", 2)),
    (("task.label_smoothing", 0.2),),
)
PLAN = (
    Phase(
        name="all", steps=12, optimizer="sgd", peak_lr=0.3, plateau_patience=1,
        plateau_metric="validation/loss", plateau_restore=True,
    ),
)  # fmt: skip


def config(members=MEMBERS, plan=PLAN, overrides=(), **model):
    keys = {
        "evaluate.best": "validation/loss",
        "evaluate.every_steps": 3,
        "evaluate.ema_decay": 0.9,
        "report.every_steps": 1,
        "parallel.steps_per_call": 2,
        "population": members,
    } | dict(overrides)
    return small.config(
        plan=plan,
        overrides=[(key, str(value)) for key, value in keys.items()],
        **(model or {"model": "mlp", "hidden": ()}),
    )


def side_by_side(given, workdir, stop=None):
    with traced_for("gpu"):
        return run_population(given, workdir, stop)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(
        finetune_jax.sweeps.populations.population, "write_report", lambda *_: None
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of compiled programs, by what they are for."""
    counts = collections.Counter()
    compiled = finetune_jax.parallel.compiling.compiled

    def counted(jitted, *arguments, **options):
        program = compiled(jitted, *arguments, **options)

        def call(*given):
            counts["calls"] += 1
            return program.call(*given)

        return dataclasses.replace(program, call=call)

    for module in (
        "sweeps.populations.vectorised",
        "parallel.executor",
        "parallel.mesh",
    ):
        monkeypatch.setattr(f"finetune_jax.{module}.compiled", counted)
    return counts


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    """The same members one after the other, which are the bits of single runs."""
    workdir = tmp_path_factory.mktemp("population") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune_jax.sweeps.populations.population, "write_report", lambda *_: None
        )
        run_population(config(), workdir)
    return workdir


def members(workdir):
    """Returns what members have given: numbers by path, and all else."""
    numbers, rest = {}, {}
    for place in sorted((workdir / "members").iterdir()):
        result = read_json(place / "result.json")
        assert result is not None
        if "failed" in result:
            found = {"failed": result["failed"].split(" at step")[0]}
        else:
            keys = ("final", "best", "best_step", "steps", "optimizer_state")
            found = {key: result[key] for key in keys}
        found = {"result": found, "lines": small.lines(place)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            name = f"{place.name}{jax.tree_util.keystr(path)}"
            (numbers if isinstance(leaf, float) else rest)[name] = leaf
    return numbers, rest


def assert_same(one, other, tolerance=1e-5):
    (numbers, rest), (others, other_rest) = members(one), members(other)
    assert rest == other_rest and numbers.keys() == others.keys()
    for name, value in numbers.items():
        assert value == pytest.approx(others[name], rel=tolerance, abs=tolerance), name


@pytest.mark.slow
@pytest.mark.slow
def test_members_have_the_numbers_of_single_runs_in_fewer_calls(
    in_turn, tmp_path, calls, capsys
):
    result = side_by_side(config(), tmp_path / "run")
    assert_same(tmp_path / "run", in_turn)
    steps = [
        (read_json(in_turn / "members" / f"{n:03d}" / "result.json") or {}).get("steps")
        for n in range(len(MEMBERS))
    ]
    assert steps == [12, 12, None, 6, 12, 12]
    assert "6 members train side by side" in capsys.readouterr().out
    together = calls["calls"]
    calls.clear()
    run_population(config(), tmp_path / "turn")
    assert 3 * together < calls["calls"]
    other = read_json(in_turn / "result.json")
    assert other is not None and result["member"] == other["member"]
    rows = json.loads(json.dumps(result["population"]))
    for row, wanted in zip(rows, other["population"], strict=True):
        assert row["members"] == wanted["members"] and row["failed"] == wanted["failed"]
        assert row["mean"] == pytest.approx(wanted["mean"], rel=1e-5)
    kept = [
        p.name
        for p in (tmp_path / "run").glob("members/*")
        if (p / "checkpoints").exists()
    ]
    assert kept == [f"{result['member']:03d}"]


@pytest.mark.slow
def test_chunks_and_programs_that_do_not_fit_change_no_number(
    in_turn, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetune_jax.sweeps.populations.vectorised, "MOST", 4)
    sizes = []

    def has_room(devices, program):
        sizes.append(None)
        return len(sizes) % 2 == 0

    monkeypatch.setattr(
        finetune_jax.sweeps.populations.vectorised, "has_room", has_room
    )
    side_by_side(config(), tmp_path / "run")
    assert_same(tmp_path / "run", in_turn)
    assert len(sizes) > 2


@pytest.mark.slow
def test_a_killed_population_goes_on_with_what_was_not_finished(
    in_turn, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 10)
        side_by_side(config(), tmp_path / "run")
    place = tmp_path / "run" / "members"
    finished = sorted(p.parent.name for p in place.glob("*/result.json"))
    assert finished == ["002", "003"]
    assert len(list(place.iterdir())) == len(MEMBERS)
    side_by_side(config(), tmp_path / "run")
    said = capsys.readouterr().out
    assert "2 of 6 members are finished" in said
    assert "4 members train side by side" in said
    assert_same(tmp_path / "run", in_turn)


@pytest.mark.slow
def test_one_that_is_asked_to_stop_ends_all_and_they_go_on(
    in_turn, tmp_path, monkeypatch
):
    stop, call = Stop(), PhaseRun.call

    def asks(self, *arguments, **rate):
        if self.step >= 9:
            stop.ask()
        return call(self, *arguments, **rate)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="in member"):
        patch.setattr(PhaseRun, "call", asks)
        side_by_side(config(), tmp_path / "run", stop)
    assert not (tmp_path / "run" / "result.json").exists()
    side_by_side(config(), tmp_path / "run")
    assert_same(tmp_path / "run", in_turn)


def test_an_update_that_fails_ends_the_population(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError("of the device")

    monkeypatch.setattr(finetune_jax.sweeps.populations.vectorised, "compiled", fails)
    with pytest.raises(MemoryError, match="of the device"):
        side_by_side(config(), tmp_path / "run")


@pytest.mark.slow
def test_what_is_the_same_for_all_is_not_stacked(tmp_path, monkeypatch):
    kernels, compiled = [], finetune_jax.sweeps.populations.vectorised.compiled

    def watched(many, shared, own, *rest):
        shapes = [[np.shape(leaf) for leaf in leaves] for leaves in (shared, own[0])]
        kernels.append([[s for s in found if len(s) == 4] for found in shapes])
        return compiled(many, shared, own, *rest)

    monkeypatch.setattr(finetune_jax.sweeps.populations.vectorised, "compiled", watched)
    plan = (Phase(name="head", steps=4, rules=small.HEAD, batch_stats="hold"),)
    given = config(
        (*MEMBERS[:1], *MEMBERS[3:5]),
        plan,
        {"data.cache": "off", "evaluate.every_steps": 2},
        model="cnn", convolutions=(4, 4), dense=(8,),
    )  # fmt: skip
    side_by_side(given, tmp_path / "run")
    image, kernel = (12, 12, 1), (5, 5, 4, 4)
    for shared, own in kernels:
        assert own == [] and kernel in shared
    shapes = [shape for shared, _ in kernels for shape in shared]
    assert any(shape[0] > 500 and shape[1:] == image for shape in shapes)
    run_population(given, tmp_path / "turn")
    assert_same(tmp_path / "run", tmp_path / "turn")


@pytest.mark.slow
def test_members_of_phases_and_learning_convolutions_have_their_numbers(tmp_path):
    plan = (
        Phase(name="head", steps=2, rules=small.HEAD, batch_stats="hold"),
        # Adam would make whole steps of the rounding errors of gradients near zero.
        Phase(
            name="all", steps=2, optimizer="sgd", accumulate_steps=2, clip_norm=1.0,
            peak_lr=1e-2,
        ),
    )  # fmt: skip
    given = config(
        (
            (("plan[0].peak_lr", 0.1), ("seed.order", 1)),
            (("plan[1].peak_lr", 1e-4), ("seed.dropout", 1)),
        ),
        plan,
        {
            "model.head.dropout": 0.2, "nonfinite.policy": "skip",
            "evaluate.every_steps": 100,
        },
        model="cnn", convolutions=(4, 8), dense=(8,),
    )  # fmt: skip
    side_by_side(given, tmp_path / "run")
    with traced_for("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune_jax.sweeps.populations.population, "members_at_once", lambda _: 1
        )
        run_population(given, tmp_path / "turn")
    assert_same(tmp_path / "run", tmp_path / "turn", 1e-3)


def test_as_many_members_are_side_by_side_as_fit(monkeypatch):
    given = config()
    setup = make_setup(member_configs(given)[0])
    assert members_at_once([setup]) == 1
    own = 4 * 2 * (144 * 10 + 10)  # Parameters and their average.

    def most(free=None, memory=10**12):
        monkeypatch.setattr(
            finetune_jax.sweeps.populations.vectorised, "free_bytes", lambda _: free
        )
        monkeypatch.setattr(
            finetune_jax.sweeps.populations.vectorised, "memory", lambda: memory
        )
        with traced_for("gpu"):
            return members_at_once([setup])

    assert most() == finetune_jax.sweeps.populations.vectorised.MOST
    assert most(free=0) == 1
    each = 4 * own + own / 2  # And the model: no weights make what is frozen the same.
    assert most(free=int(5 * each / 0.8) + 1000) == 5
    assert most(free=int(5 * each / 0.8) - 1000) == 4
    assert 1 < most(memory=10**6) < most(memory=2 * 10**6) < 64
    monkeypatch.setattr(finetune_jax.sweeps.populations.vectorised, "MOST_ARRAYS", 21)
    assert 1 < most() < 21
    pmap = PmapDevices(mesh=setup.devices.mesh)
    with traced_for("gpu"):
        assert members_at_once([dataclasses.replace(setup, devices=pmap)]) == 1


def test_programs_are_compiled_for_halves():
    together = VectorisedExecutor(9, make_setup(config(())).devices)
    assert [together._size(n) for n in (9, 6, 5, 4, 3, 2, 1)] == [9, 9, 5, 5, 3, 2, 1]


def test_members_keep_one_pace():
    together = VectorisedExecutor(5, make_setup(config(())).devices)
    pace = SharedPace(None, together)
    made = []
    for _ in range(3):
        together.calls, together.call_s = together.calls + 1, SHORT_S / 2
        for _ in range(5):
            pace.took(100 * SHORT_S)  # With what the others did meanwhile.
            made.append(pace.updates)
    assert made == [2] * 5 + [4] * 5 + [8] * 5
