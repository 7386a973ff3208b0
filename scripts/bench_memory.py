"""Claim: a head-only run needs at most 1.1 times the memory that its evaluation needs.

.venv/bin/python scripts/bench_memory.py [--photos=400] [--batch_size=64] [--rounds=2]

Runs `configs/resnet_head.py:folder=DIR` (a ResNet-50 on photos of 224 pixels) on a folder
of noise with random weights, the frozen stages computed in every update
(`config.data.cache=off`), and then `--mode=evaluate` on its workdir, each in a process of
its own; prints the most that each held in memory, and what the compiled steps need by
XLA's own account. Batches are equally large in both, by default those of the config.
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.features.frozen_prefix import at_a_time
from finetune_jax.parallel.compiling import compiled
from finetune_jax.parallel.devices import stable_batch
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import make_setup
from finetune_jax.training.step import train_step

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "resnet_head.py"


def make_photos(folder: pathlib.Path, count: int) -> None:
    """Writes photos of noise of two classes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        file = folder / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (256, 320, 3), np.uint8)).save(file)


def peak(command: list[str]) -> int:
    """Returns the most bytes that a command held in memory."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def program_bytes(compiled) -> int:
    """Returns what a compiled step needs: arguments, results and all between."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def programs(address: str, overrides: list[tuple[str, str]]) -> tuple[int, int]:
    """Returns the bytes of the step that trains and of the one that evaluates."""
    config, problems = configs.resolve(configs.load(address), overrides)
    assert not problems, problems
    setup = make_setup(config)
    devices, task, size = setup.devices, setup.task, config.data.batch_size
    state = devices.place(setup.target(Progress(phase=0)))

    def zeros(spec, *shape):
        batch = {n: np.zeros((*shape, *s.shape), s.dtype) for n, s in spec.items()}
        batch |= {"weight": np.ones(shape, "f"), "position": np.zeros(shape, "i")}
        return devices.place_batch(batch, batch_axis=len(shape) - 1)

    few = at_a_time(task, size, stable_batch(devices))
    update = setup.phase(0).update(task, at_a_time=few)
    train = devices.compile_train(
        functools.partial(train_step, static=update), state, {"task": {}},
        zeros(task.train_batch_spec, 1, size), np.float32(0), np.float32(0),
    )  # fmt: skip
    evaluate = compiled(
        devices.over_devices(functools.partial(eval_step, task=task, first=update.first)),
        state.params, state.batch_stats, zeros(task.batch_spec, size),
    )  # fmt: skip
    return program_bytes(train.call), program_bytes(evaluate.call)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory(prefix="bench_memory-") as name:
        root = pathlib.Path(name)
        make_photos(root / "photos", given.photos)
        address = f"{CONFIG}:folder={root / 'photos'}"
        overrides = [
            ("init.pretrained", "None"), ("init.fresh", "()"), ("data.cache", "off"),
            ("data.batch_size", str(given.batch_size)), ("plan[0].epochs", "1.0"),
            ("evaluate.batch_size", str(given.batch_size)),
        ]  # fmt: skip
        command = [sys.executable, "-m", "finetune_jax.main"]
        flags = [f"--config={address}"]
        flags += [f"--config.{name}={value}" for name, value in overrides]
        for number in range(given.rounds):
            workdir = f"--workdir={root / str(number)}"
            train = peak([*command, *flags, workdir])
            evaluate = peak([*command, "--mode=evaluate", workdir])
            print(
                f"processes: head-only run {train / 1e6:.0f} MB, evaluation "
                f"{evaluate / 1e6:.0f} MB, ratio {train / evaluate:.3f}",
                flush=True,
            )
        train, evaluate = programs(address, overrides)
        print(
            f"compiled steps: head-only update {train / 1e6:.0f} MB, evaluation "
            f"{evaluate / 1e6:.0f} MB, ratio {train / evaluate:.3f}"
        )


if __name__ == "__main__":
    main()
