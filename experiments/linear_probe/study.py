"""Is a linear probe as good as scikit-learn's logistic regression on its features?

.venv/bin/python experiments/linear_probe/study.py --flowers=DIR --emoji=DIR \
    --pneumonia=FILE [--workdir=runs/linear_probe]

Each case runs `configs/photos.py` with three seeds, which draw other labels of flowers,
other splits of emoji, and other shares of the X-rays, and fits scikit-learn's regression
to the features that the run has cached. Both choose the penalty by validation accuracy,
and both fit training and validation examples together afterwards, but for the cases with
few labels. Writes results.json and table.md beside itself.
"""

import argparse
import csv
import json
import pathlib
import shutil
import warnings
from collections.abc import Mapping

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from finetune_jax import config as configs
from finetune_jax.data.kind import weight_keys
from finetune_jax.features.cache import frozen_prefix
from finetune_jax.report.terminal import Terminal
from finetune_jax.training.assembly import make_store
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "configs" / "photos.py"
STRENGTHS = 10.0 ** np.arange(-6, 2.5, 0.5)  # C of scikit-learn.
SEEDS = range(3)
# Overrides of the config, by case; those of flowers keep the size of their photos.
CASES = {
    "flowers, 10 of each": {"data.per_class": 10, "data.image_size": 128},
    "flowers, 40 of each": {"data.per_class": 40, "data.image_size": 128},
    "emoji": {"data.image_size": 64},
    "pneumonia": {"data.image_size": 64},
}


def config_of(case: str, place: str, seed: int) -> configs.Config:
    """Returns the config of one run."""
    keys = {"data.resize": "None", **CASES[case], "seed": seed}
    if case == "emoji":
        keys["data.split_seed"] = seed
    if case == "pneumonia":
        keys["data.train"] = f"train[:{80 + 10 * seed}%]"
    overrides = [(key, str(value)) for key, value in keys.items()]
    given = configs.load(f"{BASE}:{place}")
    config, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return with_weight_defaults(config, weight_keys(config.data))[0]


def regression(config: configs.Config) -> float:
    """Returns the test accuracy of scikit-learn's regression on the cached features."""
    setup = make_setup(config)
    state, _ = setup.start()
    prefix = frozen_prefix(setup.task, state, setup.phase(0).mode)
    store = make_store(setup, Terminal(quiet=True))
    assert prefix is not None and store is not None
    splits = {"train": setup.data.train, **setup.data.held_out}
    x, y = {}, {}
    for name, split in splits.items():
        rows = store.held_out(split, prefix).take(np.arange(len(split)))
        x[name], y[name] = rows["features"].astype(np.float64), rows["label"]

    def fit(strength: float, *names: str) -> LogisticRegression:
        chosen = LogisticRegression(C=strength, max_iter=500)
        return chosen.fit(*(np.concatenate([z[n] for n in names]) for z in (x, y)))

    def quality(strength: float) -> tuple[float, float]:
        fitted = fit(strength, "train")
        probability = fitted.predict_proba(x["validation"])
        loss = log_loss(y["validation"], probability, labels=fitted.classes_)
        return fitted.score(x["validation"], y["validation"]), -float(loss)

    best = max(STRENGTHS, key=quality)
    few = config.data.per_class is not None
    names = ("train",) if few else ("train", "validation")
    return float(fit(best, *names).score(x["test"], y["test"]))


def emoji_folders(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Returns a folder with Google's emoji by category."""
    if not to.is_dir():
        with (folder / "emoji.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        for row in rows:
            place = to / row["category"]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "google" / row["file"], place)
    return to


def table(results: Mapping[str, list[dict]]) -> str:
    """Returns the table of means over seeds."""
    lines = ["| case | linear probe | scikit-learn | difference |", "|---|---|---|---|"]
    for case, rows in results.items():
        ours, theirs = (
            np.array([100 * row[key] for row in rows]) for key in ("probe", "sklearn")
        )
        lines.append(
            f"| {case} | {ours.mean():.1f} ({ours.min():.1f} to {ours.max():.1f}) "
            f"| {theirs.mean():.1f} ({theirs.min():.1f} to {theirs.max():.1f}) "
            f"| {(ours - theirs).mean():+.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the cases whose data is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flowers", help="a folder of photos per class")
    parser.add_argument("--emoji", help="a folder with emoji.tsv and google/")
    parser.add_argument("--pneumonia", help="PneumoniaMNIST as .npz")
    parser.add_argument("--workdir", default="runs/linear_probe")
    flags = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # Of the weakest penalties.
    base = pathlib.Path(flags.workdir)
    places = {"flowers": flags.flowers, "pneumonia": flags.pneumonia}
    if flags.emoji:
        places["emoji"] = emoji_folders(pathlib.Path(flags.emoji), base / "emoji")
    results: dict[str, list[dict]] = {}
    for case in CASES:
        if (place := places.get(case.partition(",")[0])) is None:
            continue
        for seed in SEEDS:
            config = config_of(case, str(place), seed)
            workdir = base / f"{case.replace(', ', '-').replace(' ', '-')}-{seed}"
            finished = workdir / "result.json"
            found = (
                json.loads(finished.read_text())
                if finished.is_file()
                else run(config, workdir)
            )
            row = {"seed": seed, "probe": found["best"]["test/accuracy"]}
            row["sklearn"] = regression(config)
            results.setdefault(case, []).append(row)
            print(case, row, flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
