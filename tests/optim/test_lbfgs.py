"""A whole run with L-BFGS on real digits reaches scikit-learn's optimum."""

import jax
import numpy as np
import pytest
import small
from sklearn.linear_model import LogisticRegression
from small import lines

from finetune_jax.models.modes import EVALUATION
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

STRENGTH, EXAMPLES = 1e-2, 100


@pytest.mark.slow
def test_a_head_on_a_frozen_backbone_reaches_the_optimum(tmp_path):
    phase = Phase(
        name="head", steps=300, optimizer="lbfgs", schedule="constant", peak_lr=1.0,
        fixed_batch=True, rules=small.HEAD, batch_stats="hold", accumulate_steps=2,
        regularise=(("l2", STRENGTH, "head/.*kernel"),),
    )  # fmt: skip
    config = small.config(
        model="resnet20",
        plan=(phase,),
        overrides=[
            ("init.pretrained", "zoo:resnet20_fashion_mnist"),
            ("init.fresh", "('head/.*',)"),
            ("data.train", f"train[:{EXAMPLES}]"),
            ("data.batch_size", str(EXAMPLES)),
            ("report.every_steps", "1"),
        ],
    )
    run(config, tmp_path / "run")
    log = [line for line in lines(tmp_path / "run") if "train/loss" in line]
    reached = min(line["train/loss"] + line["train/penalty"] for line in log)

    setup = make_setup(config)
    state, _ = setup.start()
    batch = setup.data.train.take(np.arange(EXAMPLES))
    inputs = setup.task.prepare(batch, jax.random.key(0), EVALUATION)["inputs"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    models = setup.task.models
    features, _ = models.apply(variables, inputs, last=models.stages[-2])
    features = np.asarray(features, np.float64).reshape(EXAMPLES, -1)
    oracle = LogisticRegression(
        C=1 / (STRENGTH * EXAMPLES), tol=1e-12, max_iter=100_000
    ).fit(features, batch["label"])
    probability = oracle.predict_proba(features)[np.arange(EXAMPLES), batch["label"]]
    wanted = -np.log(probability).mean() + STRENGTH / 2 * (oracle.coef_**2).sum()
    np.testing.assert_allclose(reached, wanted, rtol=1e-6)
