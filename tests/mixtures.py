"""Small configs of several domains, and updates of them without files."""

import functools

import jax
import numpy as np
import small
from devices import KINDS, asked

from finetune_jax.core.pytrees import named
from finetune_jax.data.domains import mixed_batches
from finetune_jax.parallel.compiling import run_once
from finetune_jax.parallel.make import make_devices
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.setup import make_setup
from finetune_jax.training.step import train_step

SGD = Phase(name="all", steps=3, optimizer="sgd", optimizer_args={"momentum": 0.9})
INVERTED = {"domain": "inverted", "name": "digits", "shift": (("invert",),)}


def config(*domains, task="joint", plan=(SGD,), overrides=(), data=(), **arguments):
    """Returns a resolved config of domains of 8x8 digits."""
    given = small.editable(small.config(model="mlp", hidden=(8,), plan=plan))
    given.data.update({"image_size": 8, "batch_size": 16} | dict(data))
    given.data.domains = domains
    given.task = {"name": task, **arguments}
    return small.resolved(given, overrides)


def trained(config, *, updates=3, rate=0.1):
    """Returns (trainer, last metrics) after updates of a run's first phase."""
    setup = make_setup(config)
    state, _ = setup.start()
    trainer = small.Trainer(setup.task, setup.plan[0], state=state)
    batches = mixed_batches(
        setup.data.train, seed=config.seed, micro_batches=1, updates=range(updates)
    )
    metrics = {}
    for batch in batches:
        metrics = trainer.update(batch, rate)
    return trainer, metrics


def assert_close(ours, theirs, tolerance):
    assert set(ours) == set(theirs)
    for name, leaf in ours.items():
        np.testing.assert_allclose(
            leaf, theirs[name], rtol=0, atol=tolerance, err_msg=name
        )


def nested_batch(sizes, *, shapes=None, unlabelled=(), seed=0):
    """Returns a batch [1, b, ...] of each domain."""
    found = {}
    for index, (name, size) in enumerate(sizes.items()):
        shape = (shapes or {}).get(name, (8, 8, 1))
        found[name] = small.batch(size, shape, seed=seed + index)
        if name in unlabelled:
            del found[name]["label"]
    return found


def host(tree):
    return jax.tree.map(np.asarray, tree)


def on_devices(kind, task, phase, batches):
    """Returns (state on the host, losses) after an update on each batch."""
    devices = make_devices(asked(**KINDS[kind]))
    state = run_once(lambda: random_state(task, 0))
    names = tuple(named(state.params))
    setup = phase_setup((phase,), 0, task, names, devices.axis_name)
    opt_state = host(jax.jit(setup.optimizer().init)(state.params))
    step = functools.partial(train_step, static=setup.update(task))
    placed = devices.place(state.replace(opt_state=opt_state))
    program, losses = None, []
    for batch in batches:
        batch = devices.place_batch(batch, batch_axis=1)
        arguments = placed, {"task": {}}, batch, np.float32(0.1), np.float32(0.5)
        program = program or devices.compile_train(step, *arguments)
        placed, metrics = program.call(*arguments)
        losses.append(float(metrics["loss"]))
    return devices.to_host(placed), losses
