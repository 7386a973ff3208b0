"""What does fine-tuning all layers of a sentence encoder add to a linear probe, on SST-2?

FINETUNE_JAX_TESTDATA=DIR .venv/bin/python -m finetune_jax.sweep \
    --sweep=experiments/sst2/sweep.py run

DIR has `sst2/` with train.tsv, dev.tsv and test.tsv. The recipe is that of
configs/bert_sst2.py, cut to one epoch over 3,200 sentences of at most 48 tokens; the linear
probe sees the same sentences 20 times. Nothing is chosen, and the test split is read once a
run, at its end.
"""

from finetune_jax import sweeps
from finetune_jax.core.paths import existing

CONFIG = "configs/bert_sst2.py"


def get_sweep() -> sweeps.Sweep:
    """Returns three arms with three seeds each."""
    folder = existing("$FINETUNE_JAX_TESTDATA/sst2", "config.data.dir")
    cut = {
        "data": {
            "dir": folder, "train": "train[:3200]", "validation": None,
            "max_tokens": 48, "buckets": (48,),
        },
        "evaluate": {"best": None, "every_epochs": None},
    }  # fmt: skip
    return sweeps.Sweep(
        base=CONFIG,
        cases={"3,200 sentences": cut},
        arms={
            "all layers": {"plan[0].epochs": 1, "plan[0].warmup_steps": 10},
            "gradual unfreezing": sweeps.Arm(
                base=f"{CONFIG}:gradual", overrides={"plan[*].epochs": 0.125}
            ),
            "linear probe": sweeps.Arm(base=f"{CONFIG}:head"),
        },
        seeds=3,
    )
