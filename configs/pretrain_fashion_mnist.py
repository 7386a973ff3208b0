"""ResNet-20 from scratch on all of Fashion-MNIST: the source of the zoo's backbone.

Question:  What does a small ResNet reach, trained as He et al. 2016 do, but shorter?
Command:   .venv/bin/python -m finetune_jax.main \
               --config=configs/pretrain_fashion_mnist.py --config.data.dir=DIR \
               --workdir=runs/pretrain_fashion_mnist
           DIR has the four IDX files of https://github.com/zalandoresearch/fashion-mnist
Expected:  test accuracy 0.934 (seed 0); two CPU cores, half an hour.
Export:    .venv/bin/python scripts/export_zoo.py runs/pretrain_fashion_mnist \
               resnet20_fashion_mnist
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates."""
    config = configs.default()
    config.data.update(
        name="idx",
        train="train",  # All of it: nothing is chosen by the test set, or at all.
        test="test",
        batch_size=128,
        image_size=28,
        channels=1,
        mean=(0.286,),  # Of the training images.
        std=(0.353,),
        augment=(("flip",), ("pad_crop", 2)),
    )
    config.model.name = "resnet20"
    config.model.classes = 10
    config.plan = as_config(
        full(
            epochs=8,
            optimizer="sgd",
            optimizer_args={"momentum": 0.9, "nesterov": True},
            peak_lr=0.1,  # He et al. 2016, section 4.2.
            warmup_steps=469,
            weight_decay=5e-4,
        )
    )
    config.evaluate.every_epochs = 1.0
    config.report.every_steps = 20
    return configs.tiny(config) if arg == "tiny" else config
