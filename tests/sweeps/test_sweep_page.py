import html
import re

import pytest
from sweep_folders import a_search, filled, learning_curve, page_of

from finetune_jax import plans
from finetune_jax.report.html.sweep_charts import costs_chart, pareto, slice_chart
from finetune_jax.sweeps import Sweep, by_source
from finetune_jax.sweeps.schedule import Schedule
from finetune_jax.sweeps.table import table_of
from finetune_jax.sweeps.table_files import write_tables

EVIL = "<b>'$x_&\"|"
ARMS = {"slow": {"plan[0].peak_lr": 1e-3}, EVIL: {"plan[0].peak_lr": 0.1},
        "failing": {"plan[0].peak_lr": 1e9}}  # fmt: skip
LEVEL = {"slow": 0.7, EVIL: 0.9}


def text_of(page):
    """Returns the text that a reader sees."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", page)).replace(
        "\N{NO-BREAK SPACE}", " "
    )
    return " ".join(text.split())


def sections_of(page):
    return re.findall(r'<section id="(\w+)"', page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep of which an arm has failed."""
    sweep = Sweep(base="configs/iris_mlp.py", arms=ARMS, seeds=3, attempts=1)

    def values(member):
        if member.arm == "failing":
            return None
        seed = dict(member.seed)["init"]
        spread = (0, 0.01, 0.02) if member.arm == "slow" else (0, 0.011, 0.019)
        return {"test/accuracy": LEVEL[member.arm] + spread[seed]}

    folder, wanted = filled(tmp_path_factory.mktemp("sweep") / "x", sweep, values)
    for member in wanted.members:
        if member.arm == "failing":
            (folder.claims / member.key).mkdir(parents=True)
            folder.failed(
                member.key, 0, "Beginning\nNotFinite: nan at step 3", again=False
            )
        else:
            learning_curve(folder, member, "validation/accuracy", [0.3, 0.5, 0.6, 0.7])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return page_of(folder)


def test_the_page_answers_shows_failures_and_how_to_repeat_each_run(folder, page):
    text = text_of(page)
    assert sections_of(page) == ["results", "differences", "curves", "failed", "again"]
    assert f"{EVIL} is better than slow by 20.00 points" in text
    assert text.index(f"1 {EVIL}") < text.index("2 slow baseline")
    assert (
        "failing: all 3 runs failed" in text and "failing all 3 runs failed –" in text
    )
    assert text.count("NotFinite: nan at step 3") == 3 and "Beginning" not in text
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    for member in wanted.members:
        if member.arm == "failing":
            assert f"log {folder.log(member.key, 0)}" in text
        else:
            workdir = folder.workdir(member.key)
            command = f"-m finetune_jax.main --mode=reproduce --workdir={workdir}"
            assert command in text
    command = f"-m finetune_jax.sweep --sweep=sweep.py --dir={folder.root} run"
    assert command in text
    # No member has a manifest, so none is of the code of now.
    assert "Warning: 6 finished members ran with other code" in text


def test_the_page_loads_nothing_and_escapes_names(page):
    assert "<b>'" not in page and "<script" not in page
    assert not re.search(r"(src|href)=\"(?!\.\./|#)", page)
    assert page.isascii()


def test_the_page_has_the_same_bytes_each_time(folder, page):
    assert page_of(folder) == page


def test_dots_of_the_forest_plot_lie_on_the_side_of_their_difference(tmp_path):
    arms = {"base": {}, "up": {"plan[0].epochs": 2}, "down": {"plan[0].epochs": 3}}
    shift = {"base": 0.0, "up": 0.1, "down": -0.05}

    def values(member):
        seed = dict(member.seed)["init"]
        return {
            "test/accuracy": 0.5 + shift[member.arm] + 0.01 * seed * shift[member.arm]
        }

    sweep = Sweep(base="configs/iris_mlp.py", arms=arms, seeds=3)
    page = page_of(filled(tmp_path, sweep, values)[0])
    found = re.findall(r'strip forest (\w+)"><s></s>.*?<i style="left:([\d.]+)%', page)
    assert [side for side, _ in found] == ["better", "worse"]
    up, down = (float(place) - 50 for _, place in found)
    assert up > 0 > down and up / down == pytest.approx(-2, abs=0.1)


def test_a_sweep_without_finished_runs_has_a_page(tmp_path):
    sweep = Sweep(base="configs/iris_mlp.py", arms={"a": {}}, seeds=2)
    page = page_of(filled(tmp_path, sweep, lambda _: None)[0])
    assert sections_of(page) == ["results", "again"]
    assert "2 missing" in text_of(page)


def test_a_run_whose_metric_is_not_finite_is_shown(tmp_path):
    def values(member):
        is_bad = member.arm == "b" and dict(member.seed)["init"] == 1
        return {"test/accuracy": float("nan") if is_bad else 0.5}

    arms = {"a": {}, "b": {"plan[0].epochs": 2}}
    sweep = Sweep(base="configs/iris_mlp.py", arms=arms, seeds=2)
    folder, wanted = filled(tmp_path, sweep, values)
    write_tables(folder.root, "x", table_of(folder, wanted))
    assert "seed 1 has no finite test/accuracy; left out" in text_of(page_of(folder))
    assert "| b | 2, 1 without a value |" in (tmp_path / "table.md").read_text()
    assert "NaN" not in (tmp_path / "comparisons.json").read_text()


def test_spreads_are_told_where_seeds_vary_one_source_at_a_time(tmp_path):
    def values(member):
        seed = dict(member.seed)
        return {"test/accuracy": 0.5 + 0.02 * seed["init"] + 0.001 * seed["order"]}

    seeds = by_source(3, ("init", "order"))
    sweep = Sweep(base="configs/iris_mlp.py", seeds=seeds)
    page = page_of(filled(tmp_path, sweep, values)[0])
    assert "sources" in sections_of(page)
    text = text_of(page)
    # The deviation of 0, 1, 2 times 2 and 0.1 points.
    assert "base init 2.00 points" in text and "base order 0.10 points" in text


def test_a_search_has_a_slice_for_each_parameter_of_each_branch(tmp_path):
    folder = a_search(tmp_path)
    page = page_of(folder)
    assert sections_of(page) == ["search", "results", "curves", "again"]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles == ["Validation accuracy of each trial", "Optimizer", "Peak lr of sgd",
                      "Peak lr of adam", "Weight decay", "Validation accuracy"]  # fmt: skip
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    figures = dict(zip(titles, page.split("<figure>")[1:]))
    for name in ("sgd", "adam"):
        own = [t for t in wanted.trials.values() if t.params["optimizer"] == name]
        shown = re.findall(r"trial (\d+):", figures[f"Peak lr of {name}"])
        assert sorted(map(int, shown)) == sorted(t.number for t in own)
    assert figures["Optimizer"].count("ended early") == 3
    assert text_of(page).count("1 ended early") == 3


def test_only_arms_that_no_cheaper_one_equals_are_on_the_pareto_front():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (1.0, 0.2), (4.0, 0.9)]
    assert pareto(points, "test/accuracy") == [(1.0, 0.5), (3.0, 0.9)]
    assert pareto(points, "test/loss") == [(1.0, 0.2)]
    rows = [(str(cost), cost, (v, v - 0.1, v + 0.1), "") for cost, v in points[:3]]
    chart = costs_chart(rows, "test/accuracy", "updates", dict.fromkeys("", "c0") | {
        name: "c1" for name, *_ in rows})  # fmt: skip
    front, *others = chart.lines
    assert front.style == "chance" and front.path.count("L") == 3
    assert all(line.path and line.dots for line in others)


def test_slices_of_choices_have_a_place_for_each_option():
    points = [("a", 0.1, "trial 0", False), ("b", 0.2, "trial 1", True)]
    chart = slice_chart(points, "m", "kind", log=None, options=("a", "b", "c"))
    assert [label for _, label in chart.x.ticks] == ["a", "b", "c"]
    early, whole = chart.lines
    assert early.dots and whole.dots
    assert [text for _, text in chart.readings] == [
        "trial 0: a, 0.1000", "trial 1: b, 0.2000, ended early"
    ]  # fmt: skip


def tuned_sweep(**options):
    arms = {"one": {}, "two": {"plan[0].epochs": 2}}
    return Sweep(
        base="configs/iris_mlp.py", arms=arms, seeds=2,
        tune={"plan[0].peak_lr": (0.001, 0.01, 0.1)}, tune_by="validation/accuracy",
        **options,
    )  # fmt: skip


def tuned_values(member):
    rate = member.overrides["plan[0].peak_lr"]
    value = 0.9 if rate == (0.01 if member.arm == "one" else 0.1) else 0.6
    return {"validation/accuracy": value, "test/accuracy": value}


def test_values_that_were_tried_are_shown_and_those_at_an_edge_are_told(tmp_path):
    folder, _ = filled(tmp_path, tuned_sweep(), tuned_values)
    page = page_of(folder)
    text = text_of(page)
    assert "tuning" in sections_of(page)
    assert "one peak_lr 0.001 validation/accuracy 60.0 % one peak_lr 0.01" in text
    assert "one peak_lr 0.01 validation/accuracy 90.0 % chosen" in text
    assert "two peak_lr 0.1 validation/accuracy 90.0 % chosen" in text
    assert "chosen with seed 0, also among the seeds of the results" in text
    note = "plan[0].peak_lr=0.1, the largest of the 3 values tried, was chosen for two;"
    assert note in text and text.count("values tried, was") == 1
    table = table_of(folder, Schedule(folder.sweep).wanted(folder.outcome))
    assert any(note in line for line in write_tables(folder.root, "x", table))
    row = "| one | peak_lr 0.01 | validation/accuracy | 90.0\N{NO-BREAK SPACE}% | chosen |"
    assert row in (tmp_path / "table.md").read_text()


def test_a_page_of_an_unfinished_sweep_says_how_many_runs_have_ended(tmp_path):
    def values(member):
        return None if member.arm == "two" else tuned_values(member)

    text = text_of(page_of(filled(tmp_path / "a", tuned_sweep(), values)[0]))
    # Three tuning runs of each arm, and the second seed of each.
    assert "The sweep is not finished: 4 of at most 8 runs have ended." in text
    done = text_of(page_of(filled(tmp_path / "b", tuned_sweep(), tuned_values)[0]))
    assert "not finished" not in done


def test_curves_of_the_training_split_are_told_to_be_that(tmp_path):
    sweep = Sweep(base="configs/iris_mlp.py", seeds=1)
    folder, wanted = filled(tmp_path, sweep, lambda _: {"test/accuracy": 0.5})
    learning_curve(folder, wanted.members[0], "train/accuracy", [0.1, 0.2, 0.3, 0.4])
    text = text_of(page_of(folder))
    assert "Train accuracy: the mean" in text and "evaluate.every_steps" in text
    learning_curve(folder, wanted.members[0], "validation/accuracy", [0.1, 0.2, 0.3])
    text = text_of(page_of(folder))
    assert "Validation accuracy: the mean" in text
    assert "evaluate.every_steps" not in text


def test_arms_are_shown_by_the_values_that_are_no_defaults(tmp_path):
    arms = {"a": {"plan": plans.full(steps=5, peak_lr=0.2)}, "b": {"plan[0].epochs": 3}}
    sweep = Sweep(base="configs/iris_mlp.py", arms=arms, seeds=1)
    page = page_of(filled(tmp_path, sweep, lambda _: {"test/accuracy": 0.5})[0])
    definition = text_of(page).partition("What arms and cases set")[2]
    assert "a plan[0]." in definition and "plan[0].peak_lr=0.2" in definition
    assert "b plan[0].epochs=3" in definition
    for default in ("accumulate_steps", "clip_norm", "weight_decay"):
        assert default not in page.partition("<main>")[2]


def test_a_chosen_value_is_shown_even_if_it_is_the_default(tmp_path):
    arms = {"a": {"plan": plans.full(steps=5)}}
    rates = {"plan[0].peak_lr": (plans.Phase(steps=5).peak_lr, 0.7)}
    sweep = Sweep(base="configs/iris_mlp.py", arms=arms, seeds=1, tune=rates)
    values = {"test/accuracy": 0.5, "validation/loss": 0.5}
    page = page_of(filled(tmp_path, sweep, lambda _: values)[0])
    assert f"plan[0].peak_lr={rates['plan[0].peak_lr'][0]}" in text_of(page)


def test_the_ends_of_a_strip_of_shares_lie_between_0_and_100_percent(tmp_path):
    def values(member):
        return {"test/accuracy": 1.0 - 0.99 * (dict(member.seed)["init"] == 1)}

    folder, _ = filled(tmp_path, Sweep(base="configs/iris_mlp.py", seeds=2), values)
    ends = re.search(r'<small class="ends">(.*?)</small>', page_of(folder))[1]
    assert text_of(ends) == "0 % 100 %"
