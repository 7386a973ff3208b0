"""Fine-tuning strategies: functions that return plans.

A plan is a tuple of phases and nothing else; a strategy that is not here is a tuple
written by hand. Every keyword is a field of `Phase`.
"""

from finetune_jax.plan import Phase

HEAD_ONLY = (("head/.*", 1.0), (".*", 0.0))
EVERYTHING = ((".*", 1.0),)


def head_only(*, name: str = "head", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains the head and holds all else, BatchNorm included."""
    fields = {"rules": HEAD_ONLY, "batch_stats": "hold", **fields}
    return (Phase(name=name, **fields),)


def full(*, name: str = "all", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains every parameter."""
    return (Phase(name=name, **{"rules": EVERYTHING, **fields}),)
