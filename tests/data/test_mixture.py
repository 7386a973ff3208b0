"""Several data sets: what an update takes of each, and what it does not get to see."""

import mixtures
import numpy as np
import pytest

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest
from finetune_jax.data import source as sources
from finetune_jax.data.domains import mixed_batches
from finetune_jax.data.sources import digits
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.training.setup import make_setup

DIGITS = {"domain": "digits", "name": "digits"}
TARGET = {**mixtures.INVERTED, "labelled": False}


def batches(config, count=3):
    train = run_data(config).train
    return list(
        mixed_batches(train, seed=config.seed, micro_batches=1, updates=range(count))
    )


def test_the_examples_of_a_domain_depend_on_no_other_domain():
    both = batches(mixtures.config(DIGITS, mixtures.INVERTED))
    alone = batches(mixtures.config(mixtures.INVERTED, data={"batch_size": 8}))
    for one, other in zip(both, alone):
        for name, array in one["inverted"].items():
            np.testing.assert_array_equal(array, other["inverted"][name])
    positions = both[0]["digits"]["label"], both[0]["inverted"]["label"]
    assert not np.array_equal(*positions)  # Nor do they have the same order.


def test_an_update_is_that_of_its_number_wherever_a_run_begins():
    config = mixtures.config(DIGITS, mixtures.INVERTED)
    train = run_data(config).train
    (third,) = mixed_batches(train, seed=0, micro_batches=2, updates=range(2, 3))
    straight = batches(config)[2]
    for domain in third:
        for name, array in third[domain].items():
            whole = straight[domain][name][0]
            np.testing.assert_array_equal(array.reshape(whole.shape), whole)


@pytest.mark.parametrize(
    ("data", "weights", "wanted"),
    [
        ({}, (1.0, 3.0), {"digits": 4, "iris": 12}),
        ({"mixing": "size"}, (1.0, 1.0), {"digits": 15, "iris": 1}),
        (
            {"mixing": "size", "mixing_temperature": 1e9},
            (1.0, 1.0),
            {"digits": 8, "iris": 8},
        ),
    ],
)
def test_shares_of_an_update_are_by_weights_or_by_size(data, weights, wanted):
    iris = {"domain": "iris", "name": "digits", "train": "train[:70]"}
    entries = [{**e, "weight": w} for e, w in zip((DIGITS, iris), weights)]
    (batch,) = batches(mixtures.config(*entries, data=data), 1)
    assert {name: part["label"].size for name, part in batch.items()} == wanted


def test_domains_take_turns():
    config = mixtures.config(DIGITS, mixtures.INVERTED, data={"mixing": "round_robin"})
    found = batches(config, 4)
    assert [list(batch) for batch in found] == [["digits"], ["inverted"]] * 2
    alone = batches(mixtures.config(DIGITS), 2)
    for one, other in zip(found[::2], alone):
        np.testing.assert_array_equal(
            one["digits"]["inputs"], other["digits"]["inputs"]
        )


def test_labels_that_training_may_not_know_cannot_leak(monkeypatch):
    """Labels of the target permuted: the same updates, to the bit; other measurements."""
    config = mixtures.config(
        {**DIGITS, "stratified": False}, TARGET,
        task="domain_adapt", method="self_training",
        threshold=0.1,
    )  # fmt: skip
    whole, load = digits.load(), digits.load
    (batch,) = batches(config, 1)
    assert set(batch["inverted"]) == {"inputs", "weight", "position"}
    before, _ = mixtures.trained(config)
    test_before = run_data(config).held_out["test"].parts["inverted"].label

    def permuted(directory=None, argument=None):
        source = load(directory, argument)
        examples = source.splits["all"]
        label = np.random.default_rng(0).permutation(examples.label)
        changed = sources.ArrayExamples(values=examples.values, label=label)
        return sources.Source(
            name=source.name,
            splits={"all": changed},
            class_names=source.class_names,
            fingerprint=source.fingerprint,
        )

    calls = iter([lambda *a: whole, permuted])
    monkeypatch.setattr(digits, "load", lambda *a: next(calls)(*a))
    after, _ = mixtures.trained(config)
    assert digest(mixtures.host(before.state)) == digest(mixtures.host(after.state))
    calls = iter([lambda *a: whole, permuted])
    test_after = run_data(config).held_out["test"].parts["inverted"].label
    assert not np.array_equal(test_before, test_after)


@pytest.mark.parametrize(
    ("domains", "data", "message"),
    [
        ((DIGITS, DIGITS), {}, "'digits' twice"),
        (({**DIGITS, "weight": 0.0},), {}, "all weights are 0"),
        (({**DIGITS, "domain": "test"},), {}, "names other things"),
        (({**DIGITS, "domain": "Digits 1"},), {}, "a-z, 0-9"),
        (({**DIGITS, "train": "train[:0]"},), {}, r"domains\[0\].train: .* is empty"),
        (
            (DIGITS, {**mixtures.INVERTED, "validation": "train[:5]"}),
            {"validation": None},
            "digits without validation",
        ),
        ((DIGITS, {**TARGET, "per_class": 3}), {}, r"\[1\].per_class: 3, but labelled"),
        ((DIGITS, {**TARGET, "sampling": "balanced"}), {}, "'balanced', but labelled"),
        ((DIGITS, TARGET), {"mixing": "round_robin"}, "no update has examples"),
        (({**DIGITS, "shift": (("turn", 1),)},), {}, "is no step"),
        (
            (DIGITS, {**mixtures.INVERTED, "weight": 1e-3}),
            {},
            "of inverted an update of 16 would have no example",
        ),
    ],
)
def test_domains_that_cannot_be_are_refused_by_name(domains, data, message):
    with pytest.raises(UserError, match=message):
        run_data(mixtures.config(*domains, data=data))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("weight", -1.0, "at least 0"), ("sampling", "often", "not one of")],
)
def test_values_of_a_domain_out_of_range_are_refused_by_key(key, value, message):
    given = configs.default()
    given.data.domains = ({**DIGITS, key: value},)
    _, (problem,) = configs.resolve(given)
    assert str(problem).startswith(f"config.data.domains[0].{key}: ")
    assert message in str(problem)


def test_without_domains_there_is_nothing_to_mix():
    for key, value in (("mixing", "size"), ("mixing_temperature", "2.0")):
        config = mixtures.config(overrides=[(f"data.{key}", value)])
        with pytest.raises(UserError, match=f"config.data.{key}: .* nothing to mix"):
            run_data(config)


def test_what_needs_one_data_set_is_refused():
    config = mixtures.config(
        DIGITS, overrides=[("evaluate.cka", "10"), ("init.schemes", "()")]
    )
    with pytest.raises(
        UserError, match="config.evaluate.cka: not with config.data.dom"
    ):
        make_setup(config)


def test_a_target_has_no_say_in_what_is_best():
    config = mixtures.config(
        DIGITS, TARGET, task="domain_adapt",
        overrides=[("evaluate.best", "validation/inverted/accuracy")],
    )  # fmt: skip
    with pytest.raises(UserError, match="validation/digits/accuracy"):
        make_setup(config)
