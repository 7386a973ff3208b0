"""Configs of several models that learn from one another."""

import small

LARGE = {"label": "large", "name": "mlp", "hidden": (8, 8)}

CNN = {"label": "cnn", "name": "cnn", "convolutions": (4,), "dense": (8,)}


def config(members=(LARGE, CNN), plan=(), overrides=(), **task):
    given = small.editable(small.config(model="mlp", plan=plan))
    given.task = {"name": "mutual", **task}
    given.model.members = members
    return small.resolved(given, overrides)
