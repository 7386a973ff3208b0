"""An encoder learns to find the names of people, places and organisations in sentences.

Question:  How well are named entities found when all layers are fine-tuned?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/bert_ner.py \
               --config.data.dir=DIR
           DIR has train.jsonl, dev.jsonl and test.jsonl, a line such as
           {"tokens": ["Bern", "is", "old"], "ner_tags": ["B-LOC", "O", "O"]}
           The weights and the tokenizer come from the Hugging Face Hub.
Expected:  for CoNLL-2003 Devlin et al. 2018, table 7, have test F1 92.4 (BERT base, with
           the sentences around each, which are not used here). Not run here: only small
           made-up sentences were, by the tests, on a small encoder.
Time:      not measured.
Chosen:    rate, batch and epochs out of those in Devlin et al. 2018, appendix A.3.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import EVERYTHING, Phase, as_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.task.name = "tokens"
    config.data.update(
        name="jsonl",
        text=("tokens",),
        label="ner_tags",
        labels="tags",
        train="train",
        validation="validation",
        test="test",
        batch_size=32,
        max_tokens=256,
    )
    config.model.name = "bert_base"
    config.model.vocabulary = 28996  # Of the cased BERT: capitals begin names.
    config.model.pool = "none"
    config.model.head.dropout = 0.1
    config.init.pretrained = "hf:google-bert/bert-base-cased"
    config.init.fresh = ("head/.*",)
    config.evaluate.update(every_epochs=1.0, best="validation/f1", batch_size=64)
    shared = {"warmup_steps": 130, "schedule": "linear", "weight_decay": 0.01}
    plan = (Phase(name="all", epochs=3, peak_lr=5e-5, rules=EVERYTHING, **shared),)
    config.plan = as_config(plan)
    return configs.tiny(config) if arg == "tiny" else config
