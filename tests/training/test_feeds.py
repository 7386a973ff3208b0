"""Many updates in one call are the bits of one call for each."""

import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
import small

from finetune_jax.data.order import training_order
from finetune_jax.models import efficientnet_lite
from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.layers import stages
from finetune_jax.parallel.executor import LONG_S, LONGEST, Pace
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup
from finetune_jax.training.updates.dispatch import (
    Scanned,
    stock_gradients,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]


def outcome(folder, plan, overrides, steps_per_call):
    keys = {
        "data.per_class": 5,
        "data.batch_size": 10,
        "data.cache_dir": folder / "tables",
        "evaluate.every_steps": 7,
        "evaluate.best": "validation/loss",
        "report.every_steps": 2,
        "checkpoint.every_steps": 4,
        "parallel.steps_per_call": steps_per_call,
    } | overrides
    arguments: dict = dict(model="cnn", convolutions=(4, 4), dense=(8,))
    if "model.name" in keys:
        arguments = {}
    config = small.config(
        plan=plan, overrides=[(k, str(v)) for k, v in keys.items()], **arguments
    )
    workdir = folder / f"{steps_per_call}"
    result = run(config, workdir)
    kept = ("params_sha256", "state_sha256", "frozen_sha256", "final", "best")
    return [result[key] for key in kept], small.lines(workdir)


AUGMENT = (("flip",), ("pad_crop", 1), ("rand_augment", 1, 5))
ALL = (Phase(name="all", steps=16, accumulate_steps=2, clip_norm=1.0),)
RULES = (("head/.*", 1.0), ("stage3/.*", 0.1), (".*", 0.0))
PHASES = (
    Phase(name="head", steps=9, rules=small.HEAD, batch_stats="hold"),
    Phase(
        name="upper", steps=10, rules=RULES, weight_decay=1e-2, batch_stats="update_all"
    ),
)
CASES = {
    "all that learns": (ALL, {"model.head.dropout": 0.2}),
    "two phases": (PHASES, {}),
    "two phases, nothing kept": (PHASES, {"data.cache": "off"}),
    "averaged, mixed, balanced, guarded": (
        ALL,
        {"evaluate.ema_decay": 0.9, "data.augment": AUGMENT, "data.batch_size": 12,
         "data.mix": (("cutmix", 1.0), ("mixup", 0.3)), "data.sampling": "balanced",
         "nonfinite.policy": "skip", "precision": "bfloat16"},
    ),
    "views": (PHASES, {"data.augment": AUGMENT, "data.cache_views": 2}),
    "resnet8": (
        (Phase(name="all", steps=9, optimizer="sgd"),),
        {"model.name": "resnet8"},
    ),
    "efficientnet": (
        (Phase(name="all", steps=3),),
        {"model.name": "efficientnet_lite0", "data.image_size": 32,
         "data.channels": 3, "model.head.dropout": 0.2},
    ),
    "mlp": ((Phase(name="all", steps=30),), {"model.name": "mlp"}),
}  # fmt: skip


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.ci_runs("two phases", "averaged, mixed, balanced, guarded")
def test_many_updates_in_a_call_change_no_bit(tmp_path, capsys, monkeypatch, name):
    plan, overrides = CASES[name]
    made = efficientnet_lite.MODELS["efficientnet_lite0"]  # Here a block a stage.
    shallow = functools.partial(made.func, 1.0, 0.1)
    monkeypatch.setitem(efficientnet_lite.MODELS, "efficientnet_lite0", shallow)
    stepwise = outcome(tmp_path, plan, overrides, 1)
    assert (
        "one update per call (no scan): config.parallel.steps_per_call=1"
        in capsys.readouterr().out
    )
    assert outcome(tmp_path, plan, overrides, None) == stepwise
    assert outcome(tmp_path, plan, overrides, 3) == stepwise
    assert "one update per call" not in capsys.readouterr().out


def gradient_program(convolution):
    layer = nn.Conv(4, (3, 3), conv_general_dilated=convolution)
    x = np.ones((2, 8, 8, 3), np.float32)
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return layer.apply(params, x).sum()

    return jax.make_jaxpr(jax.jit(jax.grad(loss, argnums=(0, 1))))(params, x)


def test_gradients_of_convolutions_that_are_jaxs_own_are_found():
    assert stock_gradients(gradient_program(jax.lax.conv_general_dilated)) == 2
    assert not stock_gradients(gradient_program(convolve))


def test_a_model_with_such_gradients_makes_an_update_a_call(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(stages, "convolve", jax.lax.conv_general_dilated)
    outcome(tmp_path, (Phase(name="all", steps=2),), {}, None)
    assert "3 gradients of convolutions are jax's own" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, fields, why",
    [
        ({"nonfinite.policy": "rollback"}, {}, "nonfinite.policy=rollback"),
        ({"data.memory_gb": 1e-6}, {}, "not kept in memory"),
        ({"parallel.devices": 2}, {}, "there are 2 devices"),
        ({}, {"fixed_batch": True}, "the batch is always the same"),
    ],
)
def test_why_an_update_is_a_call_of_its_own_is_told(
    tmp_path, capsys, overrides, fields, why
):
    plan = (Phase(name="all", steps=2, **fields),)
    overrides = {"model.name": "mlp"} | overrides
    outcome(tmp_path, plan, overrides, None)
    assert re.search(
        rf"one update per call \(no scan\): .*{why}", capsys.readouterr().out
    )


def test_calls_are_as_long_as_signals_may_wait():
    setup = make_setup(small.config(model="mlp"))
    data = setup.data.train
    feed = Scanned(
        examples=data, order=training_order(data.label, 0), placed=data.take(np.arange(2)),
        start=0, batch_size=2, micro_batches=1, views=None, pace=Pace(None),
    )  # fmt: skip
    rates = np.zeros(1000, np.float32)
    made = []
    for seconds in [0.0] * 10 + [2 * LONG_S] * 2:
        made.append(feed.call(rates, rates).updates)
        feed.took(seconds)
    assert made == [*(2**n for n in range(8)), LONGEST, LONGEST, LONGEST, LONGEST // 2]
    assert feed.call(rates[:3], rates[:3]).updates == 3
