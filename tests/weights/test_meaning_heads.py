"""Classes and networks that weight files and files beside them name."""

import json

import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.tasks.components.teachers import make_teachers
from finetune_jax.training.initial.starting_state import told_of
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.formats.contents import listed_classes
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.labels import labels_beside

NAMES = ("ant", "bee", "cat")
PLACES = {name: place for place, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("top", "wanted"),
    [
        ({"class_to_idx": PLACES}, NAMES),
        ({"idx_to_class": {"2": "cat", "0": "ant", "1": "bee"}}, NAMES),
        ({"id2label": {"0": "ant", "1": "bee", "2": "cat"}}, NAMES),
        ({"label_map": PLACES}, NAMES),
        ({"hyper_parameters": {"class_names": list(NAMES)}}, NAMES),
        ({"meta": {"dataset_meta": {"CLASSES": NAMES}}}, NAMES),
        ({"meta": {"epoch": 3}, "dataset_meta": {"classes": NAMES}}, NAMES),
        ({"class_to_idx": {"ant": 1, "bee": 2}}, ()),  # Which logit is the first?
        ({"class_to_idx": {"ant": "x", "bee": "y"}}, ()),
        ({"idx_to_class": {"a": "b"}}, ()),
        ({"meta": {"meta": {"meta": {"classes": NAMES}}}}, NAMES),
        ([], ()),
    ],
)
def test_class_names_of_a_checkpoint_are_found_where_programs_write_them(top, wanted):
    assert listed_classes(top) == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"label_names": NAMES, "pretrained_cfg": {"mean": [0.5]}},
        {"pretrained_cfg": {"label_names": NAMES}},
        {"label_names": NAMES},
        {"id2label": list(NAMES)},
        {"label2id": PLACES},
        {"label2id": {name: str(place) for name, place in PLACES.items()}},
        {"id2label": {"2": "cat", "0": "ant", "1": "bee"}, "label2id": {"x": 9}},
    ],
)
def test_class_names_beside_weights_are_found_in_every_form(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert labels_beside(f"file:{tmp_path}/w.safetensors") == NAMES


@pytest.mark.parametrize(
    "values", [{"label2id": {"a": 1, "b": 2}}, {"id2label": {"1": "a"}}, [], "x"]
)
def test_labels_that_cannot_be_placed_are_unknown(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert labels_beside(f"file:{tmp_path}/w.safetensors") == ()
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    assert labels_beside(f"file:{tmp_path}/w.safetensors") == ()


def described(name, tmp_path, **arguments):
    address = f"file:{tmp_path}/w.pth"
    return architecture.Described(
        "config.model", "", {"name": name, **arguments}, address
    )


def test_the_network_that_a_checkpoint_names_is_compared_with_the_model(tmp_path):
    resnet = described("resnet18", tmp_path)
    assert architecture.named(resnet, "resnet18", ()) == []
    assert architecture.named(resnet, "", ()) is None
    for other in ("resnetblur18", "my_net", "resnet34"):
        (line,) = architecture.named(resnet, other, ()) or [""]
        assert f"arch={other!r}, which is not known to be resnet18" in line
    lite = described("efficientnet_lite0", tmp_path)
    assert architecture.named(lite, "tf_efficientnet_lite0", ()) == []
    with pytest.raises(UserError, match="config.model.padding='symmetric'"):
        architecture.named(lite, "efficientnet_lite0", ())
    given = {"padding": "symmetric", "epsilon": 1e-5}
    lite = described("efficientnet_lite0", tmp_path, **given)
    assert architecture.named(lite, "efficientnet_lite0", ()) == []
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert architecture.named(resnet, "resnetblur18", ()) is None


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "relu", "num_attention_heads": 6},
        {"num_attention_heads": 6, "hidden_act": "relu", "vocab_size": 9},
    ],
)
def test_a_file_of_an_older_transformers_is_read_without_its_kind(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    fields = architecture.read({"name": "bert_base"}, f"file:{tmp_path}/w.bin")
    assert fields is not None
    assert fields.arguments["hidden_activation"] == "relu"
    assert fields.arguments["heads"] == 6 and not fields.refusals


def test_accepted_integers_are_told():
    tensors = {"a": np.zeros(3, np.uint8), "count": np.array(3), "b": np.zeros(2)}
    weights = Weights(address="file:w", tensors=tensors, sha256={})
    (line, _) = told_of(weights, "float64", ("integer",))[::-1] + [""]
    assert "1 tensors of integers are taken as they are: a" in line
    assert told_of(weights, "float64") == []


def test_a_head_with_more_logits_says_how_it_is_kept():
    own = {"params": {"head": {"logits": {"kernel": np.zeros((4, 3))}}}}
    tensors = {"params/head/logits/kernel": np.zeros((4, 5))}
    weights = Weights(address="file:w", tensors=tensors, sha256={})
    with pytest.raises(UserError, match="config.model.classes=5 keeps all logits"):
        load_weights(own, weights)


def teachers(tmp_path, labels, data_names):
    about = {} if labels is None else {"labels": labels}
    (tmp_path / "model.json").write_text(json.dumps(about))
    member = {
        "name": "mlp", "hidden": (4,), "head": {}, "classes": 3, "entry": None,
        "pretrained": f"file:{tmp_path}/w.npz",
    }  # fmt: skip
    found = make_teachers(
        {"old": member}, data_names=tuple(data_names), precision="float32"
    )
    return found["old"]


def test_a_teacher_from_a_file_is_of_the_classes_beside_it(tmp_path):
    from finetune_jax.tasks.components.teachers import class_problems

    other = teachers(tmp_path, ["v", "w", "x"], NAMES)
    (problem,) = class_problems(other, NAMES)
    assert "a teacher of other classes" in problem
    same = teachers(tmp_path, ["Cat", "bee", "ant"], NAMES)
    assert not class_problems(same, NAMES)
    assert same.order(NAMES).tolist() == [2, 1, 0]
    assert teachers(tmp_path, ["v", "w", "x"], "012").class_names is None


def test_a_teacher_of_unknown_classes_is_told(tmp_path):
    unknown = teachers(tmp_path, None, NAMES)
    leaves = unknown.shapes((12, 12, 1))
    flat = {
        f"params/{stage}/{name}/{leaf}": np.zeros(array.shape, np.float32)
        for stage, modules in leaves["params"].items()
        for name, arrays in modules.items()
        for leaf, array in arrays.items()
    }
    np.savez(tmp_path / "w.npz", **flat)
    layout, (line, *_) = unknown.layout((12, 12, 1), NAMES)
    assert layout == "finetune_jax"
    assert "are taken in order for ant, bee, cat" in line
    known = teachers(tmp_path, NAMES, NAMES)
    assert "taken in order" not in known.layout((12, 12, 1), NAMES)[1][0]


def test_tasks_without_teachers_have_no_such_lines():
    setup = make_setup(small.config(model="mlp", hidden=(4,)))
    assert setup.task.teachers is None
