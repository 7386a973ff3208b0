"""A small network that predicts how far a disease will be, from ten measurements.

Question:  Does it predict a number better than a straight line does?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/diabetes_mlp.py
Expected:  hardly: test R2 0.32 to 0.36 over three seeds (mean squared error 3190 to
           3340), 0.33 (3296) for linear regression; seconds of training.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.task.name = "regress"
    config.task.loss = "mse"
    config.data.update(
        name="diabetes",
        validation="validation",
        test="test",
        batch_size=32,
        std=(0.0476,),  # Of every measurement in the whole data set; the mean is 0.
    )
    config.model.name = "mlp"
    config.model.hidden = (32,)
    config.plan = as_config(full(epochs=100, peak_lr=3e-2, weight_decay=1e-2))
    config.evaluate.every_epochs = 5.0
    config.evaluate.best = "validation/mse"
    return configs.tiny(config) if arg == "tiny" else config
