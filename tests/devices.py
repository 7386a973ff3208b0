"""A task trained on one device, on eight under jit, and on eight under pmap."""

import functools

import jax
import numpy as np
import small

from finetune_jax.config.schema import Parallel
from finetune_jax.core.pytrees import named
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.parallel.compiling import compiled, run_once
from finetune_jax.parallel.make import for_parameters, make_devices
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.step import NORMS, train_step


def asked(**values):
    """Returns a section `config.parallel` that shards arrays of any size."""
    return Parallel(**{"fsdp_min_mb": 0.0, **values})


KINDS = {
    "one": dict(mode="jit", devices=1, fsdp=1),
    "jit": dict(mode="jit", devices=8, fsdp=1),
    "fsdp": dict(mode="jit", devices=8, fsdp=4),
    "pmap": dict(mode="pmap", devices=8, fsdp=1),
}

FIXED = {"task": {}}


def trained(kind, task, phase, batches):
    """Returns (state on the host, losses, logits) after an update on each batch.

    Args:
        kind: Key of `KINDS`, or values of the section `config.parallel`.
    """
    devices = make_devices(asked(**(KINDS[kind] if isinstance(kind, str) else kind)))
    state = run_once(lambda: random_state(task, 0))
    devices = for_parameters(devices, state.params, task.models.attention_heads)
    names = tuple(named(state.params))
    setup = phase_setup((phase,), 0, task, names, devices.axis_name)
    optimizer = setup.optimizer()
    opt_state = jax.tree.map(np.asarray, jax.jit(optimizer.init)(state.params))
    step = functools.partial(train_step, static=setup.update(task))
    placed = devices.place(state.replace(opt_state=opt_state))
    program, losses, fixed = None, [], devices.place(FIXED)
    for batch in batches:
        batch = devices.place_batch(batch, batch_axis=1)
        arguments = (placed, fixed, batch, np.float32(0.01), np.float32(0))
        program = program or devices.compile_train(step, *arguments)
        placed, metrics = program.call(*arguments)
        norms = metrics.pop(NORMS)
        named_norms = {f"{k}/{s}": n for k, of in norms.items() for s, n in of.items()}
        found = {name: float(v) for name, v in (metrics | named_norms).items()}
        losses.append(found)
    whole = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches[0])
    whole = devices.place_batch(whole, batch_axis=0)
    arguments = (placed.params, placed.batch_stats, whole)
    predict = functools.partial(eval_step, task=task)
    outputs = compiled(devices.over_devices(predict), *arguments).call(*arguments)
    return devices.to_host(placed), losses, devices.rows_to_host(outputs)["logits"]


def batches(count, micro_batches=1):
    made = [small.batch(32, (8, 8, 1), micro_batches, seed) for seed in range(count)]
    for batch in made:
        batch["weight"].reshape(-1)[:3] = (0.0, 2.0, 0.5)
    return made


def assert_close(ours, theirs, tolerance):
    for name, leaf in named(ours).items():
        other = named(theirs)[name]
        scale = max(np.abs(other).max(), 1e-3)
        assert np.abs(leaf - other).max() <= tolerance * scale, name
