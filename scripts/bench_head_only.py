"""Claim: a step that trains only the head costs what a forward pass costs.

.venv/bin/python scripts/bench_head_only.py [--config=FILE[:ARG]]
  [--batch_size=64] [--rounds=7]

Runs forward pass, head-only step and full step of a config's model in turn, and prints the
ratios to the forward pass of the same round, by the clock and by XLA's count of FLOPs.
Weights are random and images noise: no cost depends on them.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.pytrees import named
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.modes.plan import data_of
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.plans.strategies import EVERYTHING, HEAD_ONLY
from finetune_jax.tasks import make_task
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.step import train_step

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "resnet_head.py"
PHASE = Phase(
    name="bench", steps=1, optimizer="adamw", weight_decay=1e-2, clip_norm=1.0,
    batch_stats="hold",
)  # fmt: skip


def programs(address: str, batch_size: int) -> dict:
    """Returns (compiled program, arguments) by what it does."""
    config, problems = configs.resolve(configs.load(address))
    assert not problems
    task = make_task(
        config.task, config.model, config.precision, data_of(config)[0].spec
    )
    state = run_once(lambda: random_state(task, 0))
    flat = _noise(task.batch_spec, batch_size)
    batch = _noise(task.train_batch_spec, batch_size)
    batch = jax.tree.map(lambda array: array[None], batch)
    made: dict[str, tuple] = {
        "forward": (
            functools.partial(eval_step, task=task),
            (state.params, state.batch_stats, flat),
        )
    }
    for name, rules in (("head only", HEAD_ONLY), ("full", EVERYTHING)):
        stats = "hold" if name == "head only" else "update"
        phase = dataclasses.replace(PHASE, rules=rules, batch_stats=stats)
        found = phase_setup((phase,), 0, task, tuple(named(state.params)))
        step = functools.partial(train_step, static=found.update(task))
        ready = state.replace(opt_state=found.optimizer().init(state.params))
        made[name] = step, (ready, {"task": {}}, batch, np.float32(1e-3), np.float32(0))
    return {
        name: (jax.jit(function).lower(*arguments).compile(), arguments)
        for name, (function, arguments) in made.items()
    }


def _noise(spec: dict, batch_size: int) -> dict:
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 200, (batch_size, *leaf.shape)).astype(leaf.dtype)
        for name, leaf in spec.items()
    }
    batch["label"] %= 3
    batch["weight"] = np.ones(batch_size, np.float32)
    batch["position"] = np.arange(batch_size, dtype=np.int32)
    return batch


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10, help="in a round")
    parser.add_argument("--config", default=str(CONFIG))
    arguments = parser.parse_args()
    made = programs(arguments.config, arguments.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.rounds + 1):
        for name, (program, values) in made.items():
            begin = time.perf_counter()
            for _ in range(arguments.repeats):
                jax.block_until_ready(program(*values))
            seconds[name].append(time.perf_counter() - begin)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    forward = made["forward"][0].cost_analysis()["flops"]
    for name, (program, _) in made.items():
        ratios = sorted(
            mine / base for mine, base in zip(seconds[name][1:], seconds["forward"][1:])
        )
        flops = program.cost_analysis()["flops"] / forward
        print(
            f"{name:10} {statistics.median(ratios):5.2f} forward passes by the clock "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {flops:5.3f} by FLOPs"
        )


if __name__ == "__main__":
    main()
