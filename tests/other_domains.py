"""Configs of runs that are measured on other domains."""

import small

from finetune_jax import config as configs
from finetune_jax.plans.phase import Phase, as_config

PLAN = (Phase(name="head", steps=3, rules=small.HEAD, batch_stats="hold", peak_lr=0.1),
        Phase(name="all", steps=3, peak_lr=1e-2))  # fmt: skip

CNN = {"convolutions": (4,), "dense": ()}


def config(also, hidden=(8,), plan=PLAN, **overrides):
    """Returns a config of a small model on digits with some entries of `also`."""
    given = configs.default()
    given.data.update(validation="validation", test="test", batch_size=32, image_size=8)
    given.model.name = "mlp" if hidden else "cnn"
    given.model.update({"hidden": hidden} if hidden else CNN)
    given.plan = as_config(plan)
    given.parallel.devices = 1
    given.evaluate.every_steps = 2
    given.evaluate.also = tuple(also)
    for key, value in overrides.items():
        section, _, name = key.rpartition("__")
        given[section][name] = value
    resolved, problems = configs.resolve(given)
    assert not problems, problems
    return resolved
