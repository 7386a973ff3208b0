"""Claim: on CPU, a step with our convolutions costs less than with those of XLA.

python scripts/bench_convolutions.py [--rounds=5] [--models=resnet50,resnet20,cnn,...]

Runs a full step of each model with our convolutions and pooling and with XLA's in turn,
and prints the ratio of each round. Weights are random and images noise: no cost depends on
them.
"""

import argparse
import functools
import statistics
import time
from unittest import mock

import flax.linen as nn
import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import efficientnet_lite, mnist, resnet, resnet_cifar
from finetune_jax.parallel import run_once
from finetune_jax.plan import Phase
from finetune_jax.setup import make_task, phase_setup
from finetune_jax.start import random_state
from finetune_jax.step import train_step
from finetune_jax.trees import named

# Batch, size and channels of the images.
MODELS = {
    "cnn": (64, 28, 1),
    "resnet20": (64, 28, 1),
    "resnet18": (8, 224, 3),
    "resnet50": (16, 224, 3),
    "resnext50_32x4d": (4, 224, 3),
    "efficientnet_lite0": (16, 128, 3),
}
PHASE = Phase(name="bench", steps=1, optimizer="sgd")


def stock():
    """Returns patches under which models are built with XLA's convolutions and pooling."""
    return [
        mock.patch.multiple(resnet, convolve=xla, max_pool=nn.max_pool),
        mock.patch.multiple(mnist, convolve=xla, max_pool=nn.max_pool),
        mock.patch.object(resnet_cifar, "convolve", xla),
        mock.patch.object(efficientnet_lite, "convolve", xla),
    ]


def xla(*arguments, **options):
    """Is `jax.lax.conv_general_dilated`."""
    return jax.lax.conv_general_dilated(*arguments, **options)


def program(name: str):
    """Returns a compiled full step and its arguments."""
    examples, size, channels = MODELS[name]
    given = configs.default()
    given.model.name = name
    config, problems = configs.resolve(given)
    assert not problems, problems
    shape = (size, size, channels)
    spec = DataSpec(
        shape=shape, train_shape=shape, dtype="uint8",
        class_names=tuple("0123456789"), train_counts=(100,) * 10,
    )  # fmt: skip
    task = make_task(config, spec)
    state = run_once(lambda: random_state(task, 0))
    found = phase_setup((PHASE,), 0, task, tuple(named(state.params)))
    state = state.replace(opt_state=found.optimizer().init(state.params))
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(0, 256, (1, examples, *shape), np.uint8),
        "label": rng.integers(0, 10, (1, examples), np.int32),
        "weight": np.ones((1, examples), np.float32),
        "position": np.arange(examples, dtype=np.int32)[None],
    }
    step = functools.partial(train_step, static=found.update(task))
    arguments = (state, {"task": {}}, batch, np.float32(1e-3), np.float32(0))
    return jax.jit(step).lower(*arguments).compile(), arguments


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(
        "| model | batch | ours (ms) | XLA's (ms) | ratio (range) |\n|---|---|---|---|---|"
    )
    for name in given.models.split(","):
        ours, arguments = program(name)
        patches = stock()
        for patch in patches:
            patch.start()
        theirs, _ = program(name)
        for patch in patches:
            patch.stop()
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.rounds + 1):
            for kept, compiled in zip(seconds, (ours, theirs)):
                begin, calls = time.perf_counter(), 0
                while not calls or time.perf_counter() - begin < 0.5:
                    jax.block_until_ready(compiled(*arguments))
                    calls += 1
                kept.append((time.perf_counter() - begin) / calls)
        mine, other = (statistics.median(kept[1:]) * 1e3 for kept in seconds)
        ratios = sorted(a / b for a, b in zip(seconds[0][1:], seconds[1][1:]))
        print(
            f"| {name} | {MODELS[name][0]} | {mine:.1f} | {other:.1f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
