"""Children's chest X-rays of 28 pixels: pneumonia or not, at a fixed specificity.

Question:  How much of the pneumonia is found if 5 % of the healthy may be called ill?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/pneumonia.py:FILE,seeds
           FILE is pneumonia_mnist.npz; docs/domains.md describes it. `:FILE` alone
           trains once.
Expected:  test ROC AUC 0.973 (0.970 to 0.976) over the three seeds. At the threshold
           from validation, sensitivity 0.983 (0.977 to 0.987) and specificity 0.956
           on validation; 0.991 (0.987 to 0.992) and 0.688 (0.637 to 0.722) on test,
           which is of another distribution. About three minutes of CPU time for a
           seed.
Chosen:    full over head on the validation split; rates and lengths were not searched.
Argument:  full (default): all layers of a ResNet-20 pretrained on Fashion-MNIST; head: a
           new head on its frozen layers: `:FILE,head,seeds`.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.config import grid
from finetune_jax.plans import as_config, full, head_only

METRICS = (
    "roc_auc", "sensitivity_at_specificity_95", "accuracy", "calibration_error",
    "brier", "loss",
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of an arm; `tiny` makes two updates: `:FILE,tiny`."""
    words = arg.split(",")
    config = configs.default()
    config.task.metrics = METRICS
    config.task.threshold_rule = "specificity=0.95"
    config.data.update(name="arrays", mean=(0.5,), std=(0.25,))
    config.data.update(train="train", validation="validation", test="test")
    config.data.dir = next((w for w in words if w.endswith(".npz")), None)
    config.init.pretrained = "zoo:resnet20_fashion_mnist"
    config.init.fresh = ("head/.*",)
    config.plan = as_config(full(epochs=3, optimizer="adam", peak_lr=1e-3))
    config.evaluate.every_epochs = 1.0
    config.evaluate.best = "validation/loss"
    if "head" in words:
        plan = head_only(epochs=30, optimizer="adam", peak_lr=1e-2)
        config.plan = as_config(plan)
        config.evaluate.every_epochs = 5.0
    if "seeds" in words:
        config.population = grid({"seed": (0, 1, 2)})
    return configs.tiny(config) if "tiny" in words else config
