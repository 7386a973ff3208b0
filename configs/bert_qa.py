"""An encoder learns to find the words of a passage that answer a question.

Question:  How well are questions answered when all layers are fine-tuned?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/bert_qa.py \
               --config.data.dir=DIR
           DIR has SQuAD's files, train-v1.1.json and dev-v1.1.json, or those of 2.0.
           The weights and the tokenizer come from the Hugging Face Hub.
Expected:  for SQuAD 1.1 Devlin et al. 2018, table 2, have exact match 80.8 and F1 88.5 on
           its dev split (BERT base). Not run here: only small made-up passages were, by
           the tests, on a small encoder.
Time:      not measured.
Chosen:    as Devlin et al. 2018, section 4.2, has rate, batch and epochs; windows of 384
           tokens that share 128 as their run_squad.py.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import EVERYTHING, Phase, as_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.task.update(name="qa", max_answer_tokens=30)
    config.data.update(
        name="squad",
        text=("question", "context"),
        label="answers",
        labels="answers",
        train="train[1%:]",
        validation="train[:1%]",
        test="validation",  # SQuAD's test split is not published.
        batch_size=32,
        max_tokens=384,
        overlap=128,
    )
    config.model.name = "bert_base"
    config.model.pool = "none"
    config.init.pretrained = "hf:google-bert/bert-base-uncased"
    config.init.fresh = ("head/.*",)
    config.evaluate.update(every_epochs=1.0, best="validation/f1", batch_size=64)
    shared = {"warmup_steps": 830, "schedule": "linear", "weight_decay": 0.01}
    plan = (Phase(name="all", epochs=3, peak_lr=5e-5, rules=EVERYTHING, **shared),)
    config.plan = as_config(plan)
    return configs.tiny(config) if arg == "tiny" else config
