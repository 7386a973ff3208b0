"""Tensor parallelism by the ready rules: the same training as on one device."""

import functools
import re

import jax
import numpy as np
import pytest
import small
import text_configs
import texts
from devices import asked, assert_close, batches, trained

from finetune_jax.core.errors import UserError
from finetune_jax.models import vit
from finetune_jax.parallel.make import for_parameters, make_devices
from finetune_jax.parallel.sharding import TENSOR_PARALLEL, spec_of
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import shapes_of
from finetune_jax.training.setup import make_setup

UPDATES = 20
FLOAT64 = [("precision", "float64")]
# Not Adam: it would make whole steps of the rounding errors of keys' biases, whose
# gradient is zero.
SGD = Phase(
    name="all", steps=UPDATES, optimizer="sgd", optimizer_args={"momentum": 0.9},
    clip_norm=1.0,
)  # fmt: skip


def assert_same_training(task, steps, **parallel):
    """Trains on one device and on eight, and compares states, losses and logits."""
    (state, losses, logits), (ours, our_losses, our_logits) = (
        trained(given, task, SGD, steps) for given in ({"devices": 1}, parallel)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("f8")}
    assert_close(ours.params, state.params, 1e-10)
    assert_close(ours.opt_state, state.opt_state, 1e-10)
    np.testing.assert_allclose(our_logits, logits, rtol=1e-9, atol=1e-9)
    for mine, other in zip(our_losses, losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-9)


@pytest.fixture
def small_vit(monkeypatch):
    make = functools.partial(vit._vit, vit.Shape(16, 1, 4, 4), heads=4)
    monkeypatch.setitem(vit.MODELS, "vit_tiny_patch16", make)


@pytest.mark.slow
def test_a_vit_over_all_three_axes_is_trained_as_on_one_device(small_vit):
    with jax.enable_x64(True):
        task = small.task("vit_tiny_patch16", (8, 8, 1), FLOAT64)
        rules = TENSOR_PARALLEL["vit"]
        steps = batches(UPDATES)
        assert_same_training(task, steps, fsdp=2, model=2, sharding=rules)


@pytest.mark.exhaustive
def test_a_bert_over_four_devices_of_model_is_trained_as_on_one_device(tmp_path):
    folder = texts.write(tmp_path)
    with jax.enable_x64(True):
        given = text_configs.config(
            folder, model={"heads": 4, "layers": 1}, overrides=FLOAT64
        )
        setup = make_setup(given)
        rng, steps = np.random.default_rng(0), []
        for _ in range(UPDATES):
            batch = setup.data.train.take(rng.integers(0, 40, 16))
            batch["position"] = np.arange(16, dtype=np.int32)
            steps.append(jax.tree.map(lambda x: x[None], batch))
        rules = TENSOR_PARALLEL["bert"]
        assert_same_training(setup.task, steps, model=4, sharding=rules)


def test_activations_stay_divided_by_example_where_parameters_are_divided(small_vit):
    task = small.task("vit_tiny_patch16", (8, 8, 1))
    devices = make_devices(asked(fsdp=8))
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), shapes_of(task, "vit").params
    )
    devices = for_parameters(devices, params, {})
    images = np.zeros((8, 8, 8, 1), np.float32)
    placed = devices.place(params), devices.place_batch(images, batch_axis=0)

    def logits(params, images):
        return task.models[""].apply({"params": params}, images, train=False)

    text = devices.over_devices(logits).lower(*placed).compile().as_text()
    made = re.findall(r"(\S+) (all-gather|all-reduce|all-to-all|dot)\(", text)
    # Parameters and the outputs are gathered. Sums over devices are not needed, nor all
    # examples on one device.
    assert {kind for _, kind in made} == {"all-gather", "dot"}
    gathered = [shape for shape, kind in made if kind == "all-gather"]
    assert [shape for shape in gathered if "[8," in shape] == ["f32[8,10]{1,0}"]


@pytest.mark.parametrize("family, heads", [("vit", 3), ("bert", 2)])
def test_heads_that_the_devices_do_not_divide_are_refused(family, heads, tmp_path):
    if family == "vit":
        make = functools.partial(vit._vit, vit.Shape(12, 1, 3, 4), heads=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vit.MODELS, "vit_tiny_patch16", make)
            task = small.task("vit_tiny_patch16", (8, 8, 1))
    else:
        task = make_setup(text_configs.config(texts.write(tmp_path))).task
    devices = make_devices(asked(model=4, sharding=TENSOR_PARALLEL[family]))
    message = (
        f"4 devices of 'model' do not divide the {heads} attention heads of block1"
    )
    with pytest.raises(UserError, match=message):
        params = shapes_of(task, family).params
        for_parameters(devices, params, task.models.attention_heads)


def test_the_rules_of_llama_divide_heads_and_hidden_units():
    rules = TENSOR_PARALLEL["llama"]
    for name in ("attention/query", "attention/key", "attention/value", "gate", "up"):
        assert spec_of(rules, f"block12/{name}/kernel") == ("fsdp", "model")
    for name in ("attention/out", "down"):
        assert spec_of(rules, f"block12/{name}/kernel") == ("model", "fsdp")
    for name in ("embed/embedding", "block1/norm1/scale"):
        assert spec_of(rules, name) == "fsdp"
