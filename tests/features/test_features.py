"""What frozen stages make of the examples is kept, and no bit depends on that."""

import errno
import functools
import json
import os

import jax
import numpy as np
import pytest
import small

from finetune_jax.features import cache, frozen_prefix
from finetune_jax.models.modes import EVALUATION
from finetune_jax.parallel.devices import stable_batch
from finetune_jax.parallel.make import make_devices
from finetune_jax.plans.phase import Phase
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]


def plan(*learning, batch_stats="hold", **fields):
    fields = {"steps": 12, "peak_lr": 1e-2, "accumulate_steps": 2} | fields
    rules = (*((f"{stage}/.*", 1.0) for stage in learning), (".*", 0.0))
    return (Phase(name="upper", rules=rules, batch_stats=batch_stats, **fields),)


def config(phases, folder, **overrides):
    keys = {
        "data.cache_dir": folder,
        "data.per_class": 5,
        "data.batch_size": 10,
        "evaluate.every_steps": 5,
        "evaluate.best": "validation/loss",
        "evaluate.batch_size": 64,
        "report.every_steps": 1,
    } | overrides
    arguments: dict = dict(model="cnn", convolutions=(4, 4), dense=(8,))
    if "model.name" in keys:
        arguments = {}
    return small.config(
        plan=phases,
        overrides=[(key, str(value)) for key, value in keys.items()],
        **arguments,
    )


def outcome(config, workdir):
    result = run(config, workdir)
    keys = ("params_sha256", "state_sha256", "frozen_sha256", "final", "best")
    return [result[key] for key in keys], small.lines(workdir)


def both(phases, folder, **overrides):
    """Returns the outcomes of a run that keeps features and of one that does not."""
    kept = outcome(config(phases, folder / "tables", **overrides), folder / "kept")
    tables = sorted((folder / "tables").glob("*/about.json"))
    off = {**overrides, "data.cache": "off"}
    again = outcome(config(phases, folder / "none", **off), folder / "again")
    assert not (folder / "none").exists()
    return kept, again, [json.loads(about.read_text()) for about in tables]


@pytest.mark.bits
@pytest.mark.parametrize("batch_stats", ["hold", "update"])
@pytest.mark.parametrize(
    "learning",
    [
        pytest.param(("head",), marks=pytest.mark.slow),
        pytest.param(("stage3", "head"), marks=pytest.mark.slow),
        pytest.param(("stage2", "stage3", "head"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.ci_runs("learning0-hold", "learning1-update")
def test_what_is_kept_changes_no_bit(tmp_path, learning, batch_stats):
    overrides = {"model.head.dropout": 0.2}
    phases = plan(*learning, batch_stats=batch_stats)
    kept, again, tables = both(phases, tmp_path, **overrides)
    assert kept == again
    assert [table["inputs_of"] for table in tables] == [learning[0]] * 3


@pytest.mark.bits
@pytest.mark.slow
def test_versions_of_augmented_images_are_kept(tmp_path):
    overrides = {
        "data.augment": (("flip",), ("pad_crop", 1)),
        "data.cache_views": 2,
    }
    kept, again, tables = both(plan("head"), tmp_path, **overrides)
    assert kept == again
    assert sorted(table["views"] for table in tables) == [1, 1, 2]
    endless = {"data.augment": overrides["data.augment"]}
    other = outcome(config(plan("head"), tmp_path, **endless), tmp_path / "endless")
    assert other[0] != kept[0]


@pytest.mark.parametrize(
    "override, reason",
    [
        pytest.param(
            {"data.augment": (("flip",),)},
            "cache_views=K keeps K versions",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data.mix": (("mixup", 0.2),), "data.batch_size": 20},
            "data.mix makes others",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data.per_class": 40},
            "not kept: the phase takes 120 of them",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data.cache_gb": 1e-6},
            "more than config.data.cache_gb",
            marks=pytest.mark.slow,
        ),
        ({"data.on_error": "skip"}, "on_error=skip"),
    ],
)
def test_why_nothing_is_kept_is_told(tmp_path, capsys, override, reason):
    run(config(plan("head"), tmp_path / "tables", **override), tmp_path / "run")
    assert reason in capsys.readouterr().out


def test_a_later_run_computes_nothing_again(tmp_path, monkeypatch, capsys):
    first = outcome(config(plan("head"), tmp_path), tmp_path / "one")

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(cache.FeatureStore, "_leaves", refuse)
    again = outcome(config(plan("head"), tmp_path), tmp_path / "two")
    assert first == again
    assert "found in" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="computed again"):
        run(config(plan("head"), tmp_path, seed=1), tmp_path / "three")


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        {"seed.init": 1},
        {"data.mean": (0.5,)},
        {"data.split_seed": 1},
        {"data.image_size": 16},
        {"precision": "bfloat16"},
        {"model.convolutions": (4, 6)},
    ],
)
@pytest.mark.exhaustive
def test_a_table_of_another_kind_is_not_used(tmp_path, override):
    alone = outcome(
        config(plan("head"), tmp_path / "own", **override), tmp_path / "alone"
    )
    run(config(plan("head"), tmp_path / "tables"), tmp_path / "before")
    after = outcome(
        config(plan("head"), tmp_path / "tables", **override), tmp_path / "after"
    )
    assert after == alone


@pytest.mark.slow
def test_another_rate_uses_the_same_tables(tmp_path):
    run(config(plan("head"), tmp_path / "tables"), tmp_path / "one")
    other = plan("head", peak_lr=1e-3, steps=8, optimizer="sgd")
    run(config(other, tmp_path / "tables"), tmp_path / "two")
    assert len(list((tmp_path / "tables").iterdir())) == 3


def test_a_damaged_table_is_made_anew(tmp_path, capsys):
    first = outcome(config(plan("head"), tmp_path / "tables"), tmp_path / "one")
    for file in (tmp_path / "tables").glob("*/0.bin"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    next((tmp_path / "tables").glob("*/about.json")).write_text("{")
    again = outcome(config(plan("head"), tmp_path / "tables"), tmp_path / "two")
    assert first == again
    assert capsys.readouterr().out.count("is damaged") == 3


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_folder_without_its_description_is_replaced(tmp_path, capsys):
    tables = tmp_path / "tables"
    run(config(plan("head"), tables), tmp_path / "one")
    for about in tables.glob("*/about.json"):
        about.unlink()
    run(config(plan("head"), tables), tmp_path / "two")
    assert len(list(tables.glob("*/about.json"))) == 3
    run(config(plan("head"), tables), tmp_path / "three")
    assert capsys.readouterr().out.count("found in") == 3


@pytest.mark.slow
def test_tables_of_somebody_else_are_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError("not yours")

    run(config(plan("head"), tmp_path / "tables"), tmp_path / "one")
    monkeypatch.setattr(os, "utime", refuse)
    run(config(plan("head"), tmp_path / "tables"), tmp_path / "two")
    assert capsys.readouterr().out.count("found in") == 3


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
@pytest.mark.ci_runs("1.0")
def test_a_disk_that_is_full_stops_nothing(tmp_path, monkeypatch, capsys, memory_gb):
    overrides = {"data.memory_gb": memory_gb}
    fsync = os.fsync

    def full(file):
        if "tables" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    kept, again, tables = both(plan("head"), tmp_path, **overrides)
    assert kept == again and not tables
    assert not list((tmp_path / "tables").iterdir())
    assert capsys.readouterr().out.count("cannot be kept in") == 3


@pytest.mark.slow
def test_examples_that_cannot_be_read_are_not_taken_for_a_full_disk(
    tmp_path, monkeypatch
):
    def rows(*arguments):
        yield next(found(*arguments))
        raise OSError(errno.EIO, "the examples are gone")

    found = cache.FeatureStore._leaves
    monkeypatch.setattr(cache.FeatureStore, "_leaves", rows)
    with pytest.raises(OSError, match="the examples are gone"):
        run(config(plan("head"), tmp_path / "tables"), tmp_path / "run")


@pytest.mark.slow
def test_the_order_of_splits_is_part_of_what_the_data_is(tmp_path):
    rng = np.random.default_rng(0)
    splits = {
        f"{kind}_{name}": rng.normal(size=(40, 5)) if kind == "x" else np.arange(40) % 4
        for name in ("train", "validation", "test")
        for kind in "xy"
    }
    outcomes = []
    for name, order in (("one", list(splits)), ("two", list(splits)[::-1])):
        np.savez(tmp_path / f"{name}.npz", **{key: splits[key] for key in order})
        overrides = {
            "data.name": "arrays", "data.dir": str(tmp_path / f"{name}.npz"),
            "model.name": "mlp", "data.image_size": None, "data.per_class": None,
        }  # fmt: skip
        given = config(plan("head"), tmp_path / "tables", **overrides)
        outcomes.append(outcome(given, tmp_path / name))
    assert outcomes[0] == outcomes[1]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_best_of_an_earlier_phase_is_measured_as_it_is(tmp_path):
    """Its averaged weights are not those of the iterate that the last phase froze."""
    everything = Phase(name="all", steps=10, optimizer="schedule_free_adamw")
    worse = plan("head", optimizer="sgd", peak_lr=100.0, accumulate_steps=1)
    kept, again, _ = both((everything, *worse), tmp_path)
    assert kept == again


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept = outcome(config(plan("head"), tmp_path / "file"), tmp_path / "one")
    assert "cannot be kept in" in capsys.readouterr().out
    own = outcome(config(plan("head"), tmp_path / "tables"), tmp_path / "two")
    assert kept == own


@pytest.mark.exhaustive
@pytest.mark.bits
@pytest.mark.slow
def test_what_is_larger_than_the_memory_stays_on_disk(tmp_path):
    overrides = {"data.memory_gb": 0.0}
    kept, again, _ = both(plan("stage3", "head"), tmp_path, **overrides)
    assert kept == again


@pytest.mark.slow
def test_the_oldest_tables_make_room(tmp_path):
    for seed in range(3):
        overrides = {"seed": seed, "data.cache_gb": 6e-5}
        run(
            config(plan("head"), tmp_path / "tables", **overrides), tmp_path / f"{seed}"
        )
    size = sum(file.stat().st_size for file in (tmp_path / "tables").glob("*/*"))
    assert 0 < size < 6e4
    assert not list((tmp_path / "tables").glob(".*"))


@pytest.mark.exhaustive
@pytest.mark.bits
@pytest.mark.slow
def test_a_phase_that_unfreezes_moves_the_boundary(tmp_path):
    everything = Phase(name="all", steps=4, accumulate_steps=2)
    phases = (
        *plan("head"),
        *plan("stage3", "head", optimizer_state="carry"),
        everything,
        *plan("head", optimizer_state="carry"),
    )
    phases = tuple(
        Phase(**{**vars(phase), "name": f"phase {index}"})
        for index, phase in enumerate(phases)
    )
    overrides = {"evaluate.ema_decay": 0.9}
    kept, again, tables = both(phases, tmp_path, **overrides)
    assert kept == again
    inputs = [table["inputs_of"] for table in tables]
    assert {name: inputs.count(name) for name in inputs} == {"head": 6, "stage3": 3}


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_same_tables(tmp_path):
    alone = outcome(config(plan("head"), tmp_path / "own"), tmp_path / "alone")
    for _ in range(3):
        with pytest.raises(Preempted):
            run(config(plan("head"), tmp_path), tmp_path / "run", small.stop_at_once())
    assert outcome(config(plan("head"), tmp_path), tmp_path / "run") == alone


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.ci_runs("jit")
def test_features_are_kept_over_devices(tmp_path, capfd, mode):
    overrides = {
        "parallel.devices": 2,
        "parallel.mode": mode,
        "data.batch_size": 8,
        "evaluate.batch_size": 7,
    }
    phases = plan("stage3", "head")
    kept, again, tables = both(phases, tmp_path, **overrides)
    assert kept == again and len(tables) == 3
    capfd.readouterr()
    outcome(config(phases, tmp_path / "tables", **overrides), tmp_path / "more")
    told = capfd.readouterr().out
    assert told.count("found in") == 3 and "anew" not in told


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize(
    "model, first, batch_stats",
    [
        ("resnet8", "stage1", "hold"),
        ("resnet8", "stage1", "update"),
        ("resnet8", "stage3", "hold"),
        ("resnet8", "stage3", "update"),
        ("resnet8", "head", "update"),
        ("resnet20", "head", "hold"),
    ],
)
@pytest.mark.ci_runs("resnet20-head-hold")
def test_what_is_kept_of_a_resnet_changes_no_bit(tmp_path, model, first, batch_stats):
    stages = ("stem", "stage1", "stage2", "stage3", "head")
    phases = plan(*stages[stages.index(first) :], batch_stats=batch_stats)
    # Micro-batches of five, of which a matrix kernel has some pixels left.
    overrides = {"model.name": model, "data.image_size": 16}
    if model == "resnet20":
        overrides["init.pretrained"] = "zoo:resnet20_fashion_mnist"
        overrides["init.fresh"] = ("head/.*",)
    kept, again, tables = both(phases, tmp_path, **overrides)
    assert kept == again and len(tables) == 3


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("first", ["stage1", "head"])
@pytest.mark.ci_runs("stage1")
def test_what_is_kept_of_large_images_changes_no_bit(tmp_path, monkeypatch, first):
    """Frozen stages get a few at a time: two parts of 24, the second one not full."""
    monkeypatch.setattr(frozen_prefix, "LARGE", 100)
    stages = ("stem", "stage1", "stage2", "stage3", "head")
    phases = plan(*stages[stages.index(first) :], accumulate_steps=1)
    overrides = {"model.name": "resnet8", "data.image_size": 16, "data.batch_size": 40}
    kept, again, tables = both(phases, tmp_path, **overrides)
    assert kept == again and len(tables) == 3


@pytest.mark.bits
def test_frozen_stages_take_the_memory_of_a_part():
    shape = (32, 32, 3)
    task = small.task("resnet8", shape)
    state = small.Trainer(task, plan("head")[0]).state
    step = functools.partial(
        cache.features_step, task=task, first="head", mode=EVALUATION
    )
    batch = {name: array[0] for name, array in small.batch(96, shape).items()}
    arguments = state.params, state.batch_stats, state.rng, batch
    needs = {
        rows: jax.jit(functools.partial(step, rows=rows))
        .lower(*arguments)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for rows in (None, 24)
    }
    assert needs[24] < needs[None] / 3


@pytest.mark.bits
@pytest.mark.parametrize(
    "model, size",
    [
        ("cnn", 12),
        ("mlp", 12),
        pytest.param("resnet20", 12, marks=pytest.mark.slow),
        pytest.param("resnet20", 17, marks=pytest.mark.slow),
    ],
)
@pytest.mark.ci_runs("cnn-12", "mlp-12", "resnet20-17")
def test_a_row_of_a_batch_does_not_depend_on_its_place(model, size):
    """So that features stand for those of any other batch of their size."""
    shape, count = (size, size, 1), stable_batch(make_devices(small.config().parallel))
    task = small.task(model, shape)
    state = small.Trainer(task, plan("head")[0]).state
    whole = {name: array[0] for name, array in small.batch(count, shape).items()}

    @jax.jit
    def step(batch):
        return cache.features_step(
            *(state.params, state.batch_stats, state.rng, batch),
            task=task,
            first="head",
            mode=EVALUATION,
        )

    rows = np.asarray(step(whole))
    for seed in range(3):
        places = np.random.default_rng(seed).permutation(count)
        moved = {name: array[places] for name, array in whole.items()}
        np.testing.assert_array_equal(step(moved), rows[places])
