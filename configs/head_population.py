"""Many new heads on one frozen, pretrained ResNet: digits.

Question:  Which rate and decay does a head want, and how much do seeds matter?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/head_population.py
Expected:  64 heads and a table of them; the best by validation, a rate of 0.3 and a decay
           of 1e-3, has test accuracy 0.923 +- 0.003 over four seeds. Two CPU cores, 40
           seconds; one head takes half a minute.
Chosen:    the values, by us.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.config import grid
from finetune_jax.plans import as_config, head_only


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates of two heads."""
    config = configs.default()
    config.data.update(train="train", validation="validation", test="test")
    config.data.update(image_size=16, mean=(0.5,), std=(0.5,))
    config.init.pretrained = "zoo:resnet20_fashion_mnist"
    config.init.fresh = ("head/.*",)
    config.plan = as_config(head_only(epochs=30, optimizer="adam"))
    config.evaluate.best = "validation/accuracy"
    config.evaluate.every_epochs = 5.0
    values = {
        "plan[0].peak_lr": (1.0, 0.3, 0.1, 0.03),
        "plan[0].weight_decay": (0.0, 1e-4, 1e-3, 1e-2),
        "seed": (0, 1, 2, 3),
    }
    if arg == "tiny":
        values = {"plan[0].peak_lr": (0.3, 0.1)}
        config = configs.tiny(config)
    elif arg:
        raise ValueError(f"no variant {arg!r}; there is tiny")
    config.population = grid(values)
    return config
