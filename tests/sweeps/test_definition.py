"""Definitions of sweeps: arms, cases, seeds, and the configs and hashes of members."""

import itertools

import pytest

from finetune_jax import config as configs
from finetune_jax import sweeps
from finetune_jax.core.errors import UserError
from finetune_jax.plans import Phase, as_config, head_only
from finetune_jax.sweeps.definition import definition_problems, load
from finetune_jax.sweeps.members import Members, member_key
from finetune_jax.sweeps.schedule import check

IRIS = "configs/iris_mlp.py"


def member(sweep, arm, case="", seed=0, tuned=()):
    seeds = sweep.all_seeds
    return Members(sweep).final(arm, case, seeds[seed], dict(tuned), "final")


def test_a_member_has_the_config_of_the_command_line():
    arms = {"fast": {"plan[0].peak_lr": 0.5, "model.hidden": (8, 8)}}
    found = member(sweeps.Sweep(base=IRIS, arms=arms, seeds=2), "fast", seed=1)
    texts = [("plan[0].peak_lr", "0.5"), ("model.hidden", "(8, 8)"), ("seed", "1")]
    config, problems = configs.resolve(configs.load(IRIS), texts)
    assert not problems
    assert configs.to_json(found.config) == configs.to_json(config)
    assert found.key == member_key(config)


def test_arms_differ_in_plan_section_and_whole_config():
    phases = (Phase(name="a", steps=3), Phase(name="b", steps=4))
    other = configs.load("configs/resnet_head.py")
    sweep = sweeps.Sweep(
        base=IRIS,
        arms={
            "phases": {"plan": phases},
            "dicts": {"plan": as_config(phases)},
            "section": {"evaluate": {"batch_size": 7}, "data.train": "train[:50]"},
            "config": other,
            "address": sweeps.Arm(base="configs/resnet_head.py:tiny"),
        },
        seeds=1,
    )
    one, two = member(sweep, "phases"), member(sweep, "dicts")
    assert [phase.name for phase in one.config.plan] == ["a", "b"]
    assert one.key == two.key  # As strategies return plans.
    section = member(sweep, "section").config
    assert section.evaluate.batch_size == 7 and section.data.train == "train[:50]"
    assert member(sweep, "config").config.model.name == "resnet20"
    assert member(sweep, "address").config.plan[0].steps == 2


def test_keys_depend_on_what_results_depend_on_alone():
    def key(**overrides):
        arms = {"one": {k.replace("__", "."): v for k, v in overrides.items()}}
        return member(sweeps.Sweep(base=IRIS, arms=arms, seeds=1), "one").key

    same = [key(), key(report__every_steps=3), key(data__cache="off")]
    assert len(set(same)) == 1
    others = [key(data__batch_size=7), key(plan=head_only(steps=2))]
    assert len({same[0], *others}) == 3


def test_a_seed_of_each_source_is_the_seed_of_all():
    dicts = [{"init": 1, "order": 1, "augmentation": 1, "dropout": 1}, {"init": 2}]
    sweep = sweeps.Sweep(base=IRIS, seeds=dicts)
    plain = sweeps.Sweep(base=IRIS, seeds=(1,))
    assert member(sweep, "base").key == member(plain, "base").key
    assert member(sweep, "base", seed=1).config.seed.init == 2


def test_sources_have_keys_that_do_not_depend_on_the_folder(tmp_path):
    sweep = sweeps.Sweep(
        base=IRIS,
        arms={"tuned": {"init.pretrained": "sweep:long"}, "scratch": {}},
        sources={"long": sweeps.Source(overrides={"plan[0].epochs": 9}, by_seed=True)},
        seeds=2,
    )
    found = [member(sweep, "tuned", seed=seed) for seed in (0, 1)]
    assert [len(one.needs) for one in found] == [1, 1]
    assert found[0].needs != found[1].needs
    place = found[0].runnable(tmp_path).init.pretrained
    assert place == f"orbax:{tmp_path / found[0].needs[0]}"
    one = sweeps.Sweep(**{**vars_of(sweep), "sources": {"long": sweeps.Source()}})
    shared = [member(one, "tuned", seed=seed).needs for seed in (0, 1)]
    assert shared[0] == shared[1]


def test_sources_that_need_each_other_are_refused():
    sources = {
        name: sweeps.Source(overrides={"init.pretrained": f"sweep:{other}"})
        for name, other in (("x", "y"), ("y", "z"), ("z", "y"))
    }
    sweep = sweeps.Sweep(base=IRIS, sources=sources)
    with pytest.raises(
        UserError, match="y -> z -> y: a source cannot start from itself"
    ):
        Members(sweep).source("x", sweep.all_seeds[0])


def vars_of(sweep):
    return {name: getattr(sweep, name) for name in sweep.__dataclass_fields__}


def test_grids_name_their_arms():
    arms = sweeps.grid({"plan[0].peak_lr": (0.1, 1.0), "data.batch_size": (5,)})
    names = list(sweeps.Sweep(base=IRIS, arms=arms).all_arms)
    assert names == ["peak_lr=0.1, batch_size=5", "peak_lr=1.0, batch_size=5"]


def test_all_mistakes_of_a_definition_are_told_at_once():
    sweep = sweeps.Sweep(
        base=IRIS,
        arms={"one": {}, "two": {"plan[0].peak_lr": 0.3}},
        baseline="on",
        seeds=(0, 1, 0),
        tune={"plan[0].peak_lr": ()},
        tune_by="loss",
        tune_seeds=7,
        tune_case="x",
        keep="some",
        attempts=0,
    )
    text = "\n".join(map(str, definition_problems(sweep)))
    for words in (
        "baseline: no arm 'on'", "did you mean 'one'", "twice", "tune_seeds: 7",
        "tune_case: no case 'x'", "keep: 'some'", "attempts: 0", "give a tuple",
    ):  # fmt: skip
        assert words in text


def search(**keys):
    given = {"space": {}, "metric": "validation/accuracy", **keys}
    return sweeps.Search(**given)


RATES = {"plan[0].peak_lr": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"arms": 3}, "a dict of names and overrides"),
        ({"arms": {"one": 3}}, "a dict of names and overrides"),
        ({"seeds": "3"}, "a number, or a sequence"),
        ({"seeds": [{"ordr": 1}]}, "a number, or a sequence"),
        ({"seeds": 0}, "give a number of seeds"),
        ({"cases": {}}, "a dict of names and overrides"),
        ({"sources": {"x": {}}}, "sweeps.Source"),
        ({"tune": {"plan[0].peak_lr": 0.1}}, "0.1; a tuple of values or a dict"),
        ({"tune": {"plan[0].peak_lr": "0.1"}}, "'0.1'; a tuple of values or a dict"),
        ({"arms": {"a/b": {}, "a_b": {}}}, "arm 'a/b' and arm 'a_b' would share"),
        ({"cases": {"x?": {}, "x!": {}}}, "case 'x?' and case 'x!' would share"),
        ({"sources": {"a": sweeps.Source()}, "arms": {"a": {}}}, "source 'a' would"),
        ({"arms": {"a\nb": {}}}, "arm 'a\\nb': a name is one line"),
        ({"cases": {"a\x1b": {}}}, "case 'a\\x1b': a name is one line"),
        ({"arms": ()}, "a dict of names and overrides"),
        ({"arms": sweeps.grid({"plan[0].peak_lr": ()})}, "a dict of names"),
        ({"arms": {1: {}}}, "a dict of names and overrides"),
        ({"arms": {"a": {3: 1}}}, "a dict of names and overrides"),
        ({"arms": {"a": sweeps.Arm(overrides=None)}}, "arms['a'].overrides: None"),
        ({"arms": {"a": sweeps.Arm(tune=["x"])}}, "arms['a'].tune: ['x']"),
        ({"cases": {"a": {3: 1}}}, "Sweep.cases['a'][3], the key: 3; a string"),
        ({"sources": ["a"]}, "Sweep.sources: ['a']; a dict"),
        ({"sources": {"a": sweeps.Source(by_seed=1)}}, "True or False"),
        ({"tune": ["plan"]}, "Sweep.tune: ['plan']; a dict"),
        ({"attempts": "2"}, "Sweep.attempts: '2'; an integer"),
        ({"attempts": True}, "Sweep.attempts: True; an integer"),
        ({"threads": "2"}, "Sweep.threads: '2'; an integer or None"),
        ({"claim_timeout_s": None}, "Sweep.claim_timeout_s: None; a number"),
        ({"tune_seeds": None}, "Sweep.tune_seeds: None; an integer"),
        ({"metric": None}, "Sweep.metric: None; a string"),
        ({"pages": "no"}, "Sweep.pages: 'no'; True or False"),
        ({"command": 3}, "Sweep.command: 3; a string or None"),
        ({"slurm": ["gpu"]}, "Sweep.slurm: ['gpu']; a dict"),
        ({"search": {"space": {}}}, "sweeps.Search or None is needed"),
        ({"search": search(metric=None)}, "Sweep.search.metric: None; a string"),
        ({"search": search(trials="3")}, "Sweep.search.trials: '3'; an integer"),
        ({"search": search(space=["x"])}, "Sweep.search.space: ['x']; a dict"),
        ({"search": search(pruner="median")}, "'median'; sweeps.Median or sweeps.W"),
        (
            {"search": search(pruner=sweeps.Median(startup="5"))},
            "Sweep.search.pruner.startup: '5'; an integer",
        ),
        ({"tune_by": "test/accuracy", "tune": RATES}, "values are chosen on the valid"),
        ({"tune_by": "validation/accuracy"}, "but nothing is tuned"),
    ],
)
def test_a_definition_of_another_form_is_refused(keys, words):
    problems = definition_problems(sweeps.Sweep(base=IRIS, **keys))
    assert any(words in str(problem) for problem in problems)


def test_arms_with_the_same_config_are_named():
    arms = {"one": {"plan[0].peak_lr": 0.1}, "two": {}, "same": {"plan": None}}
    del arms["same"]
    arms["same"] = {"plan[0].peak_lr": 0.1}
    with pytest.raises(UserError, match="'same' has the same config as 'one'"):
        check(sweeps.Sweep(base=IRIS, arms=arms))
    arms = {
        "one": sweeps.Arm(tune={"plan[0].peak_lr": (0.1, 0.2)}),
        "two": sweeps.Arm(tune={"plan[0].peak_lr": (0.2, 0.1)}),
    }
    with pytest.raises(UserError, match="'two' has the same config as 'one'"):
        check(sweeps.Sweep(base=IRIS, arms=arms))


def test_a_source_that_no_run_starts_from_is_refused():
    arms = {"tuned": {"init.pretrained": "sweep:long"}}
    sources = {
        "long": sweeps.Source(overrides={"init.pretrained": "sweep:first"}),
        "first": sweeps.Source(overrides={"plan[0].epochs": 2}),
        "other": sweeps.Source(overrides={"plan[0].epochs": 3}),
    }
    with pytest.raises(UserError, match="'other': no run starts from it") as caught:
        check(sweeps.Sweep(base=IRIS, arms=arms, sources=sources))
    assert len(caught.value.problems) == 1


def test_wrong_configs_of_all_arms_are_told_at_once():
    arms = {
        "typo": {"plan[0].peak": 0.1},
        "entry": {"plan[3].peak_lr": 0.1},
        "value": {"data.batch_size": -1},
        "source": {"init.pretrained": "sweep:none"},
        "seed": {"seed.order": 3},
        "many": {"population": (((("seed", 1),)),)},
    }
    with pytest.raises(UserError) as caught:
        check(sweeps.Sweep(base=IRIS, arms=arms, keep="some"))
    text = str(caught.value)
    for words in (
        "Sweep.keep: 'some'", "'typo'", "config.plan[0].peak: unknown", "'entry'",
        "no entry 3",
        "config.data.batch_size: -1", "no source 'none'", "config.population",
        "config.seed.order: 3; `seeds` of the sweep",
    ):  # fmt: skip
        assert words in text


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.py").write_text(text)
    return folder / "sweep.py"


def test_a_file_gives_the_sweep_and_its_name(tmp_path):
    head = "from finetune_jax import sweeps\n"
    body = (
        f"def get_sweep(arg='a'):\n    return sweeps.Sweep(base='{IRIS}', metric=arg)\n"
    )
    path = write(tmp_path / "mine", head + body)
    sweep, name = load(f"{path}:test/loss")
    assert (sweep.metric, name) == ("test/loss", "mine-test_loss")
    assert load(str(path))[1] == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "no function get_sweep"),
        ("import sys; sys.exit(3)", r"SystemExit: 3 \(.*sweep.py, line 1\)"),
        ("\ndef get_sweep(): return dict(a=1)['b']", r"KeyError: 'b' \(.*, line 2\)"),
        ("def get_sweep(): return 3", "returned a <class 'int'>"),
        ("def get_sweep(): return 1 / 0", "ZeroDivisionError"),
        ("import nothing_there", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_gives_no_sweep_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load(str(write(tmp_path, text)))
    with pytest.raises(UserError, match="did you mean"):
        load(str(tmp_path / "swep.py"))


def test_seeds_by_source_vary_one_source_at_a_time():
    found = sweeps.by_source(3, ("init", "order"))
    assert len(found) == 5
    for one, other in itertools.pairwise(found[:3]):
        assert one["order"] == other["order"] == 0 and one["init"] != other["init"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"cases": {"c": {"plan[0].steps": 3}}},
            "config.plan[0].steps: is also set by",
        ),
        ({"tune": {"plan": {"x": head_only(steps=2)}}}, "is also set by tune"),
        ({"cases": {"c": {"data": {"batch_size": 5}}}}, "config.data.batch_size"),
    ],
)
def test_overrides_that_others_would_replace_are_refused(keys, words):
    arms = {"a": {"plan": head_only(steps=2), "data.batch_size": 10}}
    with pytest.raises(UserError) as caught:
        check(sweeps.Sweep(base=IRIS, arms=arms, **keys))
    assert words in str(caught.value)
    # A refinement loses nothing.
    check(sweeps.Sweep(base=IRIS, arms=arms, tune={"plan[0].peak_lr": (0.1, 0.2)}))


def test_overrides_of_a_phase_that_those_of_every_phase_replace_are_refused():
    one, every = {"plan[0].peak_lr": 0.3}, {"plan[*].peak_lr": 0.2}

    def refused(**keys):
        with pytest.raises(UserError, match="is also set by .*; leave one of them out"):
            check(sweeps.Sweep(base=IRIS, **keys))

    refused(cases={"c": one}, arms={"a": every})
    refused(cases={"c": every}, arms={"a": one})
    refused(arms={"a": one | every})
    refused(arms={"a": one | {"plan": head_only(steps=2)}})
    # Every phase, then another value for one of them.
    check(sweeps.Sweep(base=IRIS, arms={"a": every | one}))
