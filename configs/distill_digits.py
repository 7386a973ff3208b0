"""A small network taught by a fine-tuned ResNet: digits, 10 labels of each class.

Question:  What does a teacher that saw more labels bring to a small model?
Command:   .venv/bin/python -m finetune_jax.main \
               --config=configs/distill_digits.py:teacher --workdir=runs/digits_teacher
           .venv/bin/python -m finetune_jax.main --config=configs/distill_digits.py
Argument:  `teacher` fine-tunes a ResNet-20 on all labels of the training split; `plain`
           trains the student without it; `tiny` makes two updates: `:teacher,tiny`.
Expected:  test accuracy 0.989 of the teacher (seed 0); over five seeds 0.950 +- 0.010 of
           the student with it (mean, 95 % interval), 0.931 +- 0.011 without. Pairs of the
           same seed differ by 0.018 +- 0.008 (experiments/domains). A minute for the
           teacher, a quarter for a student, two CPU cores busy with other work.
Chosen:    by us; temperature and share are those of Hinton et al. 2015, section 3.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a model and size."""
    words = [word for word in arg.split(",") if word]
    if set(words) - {"teacher", "plain", "tiny"}:
        raise ValueError(f"no variant {arg!r}; there are teacher, plain and tiny")
    config = configs.default()
    config.data.update(validation="validation", test="test", per_class=10)
    config.data.update(image_size=16, batch_size=50, mean=(0.5,), std=(0.5,))
    if "teacher" in words:
        config.data.per_class = None
        config.init.pretrained = "zoo:resnet20_fashion_mnist"
        config.init.fresh = ("head/.*",)
        config.plan = as_config(full(steps=150, optimizer="adam", peak_lr=1e-3))
        return configs.tiny(config) if "tiny" in words else config
    config.model.update(name="cnn", convolutions=(8, 16))
    if "plain" not in words:
        config.task.update(name="distill", alpha=0.9, temperature=4.0)
        teacher = {"name": "resnet20", "pretrained": "orbax:runs/digits_teacher"}
        config.model.members = (ml_collections.ConfigDict(teacher),)
    config.plan = as_config(full(steps=300, optimizer="adam", peak_lr=1e-3))
    return configs.tiny(config) if "tiny" in words else config
