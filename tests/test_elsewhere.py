"""A model family, a task and a strategy in folders outside of the package."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from finetune_jax import models
from finetune_jax.core import registry

ROOT = pathlib.Path(__file__).parents[1]
FAMILY = """
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from finetune_jax.models.layers.heads import make_head
from finetune_jax.models.layers.stages import run_stages


class Body(nn.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1)
        return jnp.sin(nn.Dense(5, dtype=self.dtype, param_dtype=self.param_dtype)(x))


class Waves(nn.Module):
    classes: int
    head_arguments: tuple = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    stages = ("body", "head")

    def setup(self):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.body = Body(**kinds)
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train):
        return run_stages(self, x, first=first, last=last, train=train)


def _waves(*, classes, head: Mapping, dtype=None, param_dtype=jnp.float32):
    return Waves(classes, tuple(sorted(head.items())), dtype, param_dtype)


MODELS = {"waves": _waves}
"""
TASK = '''
"""Classification with a squared loss on probabilities, as an outsider would add it."""

import dataclasses

import jax
import jax.numpy as jnp

from finetune_jax.tasks import classify

METRICS = classify.METRICS


@dataclasses.dataclass(frozen=True)
class Squared:
    scale: float

    def loss(self, models, target, variables, batch, context):
        logits, batch_stats = models.forward(
            variables, batch["inputs"], mode=context.mode, first=context.first
        )
        wanted = jax.nn.one_hot(batch["label"], logits.shape[-1])
        squares = jnp.square(jax.nn.softmax(logits) - wanted).sum(axis=-1)
        labels = target.loss(logits, batch)
        return labels.replace(
            total=self.scale * jnp.sum(squares * batch["weight"]),
            batch_stats=batch_stats,
        )


def make(*, data, model, precision, scale: float = 1.0):
    task = classify.make(data=data, model=model, precision=precision)
    return dataclasses.replace(task, objective=Squared(scale=scale))
'''
STRATEGY = """
from finetune_jax.plans import Phase


def last_first(stages, **fields):
    return tuple(
        Phase(name=stage, rules=((f"{stage}/.*", 1.0), (".*", 0.0)), **fields)
        for stage in reversed(stages)
    )
"""
CONFIG = """
from strategies_of_mine import last_first

from finetune_jax import config as configs
from finetune_jax.plans import as_config


def get_config():
    config = configs.default()
    config.data.name = "iris"
    config.data.train = "train[:60%]"
    config.data.validation = "train[60%:]"
    config.model.name = "waves"
    config.task = {"name": "squared", "scale": 2.0}
    config.plan = as_config(last_first(("body", "head"), steps=1))
    return config
"""


def family_in(folder):
    inside = folder / "finetune_jax" / "models"
    inside.mkdir(parents=True)
    (inside / "waves.py").write_text(FAMILY)
    return inside


@pytest.mark.slow
def test_what_lies_elsewhere_on_the_path_trains_without_changing_the_package(tmp_path):
    family_in(tmp_path / "mine")
    (tmp_path / "mine" / "finetune_jax" / "tasks").mkdir()
    (tmp_path / "mine" / "finetune_jax" / "tasks" / "squared.py").write_text(TASK)
    (tmp_path / "mine" / "strategies_of_mine.py").write_text(STRATEGY)
    (tmp_path / "waves_iris.py").write_text(CONFIG)
    places = os.pathsep.join([str(ROOT), str(tmp_path / "mine")])
    done = subprocess.run(
        [sys.executable, "-m", "finetune_jax.main", f"--config={tmp_path}/waves_iris.py",
         f"--workdir={tmp_path / 'run'}", "--config.parallel.devices=1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    measured = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    phases = [json.loads(line)["phase"] for line in measured]
    assert phases == ["head", "head", "body"]


def test_another_installation_contributes_no_family(tmp_path, monkeypatch):
    inside = family_in(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.open_path("finetune_jax.models", ["ours"]) == ["ours", str(inside)]
    (inside / "__init__.py").write_text("")
    assert registry.open_path("finetune_jax.models", ["ours"]) == ["ours"]


def test_packages_inside_of_an_open_package_are_no_members():
    assert "mnist" in registry.names(models)
    assert not {"layers", "kernels", "peft"} & registry.names(models)
