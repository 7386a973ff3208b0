"""Ten labels per class: does a pretrained backbone help, frozen or trained?

.venv/bin/python experiments/low_data/study.py [--workdir=runs/low_data]

Four arms on digits with 10 training labels per class. For each arm the learning rate is
chosen on the validation split, with seed 0, out of the same grid; then seeds 0 to 4 draw
other labels, other orders and another head. The test split is read once a run, for the
best checkpoint by validation. Writes results.json, table.md and table.png beside itself.
"""

import argparse
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from finetune_jax import config as configs
from finetune_jax.training.run import run

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "configs" / "resnet_head.py"
EVERYTHING = "((r'.*', 1.0),)"
PRETRAINED = {"init.pretrained": "zoo:resnet20_fashion_mnist"}
RANDOM = {"init.pretrained": "None", "init.fresh": "()"}
FULL = {"plan[0].rules": EVERYTHING, "plan[0].batch_stats": "update"}
ARMS = {
    "frozen, pretrained": PRETRAINED,
    "frozen, random": RANDOM,
    "full fine-tuning": PRETRAINED | FULL,
    "from scratch": RANDOM | FULL,
}
RATES = (1e-3, 1e-2, 1e-1)
SEEDS = range(5)
COMMON = {
    "data.per_class": 10,
    "data.batch_size": 50,
    "plan[0].epochs": "None",
    "plan[0].steps": 150,
    "evaluate.every_epochs": "None",
    "evaluate.every_steps": 25,
}


def result_of(arm: str, rate: float, seed: int, folder: pathlib.Path) -> dict:
    """Returns the result of one run; one that is finished is not run again."""
    workdir = folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    keys = COMMON | ARMS[arm] | {"plan[0].peak_lr": rate, "seed": seed}
    overrides = [(key, str(value)) for key, value in keys.items()]
    config, problems = configs.resolve(configs.load(str(BASE)), overrides)
    assert not problems, problems
    if (workdir / "result.json").is_file():
        return json.loads((workdir / "result.json").read_text())
    return run(config, workdir)


def interval(values: list[float]) -> float:
    """Returns half the 95 % interval of a mean, by Student's t."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/low_data")
    folder = parser.parse_args().workdir
    found = {}
    for arm in ARMS:
        by_rate = {rate: result_of(arm, rate, 0, folder) for rate in RATES}
        rate = max(RATES, key=lambda r: by_rate[r]["best"]["validation/accuracy"])
        runs = [result_of(arm, rate, seed, folder) for seed in SEEDS]
        accuracy = [100 * result["best"]["test/accuracy"] for result in runs]
        found[arm] = {
            "learning_rate": rate,
            "test_accuracy": accuracy,
            "mean": float(np.mean(accuracy)),
            "interval_95": interval(accuracy),
        }
    (HERE / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = ["| arm | rate | test accuracy, mean ± 95 % |", "|---|---|---|"]
    rows += [
        f"| {arm} | {row['learning_rate']:g} | {row['mean']:.1f} ± "
        f"{row['interval_95']:.1f} |"
        for arm, row in found.items()
    ]
    (HERE / "table.md").write_text("\n".join(rows) + "\n")
    draw(found, HERE / "table.png")
    print("\n".join(rows))


def draw(found: dict[str, dict], path: pathlib.Path) -> None:
    """Draws means, intervals and the single runs."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    panel = figure.subplots()
    for place, (_, row) in enumerate(found.items()):
        values = row["test_accuracy"]
        panel.errorbar(
            row["mean"], -place, xerr=row["interval_95"], fmt="o", color="#0072B2",
            capsize=4,
        )  # fmt: skip
        panel.plot(values, [-place] * len(values), "|", color="#888888", ms=9)
    panel.set_yticks([-i for i in range(len(found))], list(found))
    panel.set_xlabel("test accuracy on digits, 10 labels a class, 5 seeds (%)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#eeeeee")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
