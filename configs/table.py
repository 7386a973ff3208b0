"""Your table: a small network on numbers and categories.

Question:  Which class does a row belong to, if you have 100 to 10,000 of them?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/table.py:FILE
           FILE is a `.csv` (with a header line), `.tsv` or `.parquet` file with a column
           `label`; another one: `--config.data.label=bought`. A column of numbers to
           predict: `--config.data.labels=numbers --config.evaluate.best=validation/loss`.
           `:FILE,tiny` is a first look.
Chosen:    batch, epochs, rate and decay by us on the validation rows of 300 and 9,600
           rows of Adult.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.config.arguments import format_of, place_and_variants
from finetune_jax.plans import as_config, full

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of FILE; `tiny` may follow after a comma."""
    place, variants = place_and_variants(arg, VARIANTS)
    config = configs.default()
    config.task.name = "tabular"
    config.data.update(
        name=format_of(place, ("csv", "tsv", "parquet")),
        dir=place or None,
        train="train",
        validation="validation",
        test="test",
        batch_size=32,
    )
    config.model.name = "table_mlp"
    config.model.width = 8
    config.model.hidden = (64,)
    plan = full(
        epochs=30, optimizer="adamw", peak_lr=3e-3, warmup_share=0.1, weight_decay=0.1
    )
    config.plan = as_config(plan)
    config.evaluate.update(every_epochs=1.0, best="validation/loss")
    return configs.tiny(config) if "tiny" in variants else config
