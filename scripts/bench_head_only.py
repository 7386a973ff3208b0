"""Claim: a step that trains only the head costs what a forward pass costs.

python scripts/bench_head_only.py [--rounds=7]

Runs forward pass, head-only step and full step of a config's model in turn, and prints the
ratios to the forward pass of the same round, by the clock and by XLA's count of FLOPs.
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
from finetune_jax.plan import Phase
from finetune_jax.setup import make_setup, phase_setup
from finetune_jax.step import eval_step, train_step
from finetune_jax.strategies import EVERYTHING, HEAD_ONLY

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "resnet_head.py"
PHASE = Phase(
    name="bench", steps=1, optimizer="adamw", weight_decay=1e-2, clip_norm=1.0,
    batch_stats="hold",
)  # fmt: skip


def programs(batch_size: int) -> dict:
    """Returns (compiled program, arguments) by what it does."""
    config, problems = configs.resolve(configs.load(str(CONFIG)))
    assert not problems
    setup = make_setup(config)
    state, _ = setup.start()
    flat = setup.data.train.take(np.arange(batch_size))
    flat["weight"] = np.ones(batch_size, np.float32)
    flat["position"] = np.arange(batch_size, dtype=np.int32)
    batch = jax.tree.map(lambda array: array[None], flat)
    made: dict[str, tuple] = {
        "forward": (
            functools.partial(eval_step, task=setup.task),
            (state.params, state.batch_stats, {}, flat),
        )
    }
    for name, rules in (("head only", HEAD_ONLY), ("full", EVERYTHING)):
        stats = "hold" if name == "head only" else "update"
        phase = dataclasses.replace(PHASE, rules=rules, batch_stats=stats)
        found = phase_setup((phase,), 0, setup.task, setup.names)
        step = functools.partial(
            train_step,
            task=setup.task,
            optimizer=found.optimizer(),
            trained=found.trained(state.params),
            mode=found.mode,
        )
        ready = state.replace(opt_state=found.optimizer().init(state.params))
        made[name] = step, (ready, {}, batch, np.float32(1e-3), np.float32(0))
    return {
        name: (jax.jit(function).lower(*arguments).compile(), arguments)
        for name, (function, arguments) in made.items()
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    made = programs(arguments.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.rounds + 1):
        for name, (program, values) in made.items():
            begin = time.perf_counter()
            for _ in range(10):
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
