"""Memory of an update on each device, from shapes, shardings and the compiled program."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.backend import traced_for
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.optim.regularisers import READS_FISHER, READS_START
from finetune_jax.parallel.collectives import Traffic, collectives
from finetune_jax.parallel.devices import Devices, bytes_per_device
from finetune_jax.parallel.executor import DeviceExecutor
from finetune_jax.parallel.make import for_parameters, make_devices
from finetune_jax.tasks.components.multi_domain import shares
from finetune_jax.tasks.task import Task
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import Setup, make_setup
from finetune_jax.training.updates.programs import Updates

BFLOAT16 = "config.precision=bfloat16 (computation; parameters stay float32)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateMemory:
    """Bytes that an update needs on one device.

    Attributes:
        parameters: Bytes of the parameters.
        optimizer: Bytes of the optimizer's state.
        other: Bytes of batch statistics, averages, and arrays that no update changes.
        batch: Bytes of the batch.
        temporaries: Bytes of gradients, activations and the like, by the compiler.
        results: Bytes of the results that do not replace an argument.
        traffic: Collectives of the update, by kind.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int
    temporaries: int
    results: int
    traffic: dict[str, Traffic]

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return (
            self.parameters + self.optimizer + self.other
            + self.batch + self.temporaries + self.results
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """A change of the config that saves memory.

    Attributes:
        change: The change, as an override or in words.
        nbytes: Bytes that it saves on each device.
        is_estimate: Whether the bytes are an estimate instead of the compiler's.
    """

    change: str
    nbytes: int
    is_estimate: bool = False


def batch_shapes(
    task: Task, spec: dict, examples: int, micro: int | None = None
) -> dict:
    """Returns the shapes of a batch or of k micro-batches; a dict of them for domains.

    Args:
        task: Task of the run.
        spec: Shapes of an example, such as `task.batch_spec`.
        examples: Number of examples.
        micro: Number of micro-batches; None for no axis of them.
    """

    def leading(size: int) -> tuple[int, ...]:
        return (size,) if micro is None else (micro, size // micro)

    by_domain = shares(task)
    if not by_domain:
        return _batch(spec, leading(examples))
    return {name: _batch(spec[name], leading(n)) for name, n in by_domain.items()}


def _batch(spec: dict, leading: tuple[int, ...]) -> dict:
    shapes = {
        name: jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype)
        for name, leaf in spec.items()
    }
    shapes["weight"] = jax.ShapeDtypeStruct(leading, jnp.float32)
    shapes["position"] = jax.ShapeDtypeStruct(leading, jnp.int32)
    return shapes


def update_memory(setup: Setup, index: int) -> UpdateMemory:
    """Returns the memory of an update of a phase; compiles it without any arrays.

    Inputs are those of the data: cached features, which may replace them, are smaller.

    Args:
        setup: Setup of the run.
        index: Index of the phase.
    """
    phase, devices, task = setup.phase(index), setup.devices, setup.task
    state = devices.placed_shapes(setup.shapes_at(Progress(phase=index)))
    fixed = devices.placed_shapes(_fixed_shapes(setup))
    size, micro = setup.config.data.batch_size, phase.phase.accumulate_steps
    batch = batch_shapes(task, task.train_batch_spec, size, micro)
    batch = devices.batch_shapes(batch, batch_axis=1)
    updates = Updates(
        setup=setup, executor=DeviceExecutor(devices=devices), fixed=fixed, say=print
    )
    number = np.float32(0)
    with traced_for(devices.platform):
        compiled = devices.compile_train(
            updates.step(phase), state, fixed, batch, number, number, for_running=False
        )
    needs = compiled.program.memory_analysis()
    parameters = bytes_per_device(state.params)
    optimizer = bytes_per_device(state.opt_state)
    return UpdateMemory(
        parameters=parameters,
        optimizer=optimizer,
        other=bytes_per_device((state, fixed)) - parameters - optimizer,
        batch=bytes_per_device(batch),
        temporaries=needs.temp_size_in_bytes,
        results=needs.output_size_in_bytes - needs.alias_size_in_bytes,
        traffic=collectives(compiled.program.as_text()),
    )


def _fixed_shapes(setup: Setup) -> dict[str, Any]:
    """Returns the shapes of the arrays that updates read and never change."""
    teachers, params = setup.task.teachers, named(setup.shapes.params)
    fixed: dict[str, Any] = {"task": {} if teachers is None else teachers.shapes()}
    if setup.regularisers & set(READS_START):
        fixed["start"] = params
    if setup.regularisers & set(READS_FISHER):
        fixed["fisher"] = params
    return fixed


def memory_limit(setup: Setup) -> float | None:
    """Returns the bytes that a device has; None if they are unknown."""
    if (asked := setup.config.parallel.device_memory_gb) is not None:
        return asked * 1e9
    there = jax.local_devices()
    mine = [device for device in setup.devices.mesh.devices.flat if device in there]
    return (mine[0].memory_stats() or {}).get("bytes_limit") if mine else None


def savings(setup: Setup, index: int, now: UpdateMemory) -> list[Saving]:
    """Returns changes of the config that save memory in a phase, the largest first.

    Each is compiled. Those that save less than a hundredth are left out.

    Args:
        setup: Setup of the run.
        index: Index of the phase.
        now: Memory of the phase with the config as it is.
    """
    found = []
    for change, other in _variants(setup, index):
        saved = now.total - update_memory(other, index).total
        found.append(Saving(change=change, nbytes=saved))
        if other.config.data.batch_size < setup.config.data.batch_size:
            if setup.config.precision == "float32":
                # Activations take half as much, too. The compiler of a CPU does not
                # tell, since it computes in float32 even so.
                half = Saving(change=BFLOAT16, nbytes=saved, is_estimate=True)
                found.append(half)
    found = [saving for saving in found if saving.nbytes > now.total / 100]
    return sorted(found, key=lambda saving: -saving.nbytes)


def _variants(setup: Setup, index: int) -> Iterator[tuple[str, Setup]]:
    """Yields changes of the config, and the setup with each."""
    config, devices = setup.config, setup.devices
    replace, phase = dataclasses.replace, setup.plan[index]
    fsdp = devices.count // config.parallel.model
    if fsdp > config.parallel.fsdp and config.parallel.mode == "jit":
        parallel = replace(config.parallel, fsdp=fsdp)
        other = _with_devices(setup, make_devices(parallel))
        if other is not None:
            yield f"config.parallel.fsdp={fsdp} (state divided among devices)", other
    size, micro = config.data.batch_size, 2 * phase.accumulate_steps
    if size % (micro * devices.batch_shards) == 0 and not setup.data.spec.domains:
        plan = list(setup.plan)
        plan[index] = replace(phase, accumulate_steps=micro)
        change = f"config.plan[{index}].accumulate_steps={micro}"
        yield change, replace(setup, plan=tuple(plan))
    half, shards = size // 2, phase.accumulate_steps * devices.batch_shards
    if half and half % shards == 0 and not setup.data.spec.domains:
        other = replace(setup, config=config.replaced(data={"batch_size": half}))
        yield f"config.data.batch_size={half} (other training)", other
    if not config.model.get("remat", False):
        try:
            with_remat = config.replaced(model={"remat": True})
            other = make_setup(with_remat, setup.data)
        except UserError:
            return  # The model does not have it.
        change = "config.model.remat=True (activations computed twice)"
        yield change, replace(other, devices=devices, plan=setup.plan)


def _with_devices(setup: Setup, devices: Devices) -> Setup | None:
    """Returns the setup on other devices; None if sharding rules do not fit them."""
    heads = setup.task.models.attention_heads
    try:
        devices = for_parameters(devices, setup.shapes.params, heads)
    except UserError:
        return None
    return dataclasses.replace(setup, devices=devices)
