"""Data that is read again has its classes in the order that the run began with."""

import dataclasses

import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.data.class_order import in_order_of_run
from finetune_jax.training.initial.starting_state import run_data


def data_of():
    return run_data(small.config())


def names_of(data, dataset):
    return [data.spec.class_names[place] for place in dataset.label]


def test_labels_and_counts_follow_the_order_of_the_run():
    data = data_of()
    wanted = tuple(reversed(data.spec.class_names))
    found = in_order_of_run(data, {"class_names": list(wanted)})
    assert found.spec.class_names == wanted
    assert found.spec.train_counts == data.spec.train_counts[::-1]
    assert names_of(found, found.train) == names_of(data, data.train)
    assert found.train.label.dtype == np.int32
    for split, part in found.held_out.items():
        assert names_of(found, part) == names_of(data, data.held_out[split])


def test_a_manifest_that_names_the_same_classes_or_none_changes_nothing():
    data = data_of()
    for looks in ({}, {"class_names": None}, {"class_names": data.spec.class_names}):
        assert in_order_of_run(data, looks) is data


def test_other_classes_than_those_of_the_run_are_refused_by_name():
    data = data_of()
    wanted = [*data.spec.class_names[:-1], "nine"]
    with pytest.raises(UserError, match="'9' is not a class of the run.*'nine' is not"):
        in_order_of_run(data, {"class_names": wanted})


def test_places_of_texts_without_a_tag_stay_without_one():
    data = data_of()
    label = np.array([[0, -1, 9], [-1, 3, -1]], np.int32)
    data = dataclasses.replace(
        data, train=dataclasses.replace(data.train, label=label), held_out={}
    )
    found = in_order_of_run(data, {"class_names": list(map(str, range(9, -1, -1)))})
    assert found.train.label.tolist() == [[9, -1, 0], [-1, 6, -1]]


def test_every_domain_has_the_order_that_it_had():
    given = small.editable(small.config())
    given.data.domains = tuple({"domain": name} for name in "ab")
    config = small.resolved(given)
    data = run_data(config)
    wanted = tuple(reversed(data.spec.domains["b"].class_names))
    looks = {"domains": {"b": {"class_names": list(wanted)}}}
    found = in_order_of_run(data, looks)
    assert found.spec.domains["b"].class_names == wanted
    assert found.spec.domains["a"] == data.spec.domains["a"]
    own, before = found.train.parts["b"], data.train.parts["b"]
    assert (own.label == 9 - before.label).all()
    assert (found.train.parts["a"].label == data.train.parts["a"].label).all()
