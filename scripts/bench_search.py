"""Claim: 60 trials of TPE with pruning reach the best of a grid of 64 in fewer updates.

.venv/bin/python scripts/bench_search.py [--seeds=0,1,2,3,4] [--trials=60]
  [--pruner=NAME]

The head of configs/resnet_head.py, 30 epochs on cached features, an evaluation every two
epochs. The search has the rate, weight decay, label smoothing and optimizer, SGD with its
momentum or Adam with its betas; the grid has the same ranges, 2 optimizers by 4 rates by 4
decays by 2 smoothings. Each seed draws the proposals and trains the heads of both. Prints
the best validation accuracy, its test accuracy, the updates of all trials, and those until
a trial was as good as the best of the grid. All runs are made in one process, in the order
in which workers would make them.
"""

import argparse
import functools
import json
import pathlib
import tempfile
import time
from typing import Any

from finetune_jax import config as configs
from finetune_jax.modes.startup import pin_environment
from finetune_jax.sweeps import Choice, Float, Halving, Median, Search
from finetune_jax.sweeps.search.proposals import is_pruned, proposal
from finetune_jax.sweeps.search.pruning import Judge, Trial, curve_of

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "resnet_head.py"
METRIC = "validation/accuracy"
RATE, ARGS = "plan[0].peak_lr", "plan[0].optimizer_args"
# Each value of an optimizer's arguments and of the smoothing is a program of its own;
# rates and decays are arguments of programs.
SPACE = {
    "optimizer": Choice(
        {
            "sgd": {
                "plan[0].optimizer": "sgd",
                RATE: Float(1e-2, 10.0, log=True),
                f"{ARGS}.momentum": Choice((0.0, 0.5, 0.9)),
            },
            "adam": {
                "plan[0].optimizer": "adam",
                RATE: Float(1e-3, 1.0, log=True),
                f"{ARGS}.b2": Choice((0.99, 0.999)),
            },
        }
    ),
    "plan[0].weight_decay": Float(1e-6, 1e-2, log=True),
    "task.label_smoothing": Choice((0.0, 0.1, 0.2)),
}
GRID = {
    "optimizer": Choice(
        {
            "sgd": {
                "plan[0].optimizer": "sgd",
                RATE: Choice((1e-2, 1e-1, 1.0, 10.0)),
                f"{ARGS}.momentum": 0.9,
            },
            "adam": {
                "plan[0].optimizer": "adam",
                RATE: Choice((1e-3, 1e-2, 1e-1, 1.0)),
            },
        }
    ),
    "plan[0].weight_decay": Choice((1e-6, 1e-5, 1e-4, 1e-3)),
    "task.label_smoothing": Choice((0.0, 0.1)),
}
# From the first third of a run on; earlier values say little about its end.
PRUNERS = {
    "median": Median(warmup_steps=170),
    "early": Median(),
    "halving": Halving(first_steps=102),
    "none": None,
}


class Heads:
    """Trains heads in one process; they share features and compiled programs."""

    def __init__(self) -> None:
        """Opens the data."""
        from finetune_jax.parallel.executor import DeviceExecutor
        from finetune_jax.report.terminal import Terminal
        from finetune_jax.training.assembly import make_store
        from finetune_jax.training.run import data_of_run
        from finetune_jax.training.setup import make_setup

        self._given = configs.load(str(CONFIG))
        config = self._config({})
        self._terminal = Terminal(quiet=True)
        self._setup = make_setup(config, data_of_run(config, pathlib.Path("none")))
        self._store = make_store(self._setup, self._terminal)
        self._executor = DeviceExecutor(devices=self._setup.devices)

    def _config(self, overrides: dict[str, Any]) -> configs.Config:
        given = {"evaluate.every_epochs": 2.0, **overrides}
        texts = [(key, str(value)) for key, value in given.items()]
        config, problems = configs.resolve(self._given, texts)
        assert not problems, problems
        return config

    def train(
        self, overrides: dict[str, Any], folder: pathlib.Path, judge: Judge
    ) -> None:
        """Trains a head, and logs its metrics in a folder.

        Args:
            overrides: Config keys of the head.
            folder: New folder.
            judge: Ends the run early.
        """
        from finetune_jax.sweeps.populations.population import member_setups
        from finetune_jax.training.assembly import make_evaluator, make_fixed, make_loop
        from finetune_jax.training.checkpoints.held import HeldCheckpoints
        from finetune_jax.training.loop import Preempted
        from finetune_jax.training.preemption import Stop
        from finetune_jax.training.progress import Progress

        (setup,) = member_setups(self._setup, [self._config(overrides)])
        start, _ = setup.start()
        evaluator = make_evaluator(
            setup, start, executor=self._executor, store=self._store
        )
        stop = Stop()
        stop.judge = judge
        folder.mkdir(parents=True)
        loop = make_loop(
            setup, evaluator, make_fixed(setup, start, ()), HeldCheckpoints(keep=1),
            (setup.with_ema(start), Progress()),
            workdir=folder, terminal=self._terminal, stop=stop,
        )  # fmt: skip
        try:
            loop.run()
        except Preempted:
            assert judge.pruned_at is not None
        finally:
            loop.log.close()


def searched(search: Search, heads: Heads, folder: pathlib.Path) -> dict[int, Trial]:
    """Returns the trials of a search, made one after the other.

    Args:
        search: Search or grid; its seed is that of the runs, too.
        heads: Trains the heads.
        folder: Folder for their metrics.
    """
    finished: dict[int, Trial] = {}
    for number in range(search.count):
        found, place = proposal(search, finished, number), folder / str(number)
        rule = functools.partial(is_pruned, search, dict(finished), number)
        judge = Judge(place, search.metric, rule)
        heads.train(found.overrides | {"seed": search.seed}, place, judge)
        curve = curve_of(place, search.metric, until=judge.pruned_at)
        is_whole = judge.pruned_at is None
        finished[number] = Trial(
            number=number, overrides=found.overrides, params=found.params,
            value=curve[max(curve)] if is_whole else None,
            curves={0: curve}, state="complete" if is_whole else "pruned",
        )  # fmt: skip
    return finished


def row(
    search: Search, done: dict[int, Trial], folder: pathlib.Path, goal: float | None
) -> dict[str, Any]:
    """Returns what a search has reached at which cost.

    Args:
        search: Search or grid.
        done: Its trials.
        folder: Folder of their metrics.
        goal: Value that the grid has reached; None is the best of these trials.
    """
    best = search.best(done)
    assert best is not None and best.value is not None
    goal = best.value if goal is None else goal
    test = curve_of(folder / str(best.number), "test/accuracy")
    updates, until = 0, None
    for number in sorted(done):
        trial = done[number]
        updates += max(trial.curves[0])
        if until is None and trial.is_complete and (trial.value or 0.0) >= goal:
            until = updates
    return {
        "best": best.value,
        "test": round(test[max(test)], 4),
        "updates": updates,
        "updates to the grid's best": until,
        "pruned": sum(trial.state == "pruned" for trial in done.values()),
        "chosen": best.params,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--pruner", choices=PRUNERS, default="median")
    arguments = parser.parse_args()
    pin_environment(None, False)
    heads = Heads()
    for seed in map(int, arguments.seeds.split(",")):
        searches = {
            "grid": Search(space=GRID, metric=METRIC, sampler="grid", seed=seed),
            "tpe": Search(
                space=SPACE, metric=METRIC, trials=arguments.trials, seed=seed,
                pruner=PRUNERS[arguments.pruner],
            ),
        }  # fmt: skip
        goal = None
        with tempfile.TemporaryDirectory() as name:
            for kind, search in searches.items():
                begin, folder = time.perf_counter(), pathlib.Path(name) / kind
                done = searched(search, heads, folder)
                found = row(search, done, folder, goal)
                goal = found["best"] if goal is None else goal
                seconds = round(time.perf_counter() - begin, 1)
                line = {"seed": seed, "kind": kind, **found, "seconds": seconds}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
