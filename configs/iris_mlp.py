"""A small network on four measurements of iris flowers.

Question:  Does a table of numbers go through the same program as images?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/iris_mlp.py
Expected:  test accuracy 0.87 to 0.97; a second of training.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.data.update(
        name="iris",
        validation="validation",
        test="test",
        batch_size=30,
        mean=(5.8, 3.1, 3.8, 1.2),
        std=(0.8, 0.4, 1.8, 0.8),
    )
    config.model.name = "mlp"
    config.model.hidden = (16,)
    config.plan = as_config(full(epochs=40, peak_lr=1e-2, weight_decay=1e-4))
    config.evaluate.every_epochs = 5.0
    config.evaluate.best = "validation/loss"
    return configs.tiny(config) if arg == "tiny" else config
