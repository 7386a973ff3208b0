"""Proposals depend on results and numbers alone, and stay in their space."""

import functools
import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.sweeps.search.proposals import (
    Choice,
    Float,
    Int,
    Search,
    Trial,
    proposal,
)
from finetune_jax.sweeps.search.pruning import Median

SPACE = {
    "data.batch_size": Choice((32, 64)),
    "optimizer": Choice(
        {
            "sgd": {
                "plan[0].optimizer": "sgd",
                "plan[0].peak_lr": Float(1e-3, 1, log=True),
                "momentum": Choice(
                    {
                        "none": {},
                        "some": {"plan[0].optimizer_args.momentum": Float(0, 1)},
                    }
                ),
            },
            "adam": {
                "plan[0].optimizer": "adam",
                "plan[0].peak_lr": Float(1e-4, 1e-1, log=True),
            },
        }
    ),
    "plan[0].epochs": Int(1, 30, log=True),
    "plan[0].betas": Choice(((0.9, 0.99), (0.9, 0.999))),
}
RATE = "plan[0].peak_lr"


def search(**changes):
    given = {"space": SPACE, "metric": "validation/accuracy", "trials": 36}
    return Search(**given | changes)


def accuracy(found):
    rate, epochs = found.overrides[RATE], found.overrides["plan[0].epochs"]
    return 1 - (math.log10(rate) + 2) ** 2 / 20 - abs(epochs - 10) / 100


def ended(number, found, value, **changes):
    given = {"params": found.params, "overrides": found.overrides, "value": value}
    return Trial(number=number, **given | changes)


def searched(wanted, shuffled=None, objective=accuracy):
    """Returns the trials of a search whose workers ask and answer in a random order."""
    order, done = random.Random(shuffled), {}
    for first in range(0, wanted.count, wanted.batch):
        numbers = [*range(first, min(first + wanted.batch, wanted.count))]
        if shuffled is not None:
            order.shuffle(numbers)
        known = dict(order.sample([*done.items()], len(done)))
        found = [(number, proposal(wanted, known, number)) for number in numbers]
        if shuffled is not None:
            order.shuffle(found)
        for number, proposed in found:
            value = objective(proposed)
            state = "complete" if value is not None else "failed"
            done[number] = ended(number, proposed, value, state=state)
    return done


@functools.cache
def searched_once(sampler="tpe"):
    return searched(search(sampler=sampler))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_is_the_same_whoever_asks_and_answers_first(sampler):
    other = searched(search(sampler=sampler), shuffled=3)
    assert searched_once(sampler) == dict(sorted(other.items()))
    first = proposal(search(sampler=sampler, seed=1), {}, 0)
    assert first.params != other[0].params


def test_a_proposal_sees_no_trial_of_its_own_batch():
    wanted, done = search(), searched_once()
    known = {number: done[number] for number in wanted.needs(18)}
    assert [*known] == [*range(16)]
    spoilt = done | {n: ended(n, proposal(wanted, done, n), 9.0) for n in (16, 17, 19)}
    assert proposal(wanted, known, 18) == proposal(wanted, spoilt, 18)
    with pytest.raises(ValueError, match=r"needs trials \[15\]"):
        proposal(wanted, {n: known[n] for n in range(15)}, 18)


def test_proposals_of_a_batch_differ():
    done = searched_once()
    assert len({str(trial.params) for trial in done.values()}) == len(done)


def test_values_that_depend_on_no_result_wait_for_none():
    assert search(startup=5).needs(7) == range(0)  # Whole batches: 0 to 7 are random.
    assert search(startup=5).needs(8) == search(startup=5).needs(11) == range(8)
    assert search(sampler="random").needs(30) == range(0)
    assert search(sampler="random", pruner=Median()).needs(30) == range(28)


def test_tpe_finds_better_values_than_random_trials():
    found = {
        sampler: [
            wanted.best(searched(wanted)).value
            for seed in range(1, 4)
            for wanted in [search(sampler=sampler, seed=seed, trials=28)]
        ]
        for sampler in ("tpe", "random")
    }
    assert np.mean(found["tpe"]) > np.mean(found["random"])


def test_a_loss_is_minimised():
    wanted = search(metric="validation/loss")
    done = searched(wanted, objective=lambda found: -accuracy(found))
    turned = searched_once()
    assert [t.params for t in done.values()] == [t.params for t in turned.values()]
    assert wanted.best(done).params == search().best(turned).params


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_conditional_parameters_appear_only_in_their_branch(sampler):
    done = searched_once(sampler)
    seen = set()
    for trial in done.values():
        chosen = trial.params["optimizer"]
        seen.add(chosen)
        assert trial.overrides["plan[0].optimizer"] == chosen
        assert f"optimizer/{chosen}/{RATE}" in trial.params
        others = {"sgd", "adam"} - {chosen}
        assert not any(
            name.startswith(f"optimizer/{o}") for o in others for name in trial.params
        )
        has_momentum = trial.params.get("optimizer/sgd/momentum") == "some"
        assert ("plan[0].optimizer_args.momentum" in trial.overrides) == has_momentum
    assert seen == {"sgd", "adam"}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_values_stay_in_their_ranges_with_their_types_and_four_digits(sampler):
    for trial in searched_once(sampler).values():
        rate = trial.overrides[RATE]
        low, high = (1e-3, 1) if trial.params["optimizer"] == "sgd" else (1e-4, 1e-1)
        assert low <= rate <= high and float(f"{rate:.4g}") == rate
        epochs = trial.overrides["plan[0].epochs"]
        assert type(epochs) is int and 1 <= epochs <= 30
        assert trial.overrides["data.batch_size"] in (32, 64)
        assert trial.overrides["plan[0].betas"] in ((0.9, 0.99), (0.9, 0.999))
        assert type(trial.params["plan[0].betas"]) is str  # Params fit into JSON.


def test_random_whole_numbers_are_uniform_also_at_the_ends():
    wanted = Search(
        space={"a": Int(1, 4), "b": Int(1, 3, log=True)},
        metric="validation/accuracy", sampler="random", trials=4000,
    )  # fmt: skip
    found = [proposal(wanted, {}, number).params for number in range(wanted.count)]
    counts = np.bincount([p["a"] for p in found])[1:] / len(found)
    assert np.abs(counts - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / len(found))
    counts = np.bincount([p["b"] for p in found])[1:] / len(found)
    expected = np.diff(np.log([0.5, 1.5, 2.5, 3.5])) / math.log(7)
    assert np.abs(counts - expected).max() < 4 * math.sqrt(0.25 / len(found))


def test_a_failed_trial_counts_as_worse_than_all_others():
    wanted = search(trials=44)
    done = searched(
        wanted,
        objective=lambda found: (
            None if found.overrides[RATE] > 0.01 else accuracy(found)
        ),
    )
    failed = [number for number in done if done[number].state == "failed"]
    # If failures were left out, only high rates would seem untried: 21 of 24 fail then.
    assert sum(number >= 20 for number in failed) < 12
    assert wanted.best(done).overrides[RATE] <= 0.01
    all_failed = searched(search(trials=16), objective=lambda found: None)
    assert search().best(all_failed) is None


def test_a_value_that_is_not_finite_counts_as_a_failure():
    by_state = [
        searched(
            search(trials=20),
            objective=lambda f, v=value: v if f.overrides[RATE] > 0.1 else accuracy(f),
        )
        for value in (None, math.nan, math.inf)
    ]
    params = [[t.params for t in done.values()] for done in by_state]
    assert params[0] == params[1] == params[2]


def test_pruned_trials_rank_by_how_far_they_came():
    first = searched_once()
    found = []
    for step in (1, 9):
        late = {
            n: ended(
                n, first[n], None, state="pruned", curves={0: {step: 0.5 + n / 50}}
            )
            for n in range(8)
        }
        early = {
            n: ended(n, first[n], None, state="pruned", curves={0: {5: 0.1}})
            for n in range(8, 16)
        }
        found.append(proposal(search(), late | early, 16))
    assert found[0] != found[1]


def test_a_grid_has_every_point_once_in_the_order_of_the_space():
    wanted = Search(
        space={
            "optimizer": Choice(
                {"sgd": {RATE: Choice((0.1, 1.0)), "m": Int(1, 2)}, "none": {}}
            ),
            "fixed": 7,
            "data.batch_size": Choice((32, 64)),
        },
        metric="validation/accuracy", sampler="grid",
    )  # fmt: skip
    assert not wanted.problems() and wanted.count == 10
    found = [proposal(wanted, {}, number) for number in range(wanted.count)]
    sgd = [
        {RATE: rate, "m": m, "fixed": 7, "data.batch_size": size}
        for rate, m, size in itertools.product((0.1, 1.0), (1, 2), (32, 64))
    ]
    none = [{"fixed": 7, "data.batch_size": size} for size in (32, 64)]
    assert [point.overrides for point in found] == sgd + none
    assert found[0].params == {
        "optimizer": "sgd", f"optimizer/sgd/{RATE}": 0.1, "optimizer/sgd/m": 1,
        "data.batch_size": 32,
    }  # fmt: skip


def test_examples_have_every_option_and_both_ends_of_every_range():
    found = search().examples()
    pairs = {(key, value) for example in found for key, value in example.items()}
    for key, entry in SPACE.items():
        if isinstance(entry, Choice) and entry.branches is None:
            assert {(key, option) for option in entry.options} <= pairs
    rates = {v for k, v in pairs if k == RATE}
    assert rates == {1e-3, 1, 1e-4, 1e-1}
    assert {v for k, v in pairs if k.endswith("momentum")} == {0, 1}
    assert {len(example) for example in found} == {5, 6}


def test_all_problems_are_listed_with_their_keys():
    wrong = Search(
        space={
            "a": Float(1.0, 0.5),
            "b": Float(0.0, 1.0, log=True),
            "c": Int(1, 2.5),
            "d": Choice(()),
            "e": Choice((1, True, "x")),
            "f": Choice({"one": {"a": 3, "g": Float(2, 2)}, "two": {}}),
            "h": {"momentum": Float(0, 1)},
            "i": Choice((Float(0, 1), 2)),
            "j": Choice("adam"),
            "k": Choice({"one": 3}),
            "l": Float(0, math.nan),
        },
        metric="test/accuracy", sampler="tpee", trials=0, batch=0, startup=0,
        pruner=Median(startup=0),
    )  # fmt: skip
    assert [str(problem) for problem in wrong.problems()] == [
        "search.space['a']: Float(low=1.0, high=0.5, log=False); empty, low must be below "
        "high",
        "search.space['b']: Float(low=0.0, high=1.0, log=True); low must be above 0 for "
        "log=True",
        "search.space['c']: Int(low=1, high=2.5, log=False); whole numbers are needed",
        "search.space['d']: a choice without options; give at least one",
        "search.space['e']: True twice; keep one",
        "search.space['f']: sets 'a', which the entry 'a' sets too; keep one",
        "search.space['f']['one']['g']: Float(low=2, high=2, log=False); empty, low must "
        "be below high",
        "search.space['h']: a value that contains a space; give the space its own key, "
        "such as 'plan[0].optimizer_args.momentum'",
        "search.space['i']: a space as an option; name the options: {'NAME': {KEY: space}}",
        "search.space['j']: 'adam'; give a tuple of values or a dict of named sets",
        "search.space['k']['one']: a named set is a string with a dict of config keys",
        "search.space['l']: Float(low=0, high=nan, log=False); finite numbers are needed",
        "search.sampler: 'tpee'; possible: tpe, random, grid; did you mean 'tpe'?",
        "search.metric: 'test/accuracy'; trials are chosen on the validation split, as "
        "validation/accuracy",
        "search.trials: 0; at least 1 is needed",
        "search.batch: 0; at least 1 is needed",
        "search.startup: 0; at least 1 is needed",
        "search.pruner.startup: 0; at least 1 is needed",
    ]
    grid = search(sampler="grid")
    assert [str(problem) for problem in grid.problems()] == [
        f"search.space['optimizer']['sgd']['{RATE}']: Float(low=0.001, high=1, log=True); "
        "a grid needs Choice((...))",
        "search.space['optimizer']['sgd']['momentum']['some']"
        "['plan[0].optimizer_args.momentum']: Float(low=0, high=1, log=False); a grid "
        "needs Choice((...))",
        f"search.space['optimizer']['adam']['{RATE}']: Float(low=0.0001, high=0.1, "
        "log=True); a grid needs Choice((...))",
        "search.trials: 36; a grid has a trial at each point: give None",
    ]
    assert [str(p) for p in search(space={}, trials=None).problems()] == [
        "search.space: empty; give at least one key",
        "search.trials: None; give the number of trials",
    ]
    assert not search().problems()


def test_trials_of_another_space_are_refused():
    done = searched_once()
    narrow = dict(SPACE) | {"plan[0].epochs": Int(1, 2)}
    fewer = {key: SPACE[key] for key in ("optimizer", "data.batch_size")}
    for space in (narrow, fewer, dict(SPACE) | {"init.more": Float(0, 1)}):
        with pytest.raises(UserError, match="search.space: trial .* another folder"):
            proposal(search(space=space), done, 12)


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    done = searched_once()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"search.sampler: .*finetune_jax\[search\]"):
        proposal(search(), done, 12)
    assert proposal(search(sampler="random"), {}, 3).params


def test_a_search_is_defined_without_jax_and_without_optuna():
    code = (
        "import sys, finetune_jax.sweeps.search\n"
        "sys.exit(bool({'jax', 'optuna'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
