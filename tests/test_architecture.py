"""The worked example of docs/architecture.md runs as it stands."""

import pathlib
import re

import pytest

from finetune_jax import config as configs
from finetune_jax.optim import algorithms
from finetune_jax.plans.phase import as_config
from finetune_jax.tasks.objectives import losses
from finetune_jax.training.run import run

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "architecture.md"


def blocks():
    section = PAGE.read_text().partition("worked out\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
def test_the_worked_example_trains_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setitem(algorithms.OPTIMIZERS, "signs", None)
    monkeypatch.setitem(losses.CLASSIFICATION, "brier", None)
    config = configs.default()
    config.data.update(image_size=12, test="test", batch_size=16)
    config.parallel.devices = 1
    names = {"config": config, "as_config": as_config}
    found = blocks()
    assert len(found) == 4
    for block in found:
        exec(block, names)
    config, problems = configs.resolve(config)
    assert not problems
    result = run(config, tmp_path / "run")
    assert result["steps"] == 4
    wrong, _ = configs.resolve(config, [("plan[0].optimizer_args.powerr", "0.5")])
    with pytest.raises(ValueError, match="powerr: unknown"):
        run(wrong, tmp_path / "other")
