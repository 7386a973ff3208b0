"""A new head on a frozen, pretrained ResNet-20: handwritten digits.

Question:  How far do features learned on photos of clothes carry to digits?
Command:   python -m finetune_jax.main --config=configs/resnet_head.py
Expected:  test accuracy 0.921 over seeds 0 to 4 (0.919 to 0.925); with
           --config.init.pretrained=None, a frozen random backbone, 0.812 (0.797 to
           0.855). Two CPU cores, half a minute.
Chosen:    size, normalisation and rate on the validation split; chosen by us.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plan import as_config
from finetune_jax.strategies import head_only


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.data.update(
        name="digits",
        train="train",
        validation="validation",
        test="test",
        batch_size=64,
        image_size=16,
        mean=(0.5,),
        std=(0.5,),
    )
    config.model.name = "resnet20"
    config.init.pretrained = "zoo:resnet20_fashion_mnist"
    config.init.fresh = ("head/.*",)
    config.plan = as_config(head_only(epochs=30, optimizer="adam", peak_lr=1e-1))
    config.evaluate.every_epochs = 5.0
    config.evaluate.best = "validation/accuracy"
    return configs.tiny(config) if arg == "tiny" else config
