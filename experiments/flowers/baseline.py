"""A logistic regression on the features that `efficientnet_flowers.py` trains its head on.

.venv/bin/python experiments/flowers/baseline.py DIR

DIR has the photos. Backbone, preprocessing and splits are the config's; scikit-learn's
penalty is chosen on the validation split, then it is fitted on train+validation, as the
config's head is.
"""

import pathlib
import sys

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from finetune_jax import config as configs
from finetune_jax.data.dataset import Dataset
from finetune_jax.models.modes import EVALUATION
from finetune_jax.training.setup import Setup, make_setup

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "efficientnet_flowers.py"
PENALTIES = 10.0 ** np.arange(-4, 1.1, 0.5)
BATCH = 64


def features(setup: Setup, dataset: Dataset, variables: dict) -> np.ndarray:
    """Returns what the backbone makes of a split, [N, F]."""

    @jax.jit
    def run(variables, inputs):
        batch = setup.task.prepare({"inputs": inputs}, jax.random.key(0), EVALUATION)
        return setup.task.models.apply(variables, batch["inputs"], last="pool")[0]

    rows = []
    for start in range(0, len(dataset), BATCH):
        places = np.minimum(np.arange(start, start + BATCH), len(dataset) - 1)
        rows.append(np.asarray(run(variables, dataset.take(places)["inputs"])))
    return np.concatenate(rows)[: len(dataset)]


def main() -> None:
    """Prints accuracies on the test split."""
    overrides = [("data.dir", sys.argv[1]), ("data.train", "train")]
    overrides += [("data.validation", "validation")]
    config, problems = configs.resolve(configs.load(str(CONFIG)), overrides)
    assert not problems, problems
    setup = make_setup(config)
    state, _ = setup.start()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    splits = {"train": setup.data.train, **setup.data.held_out}
    x = {name: features(setup, split, variables) for name, split in splits.items()}
    y = {name: split.label for name, split in splits.items()}

    def fitted(penalty, *names):
        model = LogisticRegression(C=penalty, max_iter=2000)
        return model.fit(
            np.concatenate([x[name] for name in names]),
            np.concatenate([y[name] for name in names]),
        )

    found = {
        penalty: fitted(penalty, "train").score(x["validation"], y["validation"])
        for penalty in PENALTIES
    }
    best = max(found, key=found.__getitem__)
    model = fitted(best, "train", "validation")
    print(f"C {best:.3g}, validation accuracy {found[best]:.4f}")
    print(f"test accuracy {model.score(x['test'], y['test']):.4f}")


if __name__ == "__main__":
    main()
