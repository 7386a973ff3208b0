"""Ten labels per class: do models gain from each other, or from a teacher?

.venv/bin/python experiments/domains/mutual_and_distill.py [--workdir=DIR]

Runs configs/mutual_digits.py and configs/distill_digits.py as they are and without what is
asked about, for seeds 0 to 4, which draw other labels, orders and starts. Both arms of a
comparison have the same of all three and make as many updates. Prints the table of
mutual_distill.md; runs that are finished are not made again.
"""

import argparse
import json
import pathlib

import numpy as np
from scipy import stats

from finetune_jax import config as configs
from finetune_jax.training.run import run

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SEEDS = range(5)
# What is compared: (config, metric) with, and without.
ROWS = {
    "mutual, the small one": ("mutual", "alone", "small/accuracy"),
    "mutual, the large one": ("mutual", "alone", "large/accuracy"),
    "mutual, both together": ("mutual", "alone", "accuracy"),
    "distilled": ("taught", "plain", "accuracy"),
}
ARMS = {
    "mutual": "mutual_digits.py",
    "alone": "mutual_digits.py:alone",
    "taught": "distill_digits.py",
    "plain": "distill_digits.py:plain",
    "teacher": "distill_digits.py:teacher",
}


def result_of(arm: str, seed: int, folder: pathlib.Path) -> dict:
    """Returns the result of one run; one that is finished is not made again."""
    workdir = folder / f"{arm}_{seed}"
    if (workdir / "result.json").is_file():
        return json.loads((workdir / "result.json").read_text())
    overrides = [("seed", str(seed)), ("parallel.devices", "1")]
    if arm == "taught":
        teacher = folder / "teacher_0"
        overrides.append(("model.members[0].pretrained", f"orbax:{teacher}"))
    given = configs.load(str(CONFIGS / ARMS[arm]))
    config, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return run(config, workdir)


def half(values: np.ndarray) -> float:
    """Returns half the 95 % interval of a mean, by Student's t."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def row(name: str, folder: pathlib.Path) -> str:
    """Returns the line of one comparison."""
    arm, without, metric = ROWS[name]
    accuracy = {
        each: np.array(
            [100 * result_of(each, s, folder)[f"test/{metric}"] for s in SEEDS]
        )
        for each in (arm, without)
    }
    gain = accuracy[arm] - accuracy[without]
    low, high = gain.mean() - half(gain), gain.mean() + half(gain)
    means = [
        f"{values.mean():.1f} ± {half(values):.1f}" for values in accuracy.values()
    ]
    return (
        f"| {name} | {' | '.join(means)} | "
        f"{gain.mean():+.1f} ({low:+.1f} to {high:+.1f}) |"
    )


def main() -> None:
    """Makes the runs that are not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path("runs/mutual_and_distill")
    parser.add_argument("--workdir", type=pathlib.Path, default=default)
    folder = parser.parse_args().workdir
    teacher = result_of("teacher", 0, folder)["test/accuracy"]
    rows = [row(name, folder) for name in ROWS]
    print("| arm | test accuracy | without | difference, 95 % |\n|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nThe teacher: {100 * teacher:.1f}.")


if __name__ == "__main__":
    main()
