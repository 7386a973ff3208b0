"""Memory in a plan: bytes per device, what does not fit, devices that are not there."""

import os
import subprocess
import sys

import jax
import pytest
import small
from command_line import ROOT

from finetune_jax.core.errors import UserError
from finetune_jax.modes import plan as plan_mode
from finetune_jax.modes.options import Options
from finetune_jax.plans.phase import Phase
from finetune_jax.training.setup import make_setup
from finetune_jax.training.updates import memory
from finetune_jax.training.updates.memory import update_memory

SIZE, WIDTH = 12, 64
ALL = (Phase(name="all", steps=2),)
MLP = {"model": "mlp", "hidden": (WIDTH,)}


def config(*, plan=ALL, overrides=(), **parallel):
    given = {"devices": 8, "fsdp_min_mb": 0.0, **parallel}
    pairs = [(f"parallel.{key}", repr(value)) for key, value in given.items()]
    pairs = [(key, text.strip("'")) for key, text in pairs]
    return small.config(plan=plan, overrides=[*pairs, *overrides], **MLP)


def by_hand(fsdp):
    """Returns the bytes of parameters of the network on one device."""
    first, last = SIZE * SIZE * WIDTH, WIDTH * 10
    # 10 logits are not divided by four, but the 64 rows of their kernel are.
    return 4 * ((first + last + WIDTH) // fsdp + 10)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_bytes_on_a_device_are_those_counted_by_hand_and_by_xla(fsdp, monkeypatch):
    of_arguments, analysis = [], jax.stages.Compiled.memory_analysis

    def seen(program):
        of_arguments.append(analysis(program).argument_size_in_bytes)
        return analysis(program)

    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", seen)
    found = update_memory(make_setup(config(fsdp=fsdp)), 0)
    assert found.parameters == by_hand(fsdp)
    assert found.optimizer == 2 * by_hand(fsdp) + 4  # Adam's moments and its counter.
    # 4 of the 32 images with label, weight and position; step and two keys.
    assert found.batch == 4 * (SIZE * SIZE + 3 * 4)
    assert found.other == 4 + 16
    placed = found.parameters + found.optimizer + found.other + found.batch
    # The positions are not read without augmentation; the learning rate is.
    assert of_arguments == [placed - 4 * 4 + 4]
    assert found.temporaries > 0
    kinds = {"all-reduce"} if fsdp == 1 else {"all-reduce", "all-gather"}
    assert kinds == found.traffic.keys()


def test_under_pmap_every_device_has_all_parameters():
    found = update_memory(make_setup(config(mode="pmap")), 0)
    assert found.parameters == by_hand(1)
    assert found.batch == 4 * (SIZE * SIZE + 3 * 4)


def planned(capsys, given):
    assert plan_mode.main(given, Options(config="", workdir=None)) == 0
    return capsys.readouterr().out


def test_a_plan_for_several_devices_has_a_row_for_each_program(capsys):
    head = Phase(name="head", steps=2, rules=small.HEAD)
    plan = (head, Phase(name="all", steps=2), Phase(name="more", steps=3))
    printed = planned(capsys, config(plan=plan, fsdp=4, model=2))
    assert "each device of 8 (1 data x 4 fsdp x 2 model)" in printed
    assert "temporaries are those of the CPU compiler" in printed
    lines = [line for line in printed.splitlines() if "traffic" in line]
    assert [line.split(":")[0] for line in lines] == [
        "traffic  head",
        "traffic  all, more",
    ]
    assert all("all-reduce (" in line for line in lines)
    assert "changes that save memory" not in printed


def test_what_does_not_fit_is_told_with_what_saves_most(capsys):
    given = config(overrides=[("model.hidden", "(4096,)")], device_memory_gb=0.008)
    printed = planned(capsys, given)
    asks = "warning: phase 'all' needs 12.7 MB on each device, which has 8.0 MB"
    assert asks in printed
    lines = printed[printed.index(asks) :].splitlines()[1:]
    advice = [line for line in lines if line.startswith("  config.")]
    # Of parameters and Adam's moments, 7.6 MB, a device has an eighth; gathered parameters
    # are temporaries.
    (line,) = advice  # The activations of 32 examples are small.
    assert line.startswith(
        "  config.parallel.fsdp=8 (state divided among devices): 6.5"
    )
    assert line.endswith("MB less, which is enough")


@pytest.mark.exhaustive
def test_activations_are_what_smaller_batches_save(capsys):
    # Many examples of each device, and few parameters.
    given = config(
        overrides=[("data.batch_size", "1024"), ("model.hidden", "(256, 256, 256)")],
        devices=2, device_memory_gb=0.001,
    )  # fmt: skip
    printed = planned(capsys, given)
    found = dict(
        line.strip().split(": ")
        for line in printed.splitlines()
        if line.startswith("  config.") and " less" in line
    )
    units = {"kB": 1e3, "MB": 1e6}
    words = [text.removeprefix("about ").split() for text in found.values()]
    sizes = [float(size) * units[unit] for size, unit, *_ in words]
    assert sizes == sorted(sizes, reverse=True)
    assert {key.split("=")[0] for key in found} == {
        "config.data.batch_size", "config.precision", "config.parallel.fsdp",
        "config.plan[0].accumulate_steps",
    }  # fmt: skip
    # Three layers of 256 values in float32, for 256 examples less on each device.
    assert sizes[0] > 3 * 256 * 4 * 256


def test_nothing_is_compiled_for_one_device_that_need_not_fit(capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert "memory" not in planned(capsys, config(devices=1))
    with pytest.raises(AssertionError, match="was compiled"):
        planned(capsys, config(devices=1, device_memory_gb=1.0))


def test_a_plan_refuses_sharding_rules_that_do_not_fit():
    given = config(sharding=((".*/kernel", ("model", None, None)), (".*", "fsdp")))
    with pytest.raises(UserError, match=r"sharding\[0\]: .* has 3 entries, but"):
        plan_mode.main(given, Options(config="", workdir=None))


def test_rematerialisation_and_smaller_batches_are_tried(monkeypatch):
    image = [("parallel.devices", "2"), ("data.image_size", "16")]
    given = small.config(overrides=image, model="vit_tiny_patch16")
    made = make_setup(given)
    changes = [change for change, _ in memory._variants(made, 0)]
    assert changes == [
        "config.parallel.fsdp=2 (state divided among devices)",
        "config.plan[0].accumulate_steps=2",
        "config.data.batch_size=16 (other training)",
        "config.model.remat=True (activations computed twice)",
    ]


def test_a_topology_without_its_compiler_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="topology: 'v5e:2x4' needs the compiler for"):
        plan_mode.main(config(topology="v5e:2x4"), Options(config="", workdir=None))


@pytest.mark.slow
def test_devices_that_are_not_there_are_planned_for(tmp_path):
    arguments = [
        f"--config={ROOT / 'configs' / 'iris_mlp.py'}", "--mode=plan",
        "--config.parallel.devices=16", "--config.parallel.fsdp=16",
        "--config.data.batch_size=48",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-m", "finetune_jax.main", *arguments], cwd=ROOT,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "16 CPU devices stand for those of the run" in run.stdout
    assert "each device of 16 (1 data x 16 fsdp x 1 model)" in run.stdout
