"""A classifier of digits for noisy digits that nobody has labelled.

Question:  How much of the accuracy that noise takes does adaptation give back?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/adapt_digits.py
Argument:  `tiny` makes two updates a phase.
Expected:  test accuracy 0.568 of noisy digits, 0.953 of clean ones (seed 0); other seeds
           were not run. experiments/domains compares methods, with fewer examples an
           update, over five seeds. Two CPU cores busy with other work, 45 seconds.

Source and target are cut alike, so that no image of the target's test split was in the
source's training split. The last phase trains nothing: running averages of BatchNorm
become the target's (AdaBN).
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = configs.default()
    config.task = dict(name="domain_adapt", method="dann", strength=0.3)
    clean = dict(domain="clean", stratified=False)
    noisy = dict(domain="noisy", labelled=False, shift=(("noise", 0.5),))
    config.data.update(
        domains=tuple(map(ml_collections.ConfigDict, (clean, noisy))),
        name="digits",
        validation="validation",
        test="test",
        batch_size=128,
    )
    config.model.name = "cnn"
    config.model.convolutions = (16, 32)
    config.model.dense = (64,)
    config.model.kernel_size = 3
    learn = Phase(name="learn", steps=400, optimizer="adam", peak_lr=3e-3)
    adapt = Phase(
        name="adapt",
        steps=60,
        optimizer="sgd",
        rules=((".*", 0.0),),
        batch_stats="update_all",
    )
    config.plan = as_config((learn, adapt))
    config.evaluate.every_steps = 100
    return configs.tiny(config) if "tiny" in arg else config
