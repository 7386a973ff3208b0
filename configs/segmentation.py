"""A fully convolutional head on a pretrained ResNet: which digit does a pixel belong to?

Question:  Do features of clothes help to segment digits, and what does tuning them add?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/segmentation.py
Expected:  test mean IoU 0.236 and 0.235 with a frozen backbone, seeds 0 and 1; 0.195 and
           0.163 with --config.init.pretrained=None, a frozen random one. One CPU core,
           half a minute. Rate and length chosen by us, not searched.
Data:      composed by us, and no photos: up to four of scikit-learn's digits on noise;
           those of the test split are in no training image (data/sources/scenes.py).

`:full` trains all parameters for 5 epochs; not measured by us.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full, head_only


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates of small images, `:full` see above."""
    config = configs.default()
    config.task.name = "segmentation"
    config.data.update(name="scenes:digits", image_size=48, mean=(0.5,), std=(0.5,))
    config.data.update(train="train", validation="validation", test="test")
    config.data.batch_size = 32
    config.model.taps = ("stage2",)
    config.init.pretrained = "zoo:resnet20_fashion_mnist"
    config.init.fresh = ("head/.*",)
    config.plan = as_config(head_only(epochs=20, optimizer="adam", peak_lr=3e-2))
    if arg == "full":
        config.plan = as_config(full(epochs=5, optimizer="adam", peak_lr=3e-3))
    config.evaluate.update(best="validation/mean_iou", every_epochs=5.0, batch_size=60)
    if arg == "tiny":
        config.data.update(image_size=24, train="train[:40]", test="test[:20]")
        config.data.validation = "validation[:20]"
        config = configs.tiny(config)
    return config
