"""Claim: on CPU, a step with our convolutions costs less than with those of XLA.

.venv/bin/python scripts/bench_convolutions.py [--rounds=5] [--models=resnet50,cnn,...]
  [--torch]

Runs a full step of each model with our convolutions and pooling and with XLA's in turn,
and prints the ratio of each round; with `--torch` also that of the same architecture in
PyTorch (`make oracles`), in the faster of its two memory layouts. Weights are random and
images noise: no cost depends on them.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time
from unittest import mock

import flax.linen as nn
import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.pytrees import named
from finetune_jax.data.preprocessing import ArraySpec
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import mnist, resnet
from finetune_jax.models.layers import stages
from finetune_jax.parallel.compiling import CPU_OPTIONS, run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks import make_task
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.step import train_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

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
        mock.patch.object(stages, "convolve", xla),
        mock.patch.object(resnet, "max_pool", nn.max_pool),
        mock.patch.object(mnist, "max_pool", nn.max_pool),
    ]


def xla(*arguments, **options):
    """Is `jax.lax.conv_general_dilated`."""
    return jax.lax.conv_general_dilated(*arguments, **options)


def program(name: str):
    """Returns a full step, compiled as in a run, which gives what to wait for."""
    examples, size, channels = MODELS[name]
    given = configs.default()
    given.model.name = name
    config, problems = configs.resolve(given)
    assert not problems, problems
    shape = (size, size, channels)
    spec = DataSpec(
        kind="images", shape=shape, train_shape=shape, dtype="uint8", inputs=ArraySpec(),
        class_names=tuple("0123456789"), train_counts=(100,) * 10,
    )  # fmt: skip
    task = make_task(config.task, config.model, config.precision, spec)
    state = run_once(lambda: random_state(task, 0))
    found = phase_setup((PHASE,), 0, task, tuple(named(state.params)))
    state = state.replace(opt_state=found.optimizer().init(state.params))
    images, labels = examples_of(name)
    batch = {
        "inputs": images[None],
        "label": labels[None],
        "weight": np.ones((1, examples), np.float32),
        "position": np.arange(examples, dtype=np.int32)[None],
    }
    step = functools.partial(train_step, static=found.update(task))
    arguments = (state, {"task": {}}, batch, np.float32(1e-3), np.float32(0))
    compiled = jax.jit(step).lower(*arguments).compile(compiler_options=CPU_OPTIONS)
    return lambda: jax.block_until_ready(compiled(*arguments))


def examples_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise [B, H, W, C] and labels [B]."""
    examples, size, channels = MODELS[name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, size, size, channels), np.uint8)
    return images, rng.integers(0, 10, examples, np.int32)


def torch_model(name: str):
    """Returns the same architecture with 10 classes in torch."""
    from oracles import import_timm, import_torchvision  # type: ignore
    from torch import nn  # type: ignore[import-not-found]
    from torch.nn import functional as F  # type: ignore[import-not-found]

    def conv(width, out, size, stride=1):
        one = nn.Conv2d(width, out, size, stride, size // 2, bias=False)
        return nn.Sequential(one, nn.BatchNorm2d(out))

    class Block(nn.Module):
        """One of ResNet-20."""

        def __init__(self, width, out):
            super().__init__()
            self.stride, self.room = out // width, (out - width) // 2
            self.first, self.second = (
                conv(width, out, 3, self.stride),
                conv(out, out, 3),
            )

        def forward(self, x):
            y = self.second(F.relu(self.first(x)))
            shortcut = x[:, :, :: self.stride, :: self.stride]
            room = (0, 0, 0, 0, self.room, self.room)
            return F.relu(y + F.pad(shortcut, room))

    if name == "cnn":
        stages = [
            layer
            for width, out in ((1, 32), (32, 64))
            for layer in (conv(width, out, 5), nn.ReLU(), nn.MaxPool2d(2))
        ]
        dense = nn.Linear(7 * 7 * 64, 1024), nn.ReLU(), nn.Linear(1024, 10)
        return nn.Sequential(*stages, nn.Flatten(), *dense)
    if name == "resnet20":
        widths = (16,) * 4 + (32,) * 3 + (64,) * 3
        blocks = [Block(*pair) for pair in zip(widths, widths[1:])]
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(
            conv(1, 16, 3), nn.ReLU(), *blocks, *pool, nn.Linear(64, 10)
        )
    if name.startswith("efficientnet"):
        return import_timm().create_model(f"tf_{name}", num_classes=10)
    return getattr(import_torchvision().models, name)(num_classes=10)


def torch_step(name: str):
    """Returns a full step in torch, in the memory layout in which it is faster."""
    import torch  # type: ignore[import-not-found]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images, labels = map(torch.from_numpy, examples_of(name))
    loss_of, labels = torch.nn.CrossEntropyLoss(), labels.long()

    def step_in(memory_format):
        model = torch_model(name).train()
        model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step():
            inputs = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
            inputs = inputs.contiguous(memory_format=memory_format)
            optimizer.zero_grad()
            loss_of(model(inputs), labels).backward()
            optimizer.step()

        return step

    steps = [step_in(f) for f in (torch.channels_last, torch.contiguous_format)]
    return min(steps, key=lambda step: min(seconds(step) for _ in range(3)))


def seconds(step) -> float:
    """Returns how long a step takes, the mean of as many as fit into half a second."""
    begin, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begin < 0.5:
        step()
        calls += 1
    return (time.perf_counter() - begin) / calls


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Returns the median of the ratios of each round, with their range."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--torch", action="store_true")
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    kinds = ["ours", "XLA's"] + ["torch's"] * given.torch
    columns = ["model", "batch", *(f"{kind} (ms)" for kind in kinds)]
    columns += [f"ours / {kind} (range)" for kind in kinds[1:]]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in given.models.split(","):
        steps = [program(name)]
        patches = stock()
        for patch in patches:
            patch.start()
        steps.append(program(name))
        for patch in patches:
            patch.stop()
        if given.torch:
            steps.append(torch_step(name))
        found: list[list[float]] = [[] for _ in steps]
        for _ in range(given.rounds + 1):
            for kept, step in zip(found, steps):
                kept.append(seconds(step))
        found = [kept[1:] for kept in found]
        cells = [name, str(MODELS[name][0])]
        cells += [f"{statistics.median(kept) * 1e3:.0f}" for kept in found]
        cells += [ratio(found[0], kept) for kept in found[1:]]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
