"""Sharding rules: which axes they divide, and what is refused."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
from command_line import ROOT
from devices import asked

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.parallel.make import for_parameters, make_devices
from finetune_jax.parallel.sharding import Sharding
from finetune_jax.training.setup import make_setup

SIZES = {"data": 1, "fsdp": 4, "model": 2}
KERNEL = "block1/attention/query/kernel"
PARAMS = {
    "block1": {"attention": {"query": {"kernel": (8, 12), "bias": (12,)}}},
    "head": {"kernel": (12, 3)},
}


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_the_longest_divisible_axis_of_an_array_is_divided_from_four_mib_on():
    rules = Sharding()
    assert rules.axes("a", leaf(1024, 1024), SIZES) == ("fsdp", None)
    assert rules.axes("a", leaf(1024, 1023), SIZES) == (None, None)
    assert rules.axes("a", leaf(1024, 1023, dtype=np.float64), SIZES) == ("fsdp", None)
    # The axis of 5001 is longer, but four devices do not divide it.
    assert rules.axes("a", leaf(3, 5001, 800), SIZES) == (None, None, "fsdp")
    assert rules.axes("a", leaf(2**20, 9), SIZES | {"fsdp": 1}) == (None, None)
    assert Sharding(min_bytes=0).axes("a", leaf(), SIZES) == ()


def test_the_first_rule_that_matches_a_whole_name_decides():
    rules = Sharding(
        rules=(
            (".*/attention/.*/kernel", ("fsdp", "model")),
            (".*/kernel", "replicated"),
            ("head/bias", ("model",)),
            (".*", "fsdp"),
        ),
        min_bytes=0,
        names=frozenset((KERNEL, "head/kernel", "head/bias", "stem/bias")),
    )

    def axes(name, *shape):
        return rules.axes(name, leaf(*shape), SIZES)

    assert axes(KERNEL, 8, 12) == ("fsdp", "model")
    assert axes("head/kernel", 8, 12) == (None, None)
    assert axes("head/bias", 12) == ("model",)
    assert axes("stem/bias", 12) == ("fsdp",)
    # Arrays that belong to a parameter, by the end of their names.
    assert axes(f"opt_state/0/mu/{KERNEL}", 8, 12) == ("fsdp", "model")
    assert axes(f"ema/{KERNEL}", 8, 12) == ("fsdp", "model")
    # The statistics of its rows have another rank; one of its blocks does not divide.
    assert axes(f"opt_state/0/rows/{KERNEL}", 8) == ("fsdp",)
    assert axes(f"opt_state/0/blocks/{KERNEL}", 8, 3) == ("fsdp", None)
    # The running average of no parameter, though a parameter's name ends so.
    assert axes("batch_stats/mean", 12) == ("fsdp",)


def test_a_state_is_placed_by_the_rules_and_a_batch_over_two_axes():
    rules = ((".*/query/kernel", ("fsdp", "model")), (".*", "fsdp"))
    devices = make_devices(asked(fsdp=2, model=4, sharding=rules))
    devices = for_parameters(devices, shapes(PARAMS), {"block1": 4})
    assert devices.count == 8 and devices.batch_shards == 2
    host = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes(PARAMS))
    placed = devices.place({"params": host, "ema": {KERNEL: np.ones((8, 12))}})
    query = placed["params"]["block1"]["attention"]["query"]
    for array, shape in (
        (query["kernel"], (4, 3)),
        (placed["ema"][KERNEL], (4, 3)),
        (query["bias"], (6,)),
        (placed["params"]["head"]["kernel"], (6, 3)),
        (devices.place_batch(np.ones((3, 4)), batch_axis=1), (3, 2)),
    ):
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}


@pytest.mark.parametrize(
    "rule, message",
    [
        ("fsdp", r"sharding\[0\]: 'fsdp' is not a pair \(regex, spec\)"),
        (("(", "fsdp"), r"sharding\[0\]: '\(' is not a regular expression: missing"),
        ((".*", "repliacted"), "did you mean 'replicated'"),
        ((".*", ("modle", None)), "no axis 'modle'; did you mean 'model'"),
        ((".*", ("fsdp", "fsdp")), "divides two axes over 'fsdp'"),
    ],
)
def test_rules_that_are_invalid_for_any_model_are_refused(rule, message):
    with pytest.raises(UserError, match=message):
        make_devices(asked(sharding=(rule,)))


def test_all_rules_that_do_not_fit_the_parameters_are_listed():
    rules = (
        ("block1/atention/query/kernel", ("fsdp", "model")),
        (".*/bias", ("fsdp", "model")),
        ("head/kernel", ("fsdp", "model")),
        (".*/query/kernel", (None, "model")),
        (".*", "fsdp"),
    )
    devices = make_devices(asked(fsdp=2, model=4, sharding=rules))
    with pytest.raises(UserError) as found:
        for_parameters(devices, shapes(PARAMS), {"block1": 6})
    assert str(found.value).splitlines() == [
        "config.parallel.sharding[0]: 'block1/atention/query/kernel' matches no "
        f"parameter; did you mean '{KERNEL}'?",
        "config.parallel.sharding[1]: ('fsdp', 'model') has 2 entries, but "
        "block1/attention/query/bias has the shape (12,)",
        "config.parallel.sharding[2]: 4 devices of 'model' do not divide 3 in "
        "head/kernel, which has the shape (12, 3); change config.parallel.model",
        "config.parallel.sharding[3]: 4 devices of 'model' do not divide the 6 "
        "attention heads of block1; change config.parallel.model",
    ]


def test_an_axis_of_one_device_may_be_named():
    rules = ((".*/kernel", (None, "model")), (".*", "fsdp"))
    devices = make_devices(asked(devices=8, sharding=rules))
    devices = for_parameters(devices, shapes(PARAMS), {})
    placed = devices.place(np.ones((12, 3)))
    assert placed.sharding.is_fully_replicated
    with pytest.raises(UserError, match="pmap repeats all parameters"):
        make_devices(asked(mode="pmap", sharding=((".*", ("data", None)),)))


def test_a_run_refuses_rules_that_do_not_fit_its_model():
    rules = "(('.*/kernal', (None, 'fsdp')), ('.*', 'fsdp'))"
    given = small.config(overrides=[("parallel.sharding", rules)])
    assert given.parallel.sharding[0] == (".*/kernal", (None, "fsdp"))
    read = configs.resolve(json.loads(configs.to_json(given)), ())[0]
    assert read.parallel == given.parallel
    with pytest.raises(UserError, match="'.*/kernal' matches no parameter"):
        make_setup(given)


def test_config_files_can_import_the_rules_before_jax_starts():
    program = (
        "import finetune_jax.parallel.sharding, sys; sys.exit('jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0


@pytest.mark.parametrize(
    "parallel, unused",
    [
        (dict(fsdp=4, fsdp_min_mb=4.0), {"fsdp": 4}),
        (dict(fsdp=4), {}),
        (dict(fsdp=2, model=2), {"model": 2}),
        (dict(model=4, sharding=((KERNEL, (None, "model")),)), {}),
        (dict(), {}),
    ],
)
def test_axes_that_divide_no_parameter_are_found(parallel, unused):
    params = shapes(PARAMS)
    devices = make_devices(asked(devices=8, **parallel))
    assert for_parameters(devices, params, {}).unused(params) == unused
