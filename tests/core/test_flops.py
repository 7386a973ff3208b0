"""Operations counted in a trace are those that XLA counts in what is lowered."""

from typing import Any

import jax
import numpy as np
import pytest
import small

from finetune_jax import models
from finetune_jax.core import flops
from finetune_jax.modes import plan as plan_mode
from finetune_jax.modes.options import Options
from finetune_jax.plans import strategies


def xlas_count(function, *arguments):
    lowered: Any = jax.jit(function).lower(*arguments)
    return lowered.cost_analysis()["flops"]


def our_count(function, *arguments):
    return flops.count_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def convolution(**options):
    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, **{"window_strides": (1, 1), "padding": "SAME", **options},
            dimension_numbers=numbers,
        )  # fmt: skip

    return convolve


def gradients(function):
    """Returns value and gradients: all that is traced is also needed."""

    def both(*arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(value)

    return both


@pytest.mark.parametrize("transform", [lambda f: f, gradients])
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, (3, 3, 8, 12)),
        ({"window_strides": (2, 2)}, (7, 7, 8, 12)),
        ({"padding": "VALID", "rhs_dilation": (2, 1)}, (3, 5, 8, 12)),
        ({"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 3))}, (3, 3, 8, 4)),
        ({"feature_group_count": 4}, (3, 3, 2, 12)),
    ],
)
def test_the_products_of_a_convolution_are_counted_as_by_xla(
    options, kernel, transform
):
    function = transform(convolution(**options))
    arguments = np.ones((2, 13, 11, 8), np.float32), np.ones(kernel, np.float32)
    assert our_count(function, *arguments) == xlas_count(function, *arguments)


def test_loops_and_branches_are_counted():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    x = np.ones((4, 4), np.float32)
    assert our_count(loop, x) == 5 * 2 * 4**3
    assert 2 * 2 * 4**3 <= our_count(branch, x) <= 2 * 2 * 4**3 + 4


@pytest.mark.parametrize("index", [0, 1])
def test_a_step_of_a_network_is_counted_as_by_xla(index):
    task = small.task("cnn", convolutions=(8, 16), dense=(8,))
    plan = strategies.two_stage(head_lr=1.0, all_lr=1.0, steps=1, clip_norm=1.0)
    trainer = small.Trainer(task, plan[index])
    step: Any = trainer.step
    rate, batch = np.float32(0.1), small.batch()
    arguments = trainer.state, trainer.fixed, batch, rate, rate
    theirs = step.lower(*arguments).cost_analysis()["flops"]
    ours = flops.count_flops(step.trace(*arguments).jaxpr.jaxpr)
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "arguments", "programs"),
    [("layerwise", {}, 5), ("alternating", {"cycles": 20}, 2), ("progressive", {}, 5)],
)
@pytest.mark.fast_runs("alternating-arguments1-2")
def test_plan_mode_traces_each_program_once_and_compiles_nothing(
    strategy, arguments, programs, monkeypatch, capsys
):
    traced, compiled = [], []
    step_flops = plan_mode.step_flops
    monkeypatch.setattr(
        plan_mode, "step_flops", lambda *a: traced.append(1) or step_flops(*a)
    )
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda *a, **k: compiled.append(1) or compile_(*a),
    )
    stages = models.stages_of("resnet20")
    plan = getattr(strategies, strategy)(stages, steps=1, **arguments)
    assert (
        plan_mode.main(small.config(plan=plan), Options(config="x", workdir=None)) == 0
    )
    assert len(traced) == programs and not compiled
    printed = capsys.readouterr().out
    assert all(phase.name in printed for phase in plan)
