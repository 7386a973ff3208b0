"""Runs on photos, and what `--mode=predict` writes of them."""

import json
import pathlib

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.plans.strategies import HEAD_ONLY
from finetune_jax.training.run import run


def trained(workdir, photos, *, model="resnet8", pretrained=None, steps=12, **data):
    given = configs.default()
    given.data.update(name="folder", dir=str(photos), batch_size=8)
    given.data.update(test="test", **data)
    given.model.name = model
    given.init.pretrained = pretrained
    given.parallel.devices = 1
    given.evaluate.batch_size = 16
    rate = 1e-30 if pretrained else 1e-2
    phase = Phase(name="head", steps=steps, peak_lr=rate, optimizer="adam",
                  rules=HEAD_ONLY, batch_stats="hold")  # fmt: skip
    given.plan = as_config((phase,))
    config, problems = configs.resolve(given)
    assert not problems
    run(config, workdir)
    return workdir


def predict(workdir, *inputs, output=None):
    flags = [f"--output={output}"] if output else []
    flags += ["--config.parallel.devices=1", "--inputs", *map(str, inputs)]
    status = program.run(["--mode=predict", f"--workdir={workdir}", *flags])
    assert status == 0
    path = pathlib.Path(output or workdir / "predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
