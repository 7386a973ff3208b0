"""A head that is kept has the data's labels."""

import json

import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.weights.metadata.labels import check_labels, labels_beside

NAMES = ("cat", "dog", "fox")
FILES = (
    ("config.json", {"id2label": {str(n): name for n, name in enumerate(NAMES)}}),
    ("config.json", {"pretrained_cfg": {"label_names": list(NAMES)}}),
    ("config.json", {"label_names": list(NAMES)}),
    ("model.json", {"labels": list(NAMES)}),
)


def weights(folder, name="config.json", values=FILES[0][1]):
    (folder / name).write_text(json.dumps(values))
    return f"file:{folder}/model.safetensors"


@pytest.mark.parametrize("name, values", FILES)
def test_labels_of_every_publisher_are_found(name, values, tmp_path):
    assert labels_beside(weights(tmp_path, name, values)) == NAMES


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id2label": {"7": "a"}}'])
def test_files_without_labels_have_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert labels_beside(f"file:{tmp_path}/model.safetensors") == ()


def test_other_labels_and_another_order_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        check_labels(weights(tmp_path), ("dog", "cat", "foxes"))
    text = str(error.value)
    assert "has the labels cat, dog, fox" in text
    assert "'dog': label 0 of the data, but 1 of the weights" in text
    assert "'foxes': not a label of the weights; did you mean 'fox'?" in text
    assert "config.init.fresh=('head/.*',)" in text


def test_the_same_labels_fewer_of_them_and_other_names_are_let_be(tmp_path):
    address = weights(tmp_path)
    check_labels(address, NAMES)
    check_labels(address, NAMES[:2])
    check_labels(address, ("0", "1"))
    check_labels("file:nowhere/model.safetensors", NAMES)
