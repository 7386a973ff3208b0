"""The source of the classic MNIST pair: `mlp` or `cnn`, trained from scratch.

Question:  What does the source model reach on its own data?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/mnist_source.py:cnn \
               --config.data.dir=DIR --workdir=runs/mnist_source
           DIR has the IDX files of MNIST, or of Fashion-MNIST.
Argument:  cnn (default) or mlp; `tiny` makes two updates: `:mlp,tiny`.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "cnn") -> ml_collections.ConfigDict:
    """Returns the config of a model and size."""
    words = arg.split(",")
    config = configs.default()
    config.data.update(
        name="idx",
        train="train[:90%]",
        validation="train[90%:]",
        test="test",
        batch_size=128,
        image_size=28,
        channels=1,
    )
    config.model.name = "mlp" if "mlp" in words else "cnn"
    config.model.classes = 10
    config.plan = as_config(full(epochs=3, optimizer="adam", peak_lr=1e-3))
    config.evaluate.every_epochs = 1.0
    config.evaluate.best = "validation/accuracy"
    config.report.every_steps = 50
    return configs.tiny(config) if "tiny" in words else config
