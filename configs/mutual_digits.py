"""Two networks that teach one another: digits, 10 labels of each class.

Question:  Do models that learn together know more than those that learn alone?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/mutual_digits.py
Argument:  `alone` trains the same two, from the same starts, without one another.
Expected:  no gain that five seeds can show. Test accuracy (mean, 95 % interval) 0.935 +-
           0.007 and 0.939 +- 0.008 of the two, 0.942 +- 0.011 of both together; alone
           0.933, 0.934 and 0.939. Pairs of the same seed differ by 0.003 +- 0.005,
           0.004 +- 0.012 and 0.002 +- 0.005 (experiments/domains). Half a minute, two
           CPU cores busy with other work.
Chosen:    by us, and not searched for.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `tiny` makes two updates: `:tiny`, `:alone,tiny`."""
    words = [word for word in arg.split(",") if word]
    if set(words) - {"alone", "tiny"}:
        raise ValueError(f"no variant {arg!r}; there are alone and tiny")
    config = configs.default()
    config.data.update(validation="validation", test="test", per_class=10)
    config.data.update(image_size=16, batch_size=50, mean=(0.5,), std=(0.5,))
    config.task.name = "mutual"
    config.task.weight = 0.0 if "alone" in words else 1.0  # Zhang et al. 2018, eq. 6.
    config.model.name = "cnn"
    config.model.members = (
        ml_collections.ConfigDict({"label": "small", "convolutions": (8, 16)}),
        ml_collections.ConfigDict({"label": "large", "convolutions": (16, 32)}),
    )
    config.plan = as_config(full(steps=300, optimizer="adam", peak_lr=1e-3))
    return configs.tiny(config) if "tiny" in words else config
