"""States of the phases of a plan, and checkpoints of them."""

import jax
import numpy as np
import small

from finetune_jax.plans.phase import Phase
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import make_setup

PLAN = (
    Phase(name="head", steps=2, rules=small.HEAD, batch_stats="hold"),
    Phase(name="slow", steps=2, rules=(("head/.*", 1.0), (".*", 0.1))),
    Phase(name="momentum", steps=2, optimizer="sgd", optimizer_args={"momentum": 0.9}),
    Phase(name="two", steps=2, rules=small.HEAD, accumulate_steps=2),
    Phase(name="frozen head", steps=2, rules=(("head/.*", 0.0), (".*", 1.0))),
)


def some_state(setup, phase, seed=0):
    """Returns a state of a phase's structure with values in every leaf."""
    rng = np.random.default_rng(seed)
    target = setup.target(Progress(phase=phase))
    state = jax.tree.map(
        lambda a: rng.normal(size=a.shape, scale=9).astype(a.dtype), target
    )
    return state.replace(step=np.asarray(phase + 1, np.int32))


def opened(tmp_path, keep=9):
    return Checkpoints(tmp_path / "checkpoints", keep=keep)


def saved(tmp_path):
    """Returns a setup, its checkpoints with the first of two states, and the states."""
    config = small.config(model="cnn", convolutions=(4, 4), dense=(512,), plan=PLAN)
    setup, checkpoints = make_setup(config), opened(tmp_path)
    states = [some_state(setup, phase, seed=phase) for phase in (0, 1)]
    if not checkpoints.steps():
        checkpoints.save(states[0], Progress(phase=0))
    return setup, checkpoints, states
