"""Clicks of past days, then those of the next: a model of tables is tuned to what is new.

Question:  What do the embeddings of past days bring where a new day has few rows?
Command:   .venv/bin/python scripts/generate_clicks.py --days=4 --rows=200000 --output=days
           .venv/bin/python -m finetune_jax.main \
               --config=configs/tabular_transfer.py:source --config.data.dir=days \
               --workdir=runs/past_days
           .venv/bin/python -m finetune_jax.main \
               --config=configs/tabular_transfer.py:target --config.data.dir=days
           Without: `--config.init.pretrained=None --config.data.fitted=None`.
Argument:  source (default) or target; `tiny` makes two updates: `:target,tiny`.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config, full

PAST = "runs/past_days"


def get_config(arg: str = "source") -> ml_collections.ConfigDict:
    """Returns the config of a part of the days."""
    words = arg.split(",")
    config = configs.default()
    config.task.name = "tabular"
    config.data.update(name="criteo", batch_size=1024, log_columns=(r"I\d+",))
    config.data.min_count = 8
    config.model.name = "dcn_v2"
    config.model.width = 16
    if "target" in words:
        # Values of past days keep their rows, new ones get new rows.
        config.data.update(
            train="day_3[:10%]", validation="day_3[10%:20%]", test="day_3[20%:]"
        )
        config.data.fitted = PAST
        config.init.pretrained = f"orbax:{PAST}"
        rules = (("embeddings/.*", 1.0), (".*", 0.1))
        new = Phase(name="tune", epochs=3, optimizer="adam", peak_lr=1e-3, rules=rules)
        config.plan = as_config((new,))
    else:
        config.data.update(
            train="day_0+day_1+day_2[:80%]",
            validation="day_2[80%:]",
            test="day_3[20%:]",
        )
        config.plan = as_config(full(epochs=2, optimizer="adam", peak_lr=1e-3))
    config.evaluate.every_epochs = 0.5
    config.evaluate.batch_size = 8192
    config.evaluate.best = "validation/loss"
    return configs.tiny(config) if "tiny" in words else config
