"""Small configs, tasks and states that many tests start from."""

import contextlib
import functools

import jax
import ml_collections
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.pytrees import named
from finetune_jax.data import preprocessing
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import constructors
from finetune_jax.models.modes import EVALUATION
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.tasks import make_task
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.loop import Preempted
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.preemption import Stop
from finetune_jax.training.run import run
from finetune_jax.training.step import train_step
from finetune_jax.training.updates.phase_run import PhaseRun

HEAD = (("head/.*", 1.0), (".*", 0.0))


def of_sizes(name, *sizes, **arguments):
    """Returns a model of other sizes than its name says.

    Args:
        name: Name of the model.
        *sizes: Arguments of the family's function, by position; none keeps those of the
            name.
        **arguments: Arguments of the function, by name.
    """
    make = functools.partial(constructors()[name][1])
    return make.func(*(sizes or make.args), **{**make.keywords, **arguments})


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def die_before(patch, *steps):
    """Has runs die before the updates from some steps on, at each once."""
    call, left = PhaseRun.call, list(steps)

    def dies(self, placed, stop, **rate):
        if self.step in left:
            left.remove(self.step)
            raise Killed
        stop = min([stop, *(at for at in left if at > self.step)])
        return call(self, placed, stop, **rate)

    patch.setattr(PhaseRun, "call", dies)


def lines(workdir):
    """Returns the lines of a run's log without what a clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def stop_at_once():
    """Returns what makes a run save and stop after its next update."""
    stop = Stop()
    stop.ask()
    return stop


def same_result(one, other):
    """Returns whether two results have the same digests, metrics and steps."""
    keys = ("params_sha256", "state_sha256", "frozen_sha256", "final", "best")
    return all(one[key] == other[key] for key in (*keys, "best_step", "steps"))


def run_with_stops(config, workdir, calls=1):
    """Returns the result of a run that is stopped again and again, and how often.

    Args:
        config: Config of the run.
        workdir: Folder of the run.
        calls: Calls of the compiled updates before each stop.
    """

    class After(Stop):
        made = 0

        def asked(self):
            self.made += 1
            return self.made == calls

    for stops in range(100):
        with contextlib.suppress(Preempted):
            return run(config, workdir, After()), stops
    raise AssertionError("The run never ends.")


def config(*, model="resnet8", plan=(), overrides=(), **model_arguments):
    """Returns a resolved config for digits at 12 pixels on one device."""
    given = configs.default()
    given.data.update(
        validation="validation", test="test", batch_size=32, image_size=12
    )
    given.model.name = model
    for name, value in model_arguments.items():
        given.model[name] = value
    given.plan = as_config(plan or (Phase(name="all", steps=4),))
    given.parallel.devices = 1
    return resolved(given, overrides)


def editable(config):
    """Returns a resolved config as a ConfigDict, to be changed and resolved again."""
    return ml_collections.ConfigDict(config.to_dict())


def resolved(given, overrides=()):
    found, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return found


def spec(shape=(12, 12, 1), classes=10, **fields):
    arrays = {key: fields.pop(key) for key in preprocessing.KEYS if key in fields}
    return DataSpec(
        kind="images" if len(shape) == 3 else "vectors",
        shape=shape,
        train_shape=shape,
        dtype="uint8",
        inputs=preprocessing.ArraySpec(**arrays),
        class_names=tuple(map(str, range(classes))),
        train_counts=(1000 // classes,) * classes,
        **fields,
    )


def task(model="resnet8", shape=(12, 12, 1), overrides=(), fields=(), **arguments):
    return task_of(
        config(model=model, overrides=overrides, **arguments),
        spec(shape, **dict(fields)),
    )


def task_of(config, spec):
    return make_task(config.task, config.model, config.precision, spec)


def variables(params, batch_stats=None):
    return {"params": params, "batch_stats": batch_stats or {}}


def batch(examples=32, shape=(12, 12, 1), micro_batches=1, seed=0):
    rng = np.random.default_rng(seed)
    whole = {
        "inputs": rng.integers(0, 256, (examples, *shape), np.uint8),
        "label": rng.integers(0, 10, examples).astype(np.int32),
        "weight": np.ones(examples, np.float32),
        "position": np.arange(examples, dtype=np.int32),
    }
    return {
        name: array.reshape(micro_batches, -1, *array.shape[1:])
        for name, array in whole.items()
    }


class Trainer:
    """One phase of a task, without data, loop or files."""

    def __init__(self, task, phase, *, jit=True, seed=0, state=None, ema_decay=None):
        self.task = task
        self.state = state or run_once(lambda: random_state(task, seed))
        names = tuple(named(self.state.params))
        self.phase = phase_setup((phase,), 0, task, names)
        optimizer = self.phase.optimizer()
        opt_state = jax.jit(optimizer.init)(self.state.params)
        self.state = self.state.replace(opt_state=opt_state)
        self.fixed = {"task": {}, "start": dict(named(self.state.params))}
        step = functools.partial(train_step, static=self.phase.update(task, ema_decay))
        self.step = jax.jit(step) if jit else step

    def update(self, batch, rate=0.1):
        self.state, metrics = self.step(
            self.state, self.fixed, batch, np.float32(rate), np.float32(0)
        )
        return metrics

    def features(self, micro):
        """Returns what the head sees of a batch [b, ...], as a numpy array [b, F]."""
        micro = self.task.prepare(micro, jax.random.key(0), EVALUATION)
        state = self.state
        last = self.task.models.stages[-2]
        of_state = variables(state.params, state.batch_stats)
        maps, _ = self.task.models.apply(of_state, micro["inputs"], last=last)
        return np.asarray(maps).reshape(len(maps), -1)
