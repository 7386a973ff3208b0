import csv
import io
import json
import re

import numpy as np
import pytest
from sweep_folders import filled, finish

from finetune_jax.evaluation import per_example
from finetune_jax.sweeps import Arm, Choice, Search, Sweep
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.schedule import Schedule
from finetune_jax.sweeps.table import mean_of, table_of
from finetune_jax.sweeps.table_files import mean_text, write_runs, write_tables

ARMS = {"slow": {"plan[0].peak_lr": 1e-3}, "fast": {"plan[0].peak_lr": 0.1},
        "short_50%": {"plan[0].epochs": 2}}  # fmt: skip
LEVEL = {"slow": 0.7, "fast": 0.9, "short_50%": 0.5}
# By seed; equal differences of all seeds would have no interval.
SPREAD = {"slow": (0, 0.01, 0.02), "fast": (0, 0.011, 0.019)}


def sweep_of(**options):
    given = {"base": "configs/iris_mlp.py", "arms": ARMS, "seeds": 3}
    return Sweep(**given | options)


def seed_of(member):
    return dict(member.seed)["init"]


def values_of(member):
    spread = SPREAD.get(member.arm, (0, 0.012, 0.018))
    value = LEVEL[member.arm] + spread[seed_of(member)]
    return {"test/accuracy": value, "test/loss": 1 - value}


def rows_of(folder):
    return list(csv.DictReader(io.StringIO((folder.root / "table.csv").read_text())))


def test_rows_are_sorted_within_each_case_and_answer_in_words(tmp_path):
    cases = {"few": {"data.batch_size": 15}, "all": {}}

    def values(member):
        sign = -1 if member.case == "all" else 1
        return {
            "test/accuracy": 0.5 + sign * (values_of(member)["test/accuracy"] - 0.5)
        }

    folder, wanted = filled(tmp_path, sweep_of(cases=cases), values)
    lines = write_tables(folder.root, "x", table_of(folder, wanted))
    found = [(row["case"], row["arm"]) for row in rows_of(folder)]
    order = ["fast", "slow", "short_50%"]
    assert found == [("few", arm) for arm in order] + [
        ("all", arm) for arm in reversed(order)
    ]
    first = rows_of(folder)[0]
    assert float(first["test/accuracy"]) == pytest.approx(0.91)
    assert float(first["difference"]) == pytest.approx(0.2)
    assert (
        first["verdict"] == "better" and "fast is better than slow" in first["answer"]
    )
    assert rows_of(folder)[1]["answer"] == "baseline"
    assert any(line.startswith("few: fast is better than slow") for line in lines)
    assert any("2 comparisons of each case (Holm)" in line for line in lines)
    assert "few: fast is better than all others" in lines
    assert "few: fast is better than all others" in (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "comparisons.json").read_text())
    assert [one["arm"] for one in found["best"]] == ["fast", "short_50%"]
    assert [one["more_seeds"] for one in found["comparisons"]] == [None] * 4


def test_costs_that_all_rows_have_in_common_are_in_the_csv_alone(tmp_path):
    folder, wanted = filled(tmp_path, sweep_of(), values_of)
    lines = write_tables(folder.root, "x", table_of(folder, wanted))
    assert lines[0].startswith("arm        runs") and "updates" not in lines[0]
    assert "trained" not in (tmp_path / "table.md").read_text()
    assert rows_of(folder)[0]["updates"] == "120"
    result = folder.workdir(wanted.members[0].key) / "result.json"
    text = result.read_text().replace(
        '"trained_parameters": 131', '"trained_parameters": 7'
    )
    result.write_text(text)
    table = table_of(SweepFolder(tmp_path, folder.sweep), wanted)
    assert "trained parameters" in write_tables(folder.root, "x", table)[0]


def test_the_csv_of_runs_has_a_row_for_each_run_and_no_times(tmp_path):
    def values(member):
        return None if member.arm == "fast" else values_of(member)

    texts = []
    for name, train_s in (("a", 1.0), ("b", 2.5)):
        folder, wanted = filled(tmp_path / name, sweep_of(), values, train_s=train_s)
        write_runs(folder, wanted)
        texts.append((tmp_path / name / "runs.csv").read_text())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(io.StringIO(texts[0])))
    assert [row["workdir"] for row in rows] == [m.key for m in wanted.members]
    slow = next(row for row in rows if (row["arm"], row["init"]) == ("slow", "2"))
    assert slow["test/accuracy"] == "0.72" and slow["state"] == "complete"
    assert slow["updates"] == slow["best_step"] == "120" and slow["stage"] == "final"
    assert {row["state"] for row in rows if row["arm"] == "fast"} == {"missing"}


def test_the_deviation_over_seeds_and_one_minus_sign_are_in_the_tables(tmp_path):
    folder, wanted = filled(tmp_path, sweep_of(), values_of)
    lines = write_tables(folder.root, "x", table_of(folder, wanted))
    by_arm = {row["arm"]: row for row in rows_of(folder)}
    assert float(by_arm["slow"]["std"]) == pytest.approx(0.01)
    assert float(by_arm["short_50%"]["difference"]) == pytest.approx(-0.2)
    text = "\n".join(lines) + (tmp_path / "table.md").read_text()
    assert "−20.0" in text and not re.search(r"[ (+]-\d", text)
    found = next(r.comparison for r in table_of(folder, wanted).rows if r.comparison)
    assert found.number(-1e-9, "").strip("0") == "."


def test_the_table_has_the_same_bytes_in_another_folder_at_another_speed(tmp_path):
    texts = []
    for name, train_s in (("a", 1.0), ("b", 2.5)):
        root = tmp_path / name
        folder, wanted = filled(root, sweep_of(), values_of, train_s=train_s)
        write_tables(folder.root, "x", table_of(folder, wanted))
        files = [root / "table.csv", root / "comparisons.json"]
        texts.append([file.read_bytes() for file in files])
    assert texts[0] == texts[1]


def test_runs_that_are_missing_or_failed_are_counted_and_compared_no_further(tmp_path):
    def values(member):
        if member.arm == "fast":
            return None
        is_missing = member.arm == "short_50%" and seed_of(member) == 0
        return None if is_missing else values_of(member)

    folder, _ = filled(tmp_path, sweep_of(attempts=1), values)
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    failed = next(m for m in wanted.members if m.arm == "fast")
    (folder.claims / failed.key).mkdir(parents=True)
    folder.failed(failed.key, 0, "ValueError: no", again=False)
    lines = write_tables(folder.root, "x", table_of(folder, wanted))
    rows = {row["arm"]: row for row in rows_of(folder)}
    counts = {
        arm: [int(row[key]) for key in ("runs", "missing", "failed")]
        for arm, row in rows.items()
    }
    assert counts == {"slow": [3, 0, 0], "short_50%": [2, 1, 0], "fast": [0, 2, 1]}
    problem = "no run has finished (1 failed, 2 missing)"
    assert rows["fast"]["answer"] == problem
    assert rows["short_50%"]["verdict"] == "worse"
    assert any(line.startswith(f"fast: {problem}") for line in lines)
    # Last, since it has no mean.
    assert list(rows)[-1] == "fast"


def test_tuned_values_stand_in_the_table(tmp_path):
    tune = {"plan[0].peak_lr": (0.01, 0.02)}
    arms = {"one": {}, "two": {"plan[0].epochs": 2}}

    def values(member):
        is_best = member.overrides["plan[0].peak_lr"] == 0.02
        return {"validation/accuracy": float(is_best), "test/accuracy": 0.5}

    folder, wanted = filled(
        tmp_path, sweep_of(arms=arms, tune=tune, tune_by="validation/accuracy"), values
    )
    write_tables(folder.root, "x", table_of(folder, wanted))
    for row in rows_of(folder):
        assert json.loads(row["chosen"]) == {"plan[0].peak_lr": 0.02}
    assert "peak_lr 0.02" in (tmp_path / "table.md").read_text()


def test_an_arm_whose_metric_has_another_name_is_compared(tmp_path):
    name = "test/digits/accuracy"
    arms = {"slow": {}, "fast": Arm(overrides=ARMS["fast"], metric=name)}

    def values(member):
        level = values_of(member)["test/accuracy"]
        others = {"test/accuracy": 0.1} if member.arm == "fast" else {}
        return {name if others else "test/accuracy": level, **others}

    folder, wanted = filled(tmp_path, sweep_of(arms=arms), values)
    write_tables(folder.root, "x", table_of(folder, wanted))
    first = rows_of(folder)[0]
    assert first["arm"] == "fast" and float(first["test/accuracy"]) == pytest.approx(
        0.91
    )
    assert float(first["difference"]) == pytest.approx(0.2)


def test_an_arm_whose_seeds_do_not_pair_is_told_and_the_others_are_compared(tmp_path):
    def values(member):
        is_left_out = {"slow": 2, "short_50%": 0}.get(member.arm) == seed_of(member)
        if member.arm == "short_50%" and seed_of(member) == 1:
            is_left_out = True
        return None if is_left_out else values_of(member)

    folder, wanted = filled(tmp_path, sweep_of(), values)
    rows = {row.arm: row for row in table_of(folder, wanted).rows}
    assert rows["fast"].comparison.pairs == 2
    assert rows["short_50%"].comparison is None
    assert "do not pair" in rows["short_50%"].problem


def test_the_interval_counts_examples_where_runs_have_their_scores(tmp_path):
    folder = SweepFolder(tmp_path, sweep_of(seeds=1))
    folder.make()
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    scores = np.arange(40) % 4 > 0
    for member in wanted.members:
        finish(folder, member, {"test/accuracy": 0.75}, scores=scores)
    row = table_of(folder, wanted).rows[0]
    assert row.estimate.examples == 40 and row.estimate.seeds == 1
    assert ", over examples only)" in mean_text("test/accuracy", row.estimate)
    half = 1.96 * (0.75 * 0.25 / 39) ** 0.5
    assert row.estimate.high - 0.75 == pytest.approx(half, rel=0.05)
    for member in wanted.members:
        (folder.workdir(member.key) / "predictions.npz").unlink()
    alone = mean_of(row.runs, "test/accuracy")
    assert alone.examples == 1 and np.isnan(alone.low)


def test_the_interval_of_a_share_lies_between_0_and_1(tmp_path):
    def values(member):
        value = 0.95 + 0.04 * (seed_of(member) == 1)
        return {"test/accuracy": value, "test/loss": value}

    folder, wanted = filled(tmp_path, sweep_of(seeds=2), values)
    row = table_of(folder, wanted).rows[0]
    assert row.estimate.high == 1 and 0 < row.estimate.low < 0.95
    assert mean_of(row.runs, "test/loss").high > 1
    # A loss may exceed 1, whatever the losses of these examples are.
    for run in row.runs:
        arrays = {"test/id": np.arange(3, dtype=np.uint64),
                  "test/loss": np.array([0.0, 0.9, 1.0])}  # fmt: skip
        per_example.write(run.folder, arrays)
    assert mean_of(row.runs, "test/loss").high > 1


def test_markdown_and_latex_have_as_many_cells_in_each_line(tmp_path):
    folder, wanted = filled(tmp_path, sweep_of(), values_of)
    write_tables(folder.root, "x", table_of(folder, wanted))
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    latex = (tmp_path / "table.tex").read_text()
    assert r"short\_50\%" in latex and latex.count(r"\begin{tabular}") == 1
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 4 and len({line.count(" & ") for line in body}) == 1
    assert body[1].startswith("fast & 3 & ")


def test_trials_of_a_search_are_rows_and_those_ended_early_are_last(tmp_path):
    space = {"plan[0].peak_lr": Choice((0.1, 0.01, 0.001))}
    search = Search(space=space, metric="validation/accuracy", sampler="grid")
    sweep = Sweep(base="configs/iris_mlp.py", search=search, seeds=1)
    rates = {0.1: 0.6, 0.01: 0.8}

    def values(member):
        rate = member.overrides["plan[0].peak_lr"]
        return {search.metric: rates[rate]} if rate in rates else None

    folder, wanted = filled(tmp_path, sweep, values)
    pruned = wanted.members[2]
    (folder.claims / pruned.key).mkdir(parents=True)
    folder.pruned(pruned.key, {10: 0.3}, {"step": 10})
    wanted = Schedule(sweep).wanted(folder.outcome)
    lines = write_tables(folder.root, "x", table_of(folder, wanted))
    assert [row["arm"] for row in rows_of(folder)] == ["trial 1", "trial 0", "trial 2"]
    assert rows_of(folder)[2]["answer"] == "ended early"
    assert lines[1].split()[:3] == ["1", "peak_lr", "0.01"]


def test_an_arm_that_tuning_makes_equal_to_another_has_its_runs(tmp_path):
    rates = {"plan[0].peak_lr": (0.01, 0.1)}
    arms = {"fixed": {"plan[0].peak_lr": 0.1}, "tuned": Arm(tune=rates)}

    def values(member):
        rate = member.config.plan[0].peak_lr
        return {"test/accuracy": 0.5, "validation/loss": -rate}

    folder, wanted = filled(tmp_path, sweep_of(arms=arms), values)
    rows = {row.arm: row for row in table_of(folder, wanted).rows}
    assert rows["tuned"].chosen == {"plan[0].peak_lr": 0.1}
    assert len(rows["fixed"].runs) == len(rows["tuned"].runs) == 3
    assert rows["tuned"].comparison is not None and not rows["fixed"].missing
