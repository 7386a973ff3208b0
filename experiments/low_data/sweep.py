"""Ten labels per class: does a pretrained backbone help, frozen or trained?

.venv/bin/python -m finetune_jax.sweep --sweep=experiments/low_data/sweep.py run --jobs=2

Four arms on digits with 10 training labels per class. For each arm the learning rate is
chosen on the validation split, with seed 0, out of the same grid; then seeds 0 to 4 draw
other labels, other orders and another head. The test split is read once a run, for the
best checkpoint by validation.
"""

from finetune_jax import sweeps

PRETRAINED = {"init.pretrained": "zoo:resnet20_fashion_mnist"}
RANDOM = {"init.pretrained": None, "init.fresh": ()}
FULL = {"plan[0].rules": ((".*", 1.0),), "plan[0].batch_stats": "update"}
FEW_LABELS = {
    "data.per_class": 10,
    "data.batch_size": 50,
    "plan[0].epochs": None,
    "plan[0].steps": 150,
    "evaluate.every_epochs": None,
    "evaluate.every_steps": 25,
}


def get_sweep() -> sweeps.Sweep:
    """Returns 12 runs that choose rates, and 16 others."""
    return sweeps.Sweep(
        base="configs/resnet_head.py",
        cases={"10 labels a class": FEW_LABELS},
        arms={
            "frozen, pretrained": PRETRAINED,
            "frozen, random": RANDOM,
            "full fine-tuning": PRETRAINED | FULL,
            "from scratch": RANDOM | FULL,
        },
        seeds=5,
        metric="test/accuracy",
        tune={"plan[0].peak_lr": (1e-3, 1e-2, 1e-1)},
        tune_by="validation/accuracy",
        threads=1,
    )
