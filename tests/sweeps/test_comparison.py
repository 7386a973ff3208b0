"""Groups of runs are paired, compared and told apart, or it is said why not."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.evaluation import per_example
from finetune_jax.sweeps import comparison, statistics
from finetune_jax.sweeps.comparison.comparing import needs
from finetune_jax.training.run import run

EXAMPLES = 200


def write(folder, seed, scores, *, metrics=None, ids=None, manifest=None, **result):
    """Writes the files of a finished run that a comparison reads."""
    folder.mkdir(parents=True)
    ids = np.arange(len(scores)) if ids is None else ids
    arrays = {"test/id": np.asarray(ids, np.uint64), "test/accuracy": scores}
    per_example.write(folder, arrays)
    best = {"test/accuracy": float(np.mean(scores)), **(metrics or {})}
    found = {"best": best, "steps": 10, "train_s": 2.0, "wall_s": 3.0, **result}
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "config.json").write_text("{}")
    known = {"seed": seed, "data_fingerprint": "one", **(manifest or {})}
    (folder / "manifest.json").write_text(json.dumps(known))
    return folder


def group(root, name, shift, seeds=5, examples=EXAMPLES, **fields):
    """Writes runs of one configuration whose share of right examples is shifted."""
    hard = np.random.default_rng(0).standard_normal(examples)
    rng = np.random.default_rng(len(name))
    for seed in range(seeds):
        latent = hard + shift + 0.3 * rng.standard_normal(examples)
        right = (latent > -0.5).astype(np.uint8)
        write(root / name / f"seed{seed}", seed, right, **fields)
    return str(root / name)


def opened(path, seeds=5):
    folders = [f"{path}/seed{seed}" for seed in range(seeds)]
    return [comparison.open_run(pathlib.Path(folder)) for folder in folders]


def test_a_clear_difference_is_told_with_its_interval(tmp_path):
    ours, theirs = group(tmp_path, "full", 0.5), group(tmp_path, "head", 0.0)
    found = comparison.compare(opened(ours), opened(theirs), "test/accuracy")
    assert found.verdict == "better" and found.pairs == 5
    assert found.examples == EXAMPLES and 0 < found.low < found.difference < found.high
    assert found.improvement.probability > 0.9 and found.seed_p_value == 2 / 2**5
    text = found.sentence(("full", "head"))
    low, high = 100 * found.low, 100 * found.high
    assert text.startswith("full is better than head by ")
    assert f"points ({low:.1f} to {high:.1f}) [5 seeds, 200 examples, p " in text
    back = comparison.compare(opened(theirs), opened(ours), "test/accuracy")
    assert back.verdict == "worse"
    assert f"head is worse than full by {text.split(' by ')[1]}" == back.sentence(
        ("head", "full")
    )


def test_an_open_difference_says_what_would_tell_it(tmp_path):
    ours, theirs = group(tmp_path, "lora", 0.01), group(tmp_path, "head", 0.0)
    found = comparison.compare(opened(ours), opened(theirs), "test/accuracy")
    assert found.verdict == "open" and found.detectable > abs(found.difference)
    text = found.sentence(("lora", "head"))
    assert text.startswith("lora and head are not told apart: ")
    assert "; neither more seeds alone nor more test examples alone would tell;" in text
    assert f", {found.examples} examples, p = {found.p_value:.2g}]" in text
    assert "are found 4 times in 5" in text


def test_one_run_each_is_compared_over_examples_alone(tmp_path):
    ours, theirs = group(tmp_path, "full", 0.5, 1), group(tmp_path, "head", 0.0, 1)
    found = comparison.compare(opened(ours, 1), opened(theirs, 1), "test/accuracy")
    scores = [
        per_example.read(pathlib.Path(one) / "seed0")["test/accuracy"]
        for one in (ours, theirs)
    ]
    other = stats.ttest_rel(*[one.astype(float) for one in scores])
    assert found.p_value == pytest.approx(other.pvalue)
    assert found.improvement is None
    told = "for these two trained models on these examples, not for their settings"
    assert found.sentence(("full", "head")).endswith(told)


def test_a_metric_that_is_no_mean_is_compared_over_seeds(tmp_path):
    values = {"full": [0.91, 0.93, 0.92, 0.94], "head": [0.90, 0.91, 0.90, 0.93]}
    runs = {}
    for name, aucs in values.items():
        for seed, auc in enumerate(aucs):
            folder = tmp_path / name / f"seed{seed}"
            write(folder, seed, np.ones(20), metrics={"test/roc_auc": auc})
        runs[name] = opened(tmp_path / name, 4)
    found = comparison.compare(runs["full"], runs["head"], "test/roc_auc")
    other = stats.ttest_rel(*values.values())
    assert found.examples == 1 and found.p_value == pytest.approx(other.pvalue)
    assert "compared over seeds alone: test/roc_auc is no mean over" in found.notes[0]
    one = comparison.compare(runs["full"][:1], runs["head"][:1], "test/roc_auc")
    assert one.verdict == "too few" and math.isnan(one.low)
    assert "too few seeds for a test: full and head" in one.sentence(("full", "head"))


def test_differences_that_do_not_vary_are_told_without_a_test(tmp_path):
    for name, values in {"a": (0.6, 0.7, 0.8), "b": (0.7, 0.8, 0.9)}.items():
        for seed, value in enumerate(values):
            metrics = {"test/roc_auc": value}
            write(tmp_path / name / f"seed{seed}", seed, np.ones(9), metrics=metrics)
    ours, theirs = (opened(tmp_path / name, 3) for name in "ab")
    text = comparison.compare(ours, theirs, "test/roc_auc").sentence(("a", "b"))
    assert text == (
        "no test is possible: a and b differ by 10.0 points in each of 3 seeds, so the "
        "spread of the differences is unknown"
    )
    text = comparison.compare(ours, ours, "test/roc_auc").sentence(("a", "b"))
    assert "differ by 0.0 points in each of 3 seeds" in text


def test_shares_have_no_impossible_intervals_or_detectable_differences(tmp_path):
    values = {"a": (0.9, 0.3), "b": (0.1, 0.2), "c": (0.8, 0.91)}
    for name, shares in values.items():
        for seed, share in enumerate(shares):
            metrics = {"test/roc_auc": share}
            write(tmp_path / name / f"seed{seed}", seed, np.ones(9), metrics=metrics)
    groups = {name: opened(tmp_path / name, 2) for name in values}
    found = comparison.compare_all(groups, "b", "test/roc_auc")
    assert (found["a"].low, found["a"].high) == (-1, 1)
    text = found["a"].sentence(("a", "b"))
    assert "too few seeds to tell any difference" in text and "from " not in text
    # Its own p-value is 0.0, but not the adjusted one.
    one = dataclasses.replace(found["c"], adjusted=0.09)
    assert ", p = 0.09 adjusted, the interval is not]" in one.sentence(("c", "b"))


def test_the_best_group_is_told_with_those_that_may_be_as_good(tmp_path):
    shifts = {"full": 0.5, "lora": 0.49, "head": 0.0}
    groups = {n: opened(group(tmp_path, n, shift)) for n, shift in shifts.items()}
    found = comparison.best_of(groups, "full", "test/accuracy")
    assert found.sentence() == "full has the best mean; not told apart from it: lora"
    del groups["lora"]
    found = comparison.best_of(groups, "full", "test/accuracy")
    assert found.sentence() == "full is better than all others"
    found = dataclasses.replace(found, problems={"half": ["no seed in common"]})
    assert found.sentence().endswith("; cannot be compared with it: half")
    assert found.rivals == []


def test_a_split_without_recorded_scores_is_named(tmp_path):
    metrics = {"validation/accuracy": 0.5}
    groups = [opened(group(tmp_path, name, 0.0, metrics=metrics)) for name in "ab"]
    found = comparison.compare(*groups, "validation/accuracy")
    note = "scores of the test split, not of validation/accuracy"
    assert found.examples == 1 and found.notes[0].endswith(note)


def test_lower_losses_are_better_and_told_in_their_units(tmp_path):
    for name, loss in (("full", 0.5), ("head", 0.9)):
        for seed in range(4):
            more = {"test/loss": loss + 0.01 * seed * (name == "head")}
            write(tmp_path / name / f"seed{seed}", seed, np.ones(20), metrics=more)
    runs = [opened(tmp_path / name, 4) for name in ("full", "head")]
    found = comparison.compare(*runs, "test/loss")
    assert found.verdict == "better" and found.difference == pytest.approx(-0.415)
    text = found.sentence(("full", "head"))
    assert "full is better than head by 0.415 (0.394 to 0.436)" in text
    assert found.improvement.probability > 0.99


def test_runs_are_paired_by_seed(tmp_path):
    ours, theirs = group(tmp_path, "full", 0.5), group(tmp_path, "head", 0.0)
    mixed = [opened(theirs)[seed] for seed in (4, 2, 0, 1)]
    found = comparison.compare(opened(ours), mixed, "test/accuracy")
    same = comparison.compare(
        [opened(ours)[seed] for seed in (0, 1, 2, 4)], mixed, "test/accuracy"
    )
    assert found.pairs == 4 and found.low == same.low
    assert any("seed 3 has no pair; left out" in note for note in found.notes)


def test_seeds_of_single_sources_are_paired(tmp_path):
    seeds = [{"init": i, "order": 0} for i in range(3)]
    for name in ("full", "head"):
        for number, seed in enumerate(seeds):
            scores = np.random.default_rng(number).random(30)
            write(tmp_path / name / f"seed{number}", seed, scores)
    runs = [opened(tmp_path / name, 3) for name in ("full", "head")]
    assert comparison.compare(*runs, "test/accuracy").pairs == 3
    with pytest.raises(UserError, match="both seed init 1, order 0"):
        comparison.compare([*runs[0], runs[0][1], runs[1][1]], runs[1], "test/accuracy")


def test_seeds_that_do_not_pair_are_refused(tmp_path):
    ours, theirs = opened(group(tmp_path, "a", 0)), opened(group(tmp_path, "bb", 0))
    with pytest.raises(UserError, match="do not pair: seed 0, seed 1, against seed 2"):
        comparison.compare(ours[:2], theirs[2:], "test/accuracy")
    found = comparison.compare(ours[:1], theirs[2:3], "test/accuracy")
    assert "the seeds differ: seed 0 and seed 2" in found.notes
    clear = dataclasses.replace(found, adjusted=0.01)
    assert clear.sentence(("a", "b")).endswith("settings, whose seeds differ too")


def test_a_metric_that_no_run_has_is_refused(tmp_path):
    ours, theirs = opened(group(tmp_path, "a", 0)), opened(group(tmp_path, "bb", 0))
    with pytest.raises(UserError, match=r"test/acuracy.*did you mean 'test/accuracy'"):
        comparison.compare(ours, theirs, "test/acuracy")


def test_failed_runs_are_left_out(tmp_path):
    ours, theirs = opened(group(tmp_path, "a", 0)), opened(group(tmp_path, "bb", 0))
    (ours[1].folder / "result.json").write_text('{"failed": "NaN"}')
    found = comparison.compare(opened(tmp_path / "a"), theirs, "test/accuracy")
    assert found.pairs == 4 and "left out" in found.notes[0]


def test_other_test_examples_are_refused_or_told(tmp_path):
    scores = np.random.default_rng(0).random(50)
    for name, ids in {
        "a": range(50), "same": range(49, -1, -1), "other": range(50, 100),
        "some": range(10, 60),
    }.items():  # fmt: skip
        ordered = scores[np.array(ids) % 50]
        write(tmp_path / name / "seed0", 0, ordered, ids=np.array(ids))
    runs = {name: opened(tmp_path / name, 1) for name in ("a", "same", "other", "some")}
    found = comparison.compare(runs["a"], runs["same"], "test/accuracy")
    assert found.difference == 0 and -found.low == found.high < 0.1
    with pytest.raises(UserError, match="were measured on other test examples"):
        comparison.compare(runs["a"], runs["other"], "test/accuracy")
    found = comparison.compare(runs["a"], runs["some"], "test/accuracy")
    assert found.examples == 40
    assert "the 40 test examples that all runs have, of 50" in found.notes[0]


def test_test_sets_that_depend_on_the_seed_are_compared_over_seeds(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.2)):
        for seed in range(3):
            scores = np.random.default_rng(seed).random(50) + shift
            ids = np.arange(50) + 1000 * seed
            write(tmp_path / name / f"seed{seed}", seed, scores, ids=ids)
    runs = [opened(tmp_path / name, 3) for name in ("a", "b")]
    found = comparison.compare(*runs, "test/accuracy")
    assert found.examples == 1
    assert "each seed has other test examples" in found.notes[0]


def test_other_data_code_and_older_runs_are_told(tmp_path):
    ours, theirs = group(tmp_path, "full", 0.5), group(tmp_path, "head", 0.0, 3)
    changed = {"data_fingerprint": "two", "code_sha256": "c"}
    for name, fields in {"full": {"code_sha256": "d"}, "head": changed}.items():
        path = tmp_path / name / "seed1" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (tmp_path / "head" / "seed2" / "predictions.npz").unlink()
    found = comparison.compare(opened(ours), opened(theirs, 3), "test/accuracy")
    notes = "\n".join(found.notes)
    assert "head/seed1 had other data than" in notes and "other code of this" in notes
    assert "no predictions.npz in" in notes and found.examples == 1


def test_several_groups_are_adjusted_and_listed_with_their_costs(tmp_path):
    paths = [
        group(tmp_path, name, shift) for name, shift in
        (("head", 0.0), ("full", 0.5), ("lora", 0.01))
    ]  # fmt: skip
    lines = comparison.compare_workdirs(paths)
    assert lines[0].split() == [
        "runs", "test/accuracy", "updates", "train_s", "wall_s",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[1:4]] == [
        [name, "5"] for name in ("head", "full", "lora")
    ]
    text = "\n".join(lines)
    assert "full is better than head by " in text and " adjusted]" in text
    assert "lora and head are not told apart" in text
    groups = {path: opened(path) for path in paths}
    found = comparison.compare_all(groups, paths[0], "test/accuracy")
    smaller, larger = sorted(one.p_value for one in found.values())
    assert sorted(one.adjusted for one in found.values()) == [
        pytest.approx(2 * smaller), pytest.approx(max(larger, 2 * smaller)),
    ]  # fmt: skip


def test_groups_can_be_named_by_commas(tmp_path):
    paths = [group(tmp_path, name, 0.2 * at) for at, name in enumerate(("a", "bb"))]
    listed = [",".join(f"{path}/seed{s}" for s in range(5)) for path in paths]
    assert comparison.compare_workdirs(listed)[-1].endswith(
        comparison.compare_workdirs(paths)[-1].partition(" by ")[2]
    )


def test_groups_are_named_by_where_their_paths_differ(tmp_path):
    paths = [
        group(tmp_path, name, shift) for name, shift in (("a,1", 0.0), ("bb", 0.5))
    ]
    lines = comparison.compare_workdirs(paths)
    assert "bb is better than a,1 by" in "\n".join(lines)
    (tmp_path / "a,1").rename(tmp_path / "a")
    listed = [
        ",".join(f"{tmp_path}/{arm}/seed{seed}" for seed in seeds)
        for arm, seeds in (("a", (0, 1)), ("bb", (1, 2)))
    ]
    lines = comparison.compare_workdirs(listed)
    assert [line.split()[:4] for line in lines[1:3]] == [
        [name, "2,", "1", "paired"] for name in ("a", "bb")
    ]
    assert any(line.startswith("bb is better than a by ") for line in lines)
    for seed, names in ((0, ["a", "bb"]), (1, ["a/seed0", "bb/seed1"])):
        lines = comparison.compare_workdirs(
            [f"{tmp_path}/a/seed0", f"{tmp_path}/bb/seed{seed}"]
        )
        assert [line.split()[0] for line in lines[1:3]] == names
    mixed = [f"{tmp_path}/a/seed0,{tmp_path}/bb/seed1",
             f"{tmp_path}/a/seed1,{tmp_path}/bb/seed0"]  # fmt: skip
    assert comparison.compare_workdirs(mixed)[1].startswith("A ")


def test_a_sweep_is_no_group_of_runs(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "0123456789ab", 0, np.ones(9))
        (tmp_path / name / "sweep.json").write_text("{}")
    with pytest.raises(
        UserError, match="one: is a sweep; give folders by_arm/CASE/ARM"
    ):
        comparison.compare_workdirs([str(tmp_path / name) for name in ("one", "two")])


def test_folders_that_hold_no_finished_run_are_listed_at_once(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "population" / "members").mkdir(parents=True)
    (tmp_path / "population" / "config.json").write_text("{}")
    (tmp_path / "population" / "result.json").write_text("{}")
    names = ("begun", "population", "nowhere")
    with pytest.raises(UserError) as error:
        comparison.compare_workdirs([str(tmp_path / name) for name in names])
    text = str(error.value)
    assert "begun: has not finished" in text and "nowhere: holds no run" in text
    assert "population: a population; give the workdirs of members" in text
    with pytest.raises(UserError, match="at least two workdirs"):
        comparison.compare_workdirs(["a"])
    with pytest.raises(UserError, match="the same workdir twice"):
        comparison.compare_workdirs(["a", "a"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_trained_runs_are_compared(tmp_path):
    for name, rate in (("slow", "1e-5"), ("quick", "0.1")):
        given = configs.load("configs/iris_mlp.py:tiny")
        overrides = [("plan[0].peak_lr", rate), ("plan[0].steps", "30")]
        config, problems = configs.resolve(
            given, [("parallel.devices", "1"), *overrides]
        )
        assert not problems
        run(config, tmp_path / name / "seed0")
    lines = comparison.compare_workdirs([str(tmp_path / n) for n in ("slow", "quick")])
    assert any("[1 seed, 30 examples" in line for line in lines)
    assert "note" not in "".join(lines)


@pytest.mark.parametrize(
    ("seeds", "examples", "parts"),
    [
        # Variances between seeds, between examples, and of the rest.
        (3, 1, (1.0, 0.0, 0.0)),
        (3, 2000, (1.0, 0.1, 0.1)),
        (3, 50, (0.0, 30.0, 1.0)),
        (1, 50, (0.0, 30.0, 0.0)),
    ],
)
def test_it_is_said_whether_seeds_or_examples_are_missing(seeds, examples, parts):
    rng = np.random.default_rng(0)
    sds = np.sqrt(parts)
    scores = (
        sds[0] * stats.norm.ppf((np.arange(seeds)[:, None] + 0.5) / seeds)
        + sds[1]
        * rng.permutation(stats.norm.ppf((np.arange(examples) + 0.5) / examples))
        + sds[2] * rng.standard_normal((seeds, examples)) * (examples > 1)
    )
    found = answer(scores - scores.mean() + 0.5)
    text = found.sentence(("a", "b"))
    if seeds == 1:
        assert "more seeds are needed to know how much training varies; if the" in text
    elif parts[1] > 1:
        assert "no number of seeds would tell on these test examples; if " in text
        assert " more test examples would find it 4 times in 5; " in text
    else:
        again = statistics.seeds_needed(
            0.5, found.estimate.components, examples=examples
        )
        told = f"about {again - 3} more seeds would find it 4 times in 5; differences"
        assert f"if the true difference is this one, {told}" in text


def answer(scores):
    """Returns the comparison whose differences are these scores."""
    estimate = statistics.estimate(scores)
    return comparison.Comparison(
        metric="test/score", ours=2.0, theirs=1.5, estimate=estimate, improvement=None,
        seed_p_value=1.0, level=0.95, **needs(estimate, 0.95),
    )  # fmt: skip


def test_the_spread_of_each_source_is_that_of_its_runs(tmp_path):
    values = {"init": [0.5, 0.7, 0.9], "order": [0.5, 0.52, 0.48]}
    for source, found in values.items():
        for number, value in enumerate(found):
            if number or source == "init":
                seed = {"init": 0, "order": 0} | {source: number}
                write(tmp_path / f"{source}{number}", seed, np.full(20, value))
    runs = [comparison.open_run(folder) for folder in sorted(tmp_path.iterdir())]
    found = comparison.spread(runs, "test/accuracy")
    assert list(found) == ["all", "init", "order"]
    for source, expected in values.items():
        assert found[source].sd == pytest.approx(np.std(expected, ddof=1))
        assert found[source].df == 2
