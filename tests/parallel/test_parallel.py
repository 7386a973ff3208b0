"""One device, eight under jit, eight under pmap: the same training."""

import functools
import threading
import time

import jax
import numpy as np
import pytest
import small
from devices import FIXED, KINDS, asked, assert_close, batches, trained

from finetune_jax.core.array_store import concatenated
from finetune_jax.core.backend import traced_for
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.parallel.compiling import run_once
from finetune_jax.parallel.devices import concurrent_batch
from finetune_jax.parallel.executor import outputs
from finetune_jax.parallel.make import make_devices
from finetune_jax.plans.micro_batches import check_batch
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.step import train_step


@pytest.mark.slow
@pytest.mark.parametrize("model, steps", [("cnn", 5), ("resnet8", 20)])
@pytest.mark.ci_runs("cnn-5")
def test_devices_agree_in_float64(model, steps):
    """Weighed examples, two micro-batches, BatchNorm over the global batch."""
    arguments = {"convolutions": (4, 8), "dense": (64,)} if model == "cnn" else {}
    with jax.enable_x64(True):
        task = small.task(
            model, (8, 8, 1), overrides=[("precision", "float64")], **arguments
        )
        phase = Phase(
            name="all", steps=steps, optimizer="sgd", optimizer_args={"momentum": 0.9},
            clip_norm=1.0, accumulate_steps=2,
        )  # fmt: skip
        found = {kind: trained(kind, task, phase, batches(steps, 2)) for kind in KINDS}
    state, losses, logits = found["one"]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("f8")}
    for kind in ("jit", "fsdp", "pmap"):
        ours, our_losses, our_logits = found[kind]
        assert_close(ours.params, state.params, 1e-10)
        assert_close(ours.batch_stats, state.batch_stats, 1e-10)
        assert_close(ours.opt_state, state.opt_state, 1e-10)
        np.testing.assert_allclose(our_logits, logits, rtol=1e-9, atol=1e-9)
        for mine, other in zip(our_losses, losses):
            assert mine == pytest.approx(other, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jit", "fsdp", "pmap"])
@pytest.mark.ci_runs("fsdp")
def test_the_first_loss_agrees_in_float32(kind):
    task = small.task("cnn", shape=(8, 8, 1), convolutions=(4, 8), dense=(64,))
    phase = Phase(name="all", steps=2, optimizer="sgd")
    one = trained("one", task, phase, batches(2))
    many = trained(kind, task, phase, batches(2))
    for name in ("loss", "accuracy", "grad_norm"):
        assert many[1][0][name] == pytest.approx(one[1][0][name], rel=1e-5)
    assert_close(many[0].batch_stats, one[0].batch_stats, 1e-4)


@pytest.mark.bits
@pytest.mark.slow
def test_a_step_takes_less_memory_than_in_xlas_own_order_and_is_the_same_bits():
    task = small.task(shape=(8, 8, 1))
    state = run_once(lambda: random_state(task, 0))
    phase = (Phase(name="all", steps=1, optimizer="sgd"),)
    setup = phase_setup(phase, 0, task, tuple(named(state.params)))
    state = state.replace(opt_state=setup.optimizer().init(state.params))
    step = functools.partial(train_step, static=setup.update(task))
    batch = batches(1)[0]
    arguments = (state, FIXED, batch, np.float32(0.01), np.float32(0))
    xlas = jax.jit(step).lower(*arguments).compile()
    devices = make_devices(asked(**KINDS["one"]))
    placed = devices.place(state)
    ours = devices.compile_train(step, placed, *arguments[1:]).call
    found, wanted = (c.memory_analysis().temp_size_in_bytes for c in (ours, xlas))
    assert found <= 0.75 * wanted
    one, other = xlas(*arguments), ours(placed, *arguments[1:])
    for leaf, same in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(leaf, same)


def test_a_program_writes_its_result_where_a_state_of_its_own_lies():
    # An array that jax has made lies where a CPU can read it as it is.
    host = {"kernel": np.asarray(jax.numpy.arange(2**16, dtype=np.float32))}
    devices = make_devices(asked(**KINDS["one"]))
    step = devices.compile_train(
        lambda state, x: ({"kernel": state["kernel"] + x}, x),
        devices.place(host),
        np.float32(1),
    )
    placed = devices.place(host, own=True)
    place = placed["kernel"].unsafe_buffer_pointer()
    result, _ = step.call(placed, np.float32(1))
    assert result["kernel"].unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(host["kernel"], np.arange(2**16))


class Calls:
    """Computes batches, and counts how many are in work at a time."""

    def __init__(self, fails_at=None):
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.fails_at, self.threads = fails_at, set()

    def ready(self, batch):
        return functools.partial(self.call, batch)

    def call(self, batch):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.current_thread())
        time.sleep(0.05 if int(batch[0]) % 2 else 0.01)
        if int(batch[0]) == self.fails_at:
            raise ValueError("no such row")
        with self.lock:
            self.now -= 1
        return batch + 1


def at_a_time(calls, at_once):
    devices = make_devices(asked(**KINDS["one"]))
    batches = (np.full(3, number) for number in range(9))
    return outputs(devices, calls.ready, batches, at_once=at_once)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_outputs_come_in_order_however_many_are_computed_at_a_time(at_once):
    calls = Calls()
    found = np.stack(list(at_a_time(calls, at_once)))
    np.testing.assert_array_equal(found[:, 0], 1 + np.arange(9))
    assert calls.most == at_once


def test_a_batch_that_fails_ends_what_computes_the_others():
    calls = Calls(fails_at=4)
    found = at_a_time(calls, 2)
    with pytest.raises(ValueError, match="no such row"):
        list(found)
    assert not any(thread.is_alive() for thread in calls.threads)


def test_examples_at_a_time_are_those_that_were_asked_for(monkeypatch):
    one = make_devices(asked(**KINDS["one"]))
    eight = make_devices(asked(**KINDS["jit"]))
    monkeypatch.setenv("NPROC", "2")
    assert [concurrent_batch(one, count) for count in (1, 7, 64)] == [1, 4, 32]
    assert [concurrent_batch(eight, count) for count in (1, 8, 20)] == [8, 8, 24]
    with traced_for("gpu"):
        assert concurrent_batch(one, 64) == 64
    monkeypatch.setenv("NPROC", "1")
    assert concurrent_batch(one, 64) == 64


@pytest.mark.parametrize("shape, dtype", [((3, 5), np.float32), ((0, 2), np.int32)])
def test_a_cpu_reads_aligned_arrays_where_they_lie(shape, dtype):
    devices = make_devices(asked(**KINDS["one"]))
    parts = [np.ones(shape, dtype), np.full((2, *shape[1:]), 2, dtype)]
    array = concatenated(parts)
    np.testing.assert_array_equal(array, np.concatenate(parts), strict=True)
    placed = devices.place(array)
    assert placed.unsafe_buffer_pointer() == array.ctypes.data


def test_impossible_devices_are_refused():
    for given, message in (
        (dict(mode="jit", devices=9, fsdp=1), "there are 8 devices"),
        (dict(mode="jit", devices=8, fsdp=3), "3 does not divide 8"),
        (dict(mode="jit", devices=8, model=3), "model: 3 does not divide 8"),
        (dict(devices=8, fsdp=4, model=4), "8 devices are not a multiple .* 4 \\* 4"),
        (dict(devices=8, fsdp=0), "fsdp: 0; more than 0 is needed"),
        (dict(mode="pmap", devices=8, fsdp=2), "use jit"),
        (dict(mode="pmap", devices=8, model=2), "model: pmap repeats .* use jit"),
    ):
        with pytest.raises(UserError, match=message):
            make_devices(asked(**given))
    plan = (Phase(name="a", steps=1), Phase(name="b", steps=1, accumulate_steps=3))
    with pytest.raises(
        UserError, match="32 examples in 3 micro-batches over 8 devices in phase 'b'"
    ):
        check_batch(32, plan, 8)
    check_batch(48, plan, 8)
