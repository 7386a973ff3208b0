"""Digits and clothes learned together: one backbone, two heads.

Question:  Do few digits gain from sharing a backbone with many clothes?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/joint_digits_fashion.py \
               --config.data.domains[1].dir=FASHION_MNIST
           The folder has the four IDX files.
Argument:  `tiny` makes two updates.
Expected:  not run to its end, so that no test accuracy is known; experiments/domains asks
           the same of a smaller model. With seed 0, all 100 digits are learned by update
           30 and stay so up to 160, where it was stopped. With
           `balance="uncertainty"` their weight has no bound once they are learned:
           accuracy in training fell from 1.0 to 0.14 by update 70 and had not come back
           by 190. A second an update, two CPU cores busy with other work.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = configs.default()
    config.task = dict(
        name="joint",
        shared=(r"(?!head/).*",),  # All but the heads.
        statistics="domain",  # Of BatchNorm: digits are darker than clothes.
        balance="domains",  # Chosen by the training loss: see above.
    )
    digits = dict(domain="digits", name="digits", per_class=10)
    fashion = dict(domain="fashion", name="idx", train="train[:90%]")
    fashion["validation"] = "train[90%:]"
    config.data.update(
        domains=tuple(map(ml_collections.ConfigDict, (digits, fashion))),
        validation="validation",
        test="test",
        batch_size=128,  # Half of them digits.
        image_size=16,
        channels=1,
    )
    config.model.name = "resnet20"
    both = Phase(
        name="both",
        steps=1000,
        optimizer="sgd",
        optimizer_args={"momentum": 0.9},
        peak_lr=0.05,
        warmup_steps=50,
        weight_decay=5e-4,
    )
    config.plan = as_config((both,))
    config.evaluate.every_steps = 250
    config.evaluate.best = "validation/digits/accuracy"
    return configs.tiny(config) if "tiny" in arg else config
