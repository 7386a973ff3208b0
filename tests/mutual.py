"""Configs of several models that learn from one another."""

import small

from finetune_jax import config as configs

LARGE = {"label": "large", "name": "mlp", "hidden": (8, 8)}

CNN = {"label": "cnn", "name": "cnn", "convolutions": (4,), "dense": (8,)}


def config(members=(LARGE, CNN), plan=(), overrides=(), **task):
    given = small.config(model="mlp", plan=plan)
    with given.unlocked():
        given.task = {"name": "mutual", **task}
        given.model.members = members
    resolved, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return resolved
