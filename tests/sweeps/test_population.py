"""Members of a population are the bits of their single runs, and their table is right."""

import csv
import json

import numpy as np
import pytest
import small
from scipy import stats

import finetune_jax.sweeps.populations.population
import finetune_jax.training.run
from finetune_jax import config as configs
from finetune_jax.config import grid
from finetune_jax.core.errors import TrainingError, UserError
from finetune_jax.modes import evaluate, reproduce
from finetune_jax.modes.options import Options
from finetune_jax.plans.phase import Phase
from finetune_jax.report.workdir import read_config, read_json
from finetune_jax.sweeps.populations.population import member_configs, run_population
from finetune_jax.sweeps.populations.table import as_csv, table
from finetune_jax.training.run import run

pytestmark = pytest.mark.slow

PLAN = (
    Phase(
        name="head", steps=12, rules=small.HEAD, batch_stats="hold", peak_lr=3e-2,
        plateau_metric="validation/loss", plateau_patience=1, plateau_restore=True,
    ),
    Phase(name="all", steps=4, accumulate_steps=2, clip_norm=1.0),
)  # fmt: skip
MEMBERS = (
    (),
    (("plan[0].peak_lr", 3.0),),
    (("seed", 1),),
    (("plan[0].weight_decay", 0.1), ("plan[1].peak_lr", 1e-4)),
    (("task.label_smoothing", 0.3), ("seed.order", 7)),
    (("init.schemes", ((".*kernel", "orthogonal"),)), ("seed.dropout", 3)),
    (("plan[0].rules", ((".*", 1.0),)), ("plan[0].batch_stats", "update")),
    (("plan[1].regularise", (("l2_sp", 0.1, ".*kernel"),)),),
    (("plan[1].rules", (("head/.*", 1.0), (".*", 0.0))), ("seed", 5)),
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for module in (
        finetune_jax.training.run,
        finetune_jax.sweeps.populations.population,
    ):
        monkeypatch.setattr(module, "write_report", lambda *_: None)


def config(folder, members=(), **overrides):
    keys = {
        "data.per_class": 5,
        "data.batch_size": 10,
        "data.cache_dir": folder / "tables",
        "model.head.dropout": 0.2,
        "evaluate.every_steps": 3,
        "evaluate.best": "validation/loss",
        "evaluate.ema_decay": 0.9,
        "report.every_steps": 1,
        "population": members,
    } | overrides
    return small.config(
        model="cnn",
        convolutions=(4, 4),
        dense=(8,),
        plan=PLAN,
        overrides=[(key, str(value)) for key, value in keys.items()],
    )


def outcome(workdir):
    result = read_json(workdir / "result.json")
    assert result is not None
    keys = ("params_sha256", "state_sha256", "frozen_sha256", "steps", "best_step")
    return [result[key] for key in (*keys, "final", "best")], small.lines(workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune_jax.sweeps.populations.population, "write_report", lambda *_: None
        )
        result = run_population(config(folder, MEMBERS), folder / "run")
    return folder, result


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MEMBERS)))
@pytest.mark.ci_runs("5")
def test_a_member_has_the_bits_of_its_single_run(trained, tmp_path, number):
    folder, _ = trained
    member = member_configs(config(folder, MEMBERS))[number]
    run(member, tmp_path / "run")
    place = folder / "run" / "members" / f"{number:03d}"
    assert outcome(place) == outcome(tmp_path / "run")
    assert configs.to_json(read_config(place)) == configs.to_json(member)


@pytest.mark.slow
def test_members_differ_and_the_best_one_is_told_and_kept(trained):
    folder, result = trained
    members = [folder / "run" / "members" / f"{n:03d}" for n in range(len(MEMBERS))]
    found = [outcome(place)[0] for place in members]
    assert len({values[0] for values in found}) == len(MEMBERS)
    losses = [values[-1]["validation/loss"] for values in found]
    assert result["member"] == np.argmin(losses)
    assert result["best"] == found[result["member"]][-1]
    kept = [n for n, place in enumerate(members) if (place / "checkpoints").exists()]
    assert kept == [result["member"]]
    # Members end early by their own plateaus.
    assert len({values[3] for values in found}) > 1
    written = json.loads((folder / "run" / "result.json").read_text())
    assert written == json.loads(json.dumps(result))


@pytest.mark.slow
def test_the_best_member_can_be_measured_again_and_the_population_says_where(
    trained,
):
    folder, result = trained
    best = folder / "run" / "members" / f"{result['member']:03d}"
    evaluate.main(read_config(best), Options(config="", workdir=best))
    measured = json.loads((best / "evaluation.json").read_text())
    assert measured.pop("step") == result["best_step"]
    assert measured == result["best"]
    place = folder / "run"
    for mode in (evaluate, reproduce):
        with pytest.raises(UserError, match="holds a population"):
            mode.main(read_config(place), Options(config="", workdir=place))


@pytest.mark.slow
def test_a_killed_population_goes_on_with_the_member_that_was_not_finished(
    trained, tmp_path, monkeypatch
):
    folder, whole = trained
    given = config(folder, MEMBERS[:4])
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        make_loop, begun = finetune_jax.sweeps.populations.population.make_loop, []

        def dies(*arguments, **options):
            begun.append(1)
            if len(begun) == 3:
                small.die_before(patch, 2)
            return make_loop(*arguments, **options)

        patch.setattr(finetune_jax.sweeps.populations.population, "make_loop", dies)
        run_population(given, tmp_path / "run")
    members = tmp_path / "run" / "members"
    times = [(members / f"{n:03d}" / "result.json").stat().st_mtime_ns for n in (0, 1)]
    result = run_population(given, tmp_path / "run")
    assert times == [
        (members / f"{n:03d}" / "result.json").stat().st_mtime_ns for n in (0, 1)
    ]
    for number in range(4):
        name = f"{number:03d}"
        assert outcome(members / name) == outcome(folder / "run" / "members" / name)
    assert (
        len([1 for place in members.iterdir() if (place / "checkpoints").exists()]) == 1
    )
    assert result["member"] < 4


def test_a_population_ends_in_a_table_and_is_not_trained_twice(tmp_path, capsys):
    members = grid({"plan[0].peak_lr": (0.1, 0.01), "seed": (0, 1)})
    overrides = {"evaluate.best": "validation/loss", "population": members}
    given = small.config(
        model="mlp",
        hidden=(),
        plan=(Phase(name="all", steps=8),),
        overrides=[(key, str(value)) for key, value in overrides.items()],
    )
    result = run_population(given, tmp_path / "run")
    assert [len(row["members"]) for row in result["population"]] == [2, 2]
    assert len((tmp_path / "run" / "table.csv").read_text().splitlines()) == 3
    member = member_configs(given)[result["member"]]
    run(member, tmp_path / "single")
    best = tmp_path / "run" / "members" / f"{result['member']:03d}"
    assert outcome(best) == outcome(tmp_path / "single")
    (tmp_path / "run" / "result.json").unlink()
    again = run_population(given, tmp_path / "run")
    assert "4 of 4 members are finished" in capsys.readouterr().out
    assert again | {"wall_s": 0} == json.loads(json.dumps(result)) | {
        "wall_s": 0, "population": again["population"]
    }  # fmt: skip


def test_a_member_that_diverges_stops_no_other(tmp_path):
    members = grid({"plan[0].peak_lr": (1e38, 0.01), "seed": (0, 1)})
    overrides = {"evaluate.best": "validation/accuracy", "population": members}
    given = small.config(
        model="mlp",
        hidden=(),
        plan=(Phase(name="all", steps=8, optimizer="sgd"),),
        overrides=[(key, str(value)) for key, value in overrides.items()],
    )
    result = run_population(given, tmp_path / "run")
    good, bad = result["population"]
    assert good["failed"] == [] and result["member"] in good["members"] == [2, 3]
    assert bad["failed"] == bad["members"] == [0, 1] and bad["mean"] == {}
    told = read_json(tmp_path / "run" / "members" / "000" / "result.json")
    assert told is not None and told["failed"].startswith("Not finite")
    text = (tmp_path / "run" / "table.csv").read_text()
    _, first, second = csv.reader(text.splitlines())
    assert first[1:3] == ["2", "0"] and second[1:4] == ["2", "2", ""]
    overrides["population"] = members[:2]
    worse = small.config(
        model="mlp",
        hidden=(),
        plan=(Phase(name="all", steps=8, optimizer="sgd"),),
        overrides=[(key, str(value)) for key, value in overrides.items()],
    )
    with pytest.raises(
        TrainingError, match="All members failed, the first: Not finite"
    ):
        run_population(worse, tmp_path / "worse")


def results(values):
    return [{"best": {"validation/loss": v, "test/accuracy": 1 - v}} for v in values]


def test_the_table_has_means_and_intervals_over_seeds_best_first():
    population = grid({"plan[0].peak_lr": (0.1, 1.0), "seed": (0, 1, 2)})
    population = (*population, (("plan[0].peak_lr", 5.0),))
    values = [0.5, 0.6, 0.7, 0.1, 0.3, 0.35, 0.9]
    rows = table(population, results(values), "validation/loss")
    assert [row["settings"]["plan[0].peak_lr"] for row in rows] == [1.0, 0.1, 5.0]
    assert [row["members"] for row in rows] == [[3, 4, 5], [0, 1, 2], [6]]
    for row in rows[:2]:
        mine = np.array(values)[row["members"]]
        assert row["mean"]["validation/loss"] == pytest.approx(mine.mean())
        low, high = stats.t.interval(0.95, 2, mine.mean(), stats.sem(mine))
        half = row["interval_95"]["validation/loss"]
        assert half == pytest.approx((high - low) / 2)
    assert rows[2]["interval_95"] == {"validation/loss": None, "test/accuracy": None}
    backwards = table(population, results(values), "test/accuracy")
    assert [row["members"] for row in backwards] == [row["members"] for row in rows]


def test_the_table_can_be_read_as_csv():
    population = ((("init.schemes", (("a,b", "zeros"),)),), ())
    rows = table(population, results([0.25, 0.5]), "validation/loss")
    heading, first, second = csv.reader(as_csv(rows).splitlines())
    assert heading[:4] == ["init.schemes", "members", "failed", "validation/loss"]
    assert first == ["(('a,b', 'zeros'),)", "1", "0", "0.25", "", "0.75", ""]
    assert second[:4] == ["", "1", "0", "0.5"]


def test_all_that_is_wrong_with_a_population_is_told_at_once(tmp_path):
    members = (
        (("data.batch_size", 5), ("plan[0].peek_lr", 1.0)),
        ("seed", 1),
        (("plan[7].steps", 2),),
        (("seed", -1),),
        (("seed", 1),),
        (("seed", 1),),
    )
    wrong = config(tmp_path, members, **{"evaluate.best": None})
    with pytest.raises(UserError) as error:
        member_configs(wrong)
    for text in (
        "config.evaluate.best: None",
        "population[0]: 'data.batch_size'; members can differ in seed",
        "population[0]: --config.plan[0].peek_lr: unknown",
        "population[1]: ('seed', 1); pairs (key, value) are needed",
        "population[2]: --config.plan[7].steps",
        "population[3]: config.seed: -1",
        "population[5]: the same as config.population[4]",
    ):
        assert text in str(error.value)
    several = (
        ((("plan[1].rules", (("nothing", 1.0),))),),
        (("plan[0].clip_norm", -1),),
    )
    with pytest.raises(UserError):
        run_population(config(tmp_path, several), tmp_path / "run")
    assert not (tmp_path / "run").exists()
