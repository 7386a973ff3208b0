"""Claim: many updates in one call cost no more than one call for each, small ones less.

.venv/bin/python scripts/bench_many_steps.py [--rounds=5] [NAME ...]

Makes updates of digits, enlarged where the model wants that, with a call for each and with
as many in a call as training chooses, in turn, in one process; examples are read, placed
and gathered as in training. Prints milliseconds an update and the ratio.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.parallel.executor import DeviceExecutor
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.training.setup import make_setup
from finetune_jax.training.updates.dispatch import Scanned
from finetune_jax.training.updates.programs import Updates

HEAD = (("head/.*", 1.0), (".*", 0.0))
# (model, image size, channels, batch size, updates in a round, what learns)
CASES = {
    "linear": ("mlp", 8, 1, 64, 2000, ()),
    "cnn": ("cnn", 28, 1, 64, 20, ()),
    "resnet20": ("resnet20", 28, 1, 32, 8, ()),
    "resnet20 head": ("resnet20", 28, 1, 32, 24, HEAD),
    "efficientnet_lite0": ("efficientnet_lite0", 64, 3, 16, 8, ()),
    "resnet18": ("resnet18", 96, 3, 8, 4, ()),
}


def updates_of(case: tuple) -> Updates:
    """Returns what makes the updates of a case."""
    model, size, channels, batch_size, steps, rules = case
    given = configs.default()
    given.data.update(image_size=size, channels=channels, batch_size=batch_size)
    given.model.name = model
    given.parallel.devices = 1
    phase = Phase(name="bench", steps=10**5, optimizer="adamw", peak_lr=1e-4)
    if rules:
        phase = Phase(**{**vars(phase), "rules": rules, "batch_stats": "hold"})
    given.plan = as_config((phase,))
    config, problems = configs.resolve(given)
    assert not problems, problems
    setup = make_setup(config).in_memory()
    return Updates(
        setup=setup,
        executor=DeviceExecutor(devices=setup.devices),
        fixed={"task": {}},
        say=lambda _: None,
    )


class Runner:
    """Makes updates in one of the ways."""

    def __init__(self, updates: Updates, steps_per_call: int | None):
        """Compiles."""
        setup = updates.setup
        parallel = {"steps_per_call": steps_per_call}
        setup = dataclasses.replace(
            setup, config=setup.config.replaced(parallel=parallel)
        )
        updates = dataclasses.replace(updates, setup=setup)
        phase, (state, _) = setup.phase(0), setup.start()
        opt_state = jax.jit(phase.optimizer().init)(state.params)
        state = state.replace(opt_state=opt_state)
        self._feed = updates.feed(phase, setup.data.train, state, 0, 10**5)
        assert isinstance(self._feed, Scanned) == (steps_per_call is None)
        self._placed = setup.devices.place(state)
        self._updates, self._phase = updates, phase

    def seconds(self, count: int) -> float:
        """Returns the seconds that an update takes, of `count`."""
        begin, made, compile_s = time.perf_counter(), 0, 0.0
        while made < count:
            rates = np.full(count - made, 1e-4, np.float32)
            last = time.perf_counter()
            call = self._feed.call(rates, np.zeros_like(rates))
            program, took, _ = self._updates.program(
                self._phase, self._feed, self._placed, call
            )
            compile_s += took
            rest = self._updates.fixed, *call.arguments
            self._placed, metrics = program(self._placed, *rest)
            jax.block_until_ready(metrics)
            if not took:
                self._feed.took(time.perf_counter() - last)
            made += call.updates
        return (time.perf_counter() - begin - compile_s) / count


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("names", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name in arguments.names:
        updates, count = updates_of(CASES[name]), CASES[name][4]
        runners = Runner(updates, 1), Runner(updates, None)
        found = [
            [r.seconds(count) for r in runners] for _ in range(arguments.rounds + 2)
        ]
        ratios = sorted(many / one for one, many in found[2:])
        one, many = (1e3 * statistics.median(column) for column in zip(*found[2:]))
        print(
            f"{name:20} a call each {one:8.2f} ms, many in a call {many:8.2f} ms: "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
