"""What joint learning and adaptation bring against plain fine-tuning, at equal compute.

FINETUNE_JAX_TESTDATA=FOLDER .venv/bin/python experiments/domains/study.py [QUESTION ...]

Questions are joint, noisy, rotated and inverted; by default all. FOLDER has
`fashion_mnist/` with the IDX files. Every arm of a question sees the same number of
examples, with seeds 0 to 4; differences are paired by seed, against the first arm. A run
that is finished is not run again. Writes results.json, table.md, table.png beside itself.
"""

import argparse
import json
import os
import pathlib
from typing import Any

import ml_collections
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config
from finetune_jax.training.run import run

HERE = pathlib.Path(__file__).parent
SEEDS = range(5)
UPDATES, BATCH, ADABN = 400, 64, 40
BACKBONE = r"(?!head/).*"
LEARN = {"optimizer": "adam", "peak_lr": 3e-3}
SHIFTS: dict[str, tuple] = {
    "noisy": (("noise", 0.5),),
    "rotated": (("rotate", 35.0),),
    "inverted": (("invert",),),
}
METHODS = ("dann", "mmd", "coral", "self_training")


def base(seed: int, *phases: Phase) -> Any:
    """Returns the config that all arms have in common."""
    config = configs.default()
    config.seed = seed
    config.data.update(
        name="digits", test="test", batch_size=BATCH, image_size=8, channels=1
    )
    config.model.name = "cnn"
    config.model.convolutions, config.model.dense = (16, 32), (64,)
    config.model.kernel_size = 3
    config.plan = as_config(phases)
    config.report.every_steps = 100
    return config


def clothes() -> dict[str, Any]:
    """Returns the section of the first 6,000 clothes."""
    folder = pathlib.Path(os.environ["FINETUNE_JAX_TESTDATA"]) / "fashion_mnist"
    return {"name": "idx", "dir": str(folder), "train": "train[:6000]"}


def joint_arms(seed: int, folder: pathlib.Path) -> dict[str, list[tuple[str, Any]]]:
    """Returns the runs of each arm, in order: ten digits a class, and clothes."""
    whole = Phase(name="learn", steps=UPDATES, **LEARN)
    half = Phase(name="learn", steps=UPDATES // 2, **LEARN)
    alone = base(seed, whole)
    alone.data.per_class = 10
    source = base(seed, half)
    source.data.update(**clothes())
    tuned = base(seed, half)
    tuned.data.per_class = 10
    tuned.init.pretrained = f"orbax:{folder / f'source-{seed}'}"
    tuned.init.fresh = ("head/.*",)
    found = {
        "fine-tuning": [(f"source-{seed}", source), (f"tuned-{seed}", tuned)],
        "digits alone": [(f"alone-{seed}", alone)],
    }
    for arm, task in (
        ("joint, backbone shared", {"shared": (BACKBONE,), "statistics": "domain"}),
        ("joint, first stage shared", {"shared": ("stage1/.*",)}),
        ("joint, soft sharing", {"shared": (), "soft": 0.01}),
        (
            "joint, uncertainty",
            {"shared": (BACKBONE,), "statistics": "domain", "balance": "uncertainty"},
        ),
    ):
        config = base(seed, whole)
        config.task = ml_collections.ConfigDict({"name": "joint", **task})
        digits = {"domain": "digits", "per_class": 10}
        entries = (digits, {"domain": "clothes", **clothes()})
        config.data.domains = tuple(map(ml_collections.ConfigDict, entries))
        found[arm] = [(f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}", config)]
    return found


def adapt_arms(seed: int, shift: str) -> dict[str, list[tuple[str, Any]]]:
    """Returns the run of each arm for one shifted copy of the digits."""
    found = {}
    for arm in ("source alone", "AdaBN", *METHODS):
        last = 0 if arm == "source alone" else ADABN
        phases = [Phase(name="learn", steps=UPDATES - last, **LEARN)]
        if last:
            nothing = ((".*", 0.0),)
            phases.append(
                Phase(
                    name="adabn", steps=last, optimizer="sgd", rules=nothing,
                    batch_stats="update_all",
                )
            )  # fmt: skip
        config = base(seed, *phases)
        method = arm if arm in METHODS else "none"
        config.task = ml_collections.ConfigDict(
            {"name": "domain_adapt", "method": method}
        )
        config.data.domains = (
            ml_collections.ConfigDict({"domain": "clean", "stratified": False}),
            ml_collections.ConfigDict(
                {"domain": shift, "labelled": False, "shift": SHIFTS[shift]}
            ),
        )
        found[arm] = [(f"{shift}-{arm.replace(' ', '_')}-{seed}", config)]
    return found


def result_of(runs: list[tuple[str, Any]], folder: pathlib.Path) -> dict[str, Any]:
    """Returns the result of the last of some runs; none is made twice."""
    result: dict[str, Any] = {}
    for name, config in runs:
        file = folder / name / "result.json"
        if not file.is_file():
            full, problems = configs.resolve(config)
            assert not problems, problems
            run(full, folder / name)
        result = json.loads(file.read_text())
    return result


def interval(values: np.ndarray) -> float:
    """Returns half the 95 % interval of a mean, by Student's t."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def summed_up(accuracy: dict[str, list[float]]) -> dict[str, Any]:
    """Returns means, and differences from the first arm, with their intervals."""
    first = np.array(next(iter(accuracy.values())))
    return {
        arm: {
            "accuracy": values,
            "mean": float(np.mean(values)),
            "interval_95": interval(np.array(values)),
            "gain": float(np.mean(np.array(values) - first)),
            "gain_interval_95": interval(np.array(values) - first),
        }
        for arm, values in accuracy.items()
    }


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=["joint", *SHIFTS])
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/domains")
    asked = parser.parse_args()
    folder, written = asked.workdir.resolve(), HERE / "results.json"
    found = json.loads(written.read_text()) if written.is_file() else {}
    if "joint" in asked.questions:
        accuracy: dict[str, list[float]] = {}
        for seed in SEEDS:
            for arm, runs in joint_arms(seed, folder).items():
                result = result_of(runs, folder)
                key = "test/digits/accuracy" if "joint" in arm else "test/accuracy"
                accuracy.setdefault(arm, []).append(100 * result[key])
        found["digits, 10 labels a class"] = summed_up(accuracy)
    for shift in (shift for shift in SHIFTS if shift in asked.questions):
        accuracy = {}
        for seed in SEEDS:
            for arm, runs in adapt_arms(seed, shift).items():
                value = 100 * result_of(runs, folder)[f"test/{shift}/accuracy"]
                accuracy.setdefault(arm, []).append(value)
        found[f"{shift} digits, no labels"] = summed_up(accuracy)
    written.write_text(json.dumps(found, indent=2) + "\n")
    write_table(found)
    draw(found, HERE / "table.png")


def write_table(found: dict[str, Any]) -> None:
    """Writes and prints the table."""
    rows = [
        "| test set | arm | accuracy | gain over the first arm |",
        "|---|---|---|---|",
    ]
    for question, arms in found.items():
        for place, (arm, row) in enumerate(arms.items()):
            gain = f"{row['gain']:+.1f} ± {row['gain_interval_95']:.1f}"
            rows.append(
                f"| {question} | {arm} | {row['mean']:.1f} ± {row['interval_95']:.1f} | "
                f"{gain if place else ''} |"
            )
    (HERE / "table.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draws means, intervals and the single runs, a panel a test set."""
    rows, columns = (len(found) + 1) // 2, min(len(found), 2)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (question, arms) in zip(panels, found.items()):
        for place, row in enumerate(arms.values()):
            panel.plot(
                row["accuracy"], [-place] * len(row["accuracy"]), "|", color="#888888",
                ms=9,
            )  # fmt: skip
            panel.errorbar(
                row["mean"], -place, xerr=row["interval_95"], fmt="o",
                color="#0072B2", capsize=4,
            )  # fmt: skip
        panel.set_yticks([-place for place in range(len(arms))], list(arms))
        panel.set_title(question, fontsize=9)
        panel.set_xlabel("test accuracy, 5 seeds (%)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
