"""The target of the classic MNIST pair: the source model's layers, then all of it.

Question:  What does a source model bring to a small target data set?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/mnist_target.py:cnn \
               --config.init.pretrained=orbax:runs/mnist_source
           after configs/mnist_source.py with the same argument.
Argument:  cnn (default) or mlp; `tiny` makes two updates: `:mlp,tiny`.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config


def get_config(arg: str = "cnn") -> ml_collections.ConfigDict:
    """Returns the config of a model and size."""
    words = arg.split(",")
    config = configs.default()
    config.data.update(
        name="digits",
        validation="validation",
        test="test",
        batch_size=64,
        image_size=28,
        channels=1,
    )
    config.model.name = "mlp" if "mlp" in words else "cnn"
    config.init.pretrained = "orbax:runs/mnist_source"
    config.init.fresh = ("head/.*",)
    head = Phase(
        name="head",
        epochs=5,
        optimizer="adam",
        peak_lr=1e-3,
        rules=(("head/.*", 1.0), (".*", 0.0)),
        batch_stats="hold",
    )
    everything = Phase(
        name="all",
        epochs=10,
        optimizer="adam",
        peak_lr=1e-3,
        rules=(("head/.*", 1.0), (".*", 0.1)),  # Lower layers learn ten times slower.
    )
    config.plan = as_config((head, everything))
    config.evaluate.every_epochs = 1.0
    config.evaluate.best = "validation/accuracy"
    return configs.tiny(config) if "tiny" in words else config
