"""A new head on a frozen, pretrained ResNet: digits, dogs, or a folder of photos.

Question:  How far do features learned on other images carry?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/resnet_head.py
Expected:  test accuracy 0.921 over seeds 0 to 4 (0.919 to 0.925); with
           --config.init.pretrained=None, a frozen random backbone, 0.812 (0.797 to
           0.855). Two CPU cores, half a minute.
Chosen:    size, normalisation and rate on the validation split; chosen by us.

`:stanford_dogs` and `:folder=DIR` put a head on an ImageNet ResNet-50. Not run by us on
the dogs: neither they nor the weights come with a package.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, head_only


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates on digits."""
    config = configs.default()
    config.data.update(train="train", validation="validation", test="test")
    config.init.fresh = ("head/.*",)
    config.evaluate.best = "validation/accuracy"
    if arg in ("", "tiny"):
        config.data.update(image_size=16, mean=(0.5,), std=(0.5,))
        config.init.pretrained = "zoo:resnet20_fashion_mnist"
        config.plan = as_config(head_only(epochs=30, optimizer="adam", peak_lr=1e-1))
        config.evaluate.every_epochs = 5.0
        return configs.tiny(config) if arg == "tiny" else config
    kind, _, folder = arg.partition("=")
    if kind == "stanford_dogs":
        config.data.update(name="tfds:stanford_dogs", validation="train[90%:]")
        config.data.update(train="train[:90%]")
        config.model.classes = 120
    elif kind == "folder" and folder:
        config.data.update(name="folder", dir=folder)
    else:
        raise ValueError(f"no variant {arg!r}; there are stanford_dogs and folder=DIR")
    config.data.update(
        image_size=224,
        channels=3,
        resize=235,  # As these weights' card has it: a crop of 0.95, bicubic.
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment=(("flip",), ("random_resized_crop", 0.35)),
    )
    config.model.name = "resnet50"
    config.init.pretrained = "hf:timm/resnet50.a1_in1k"
    config.plan = as_config(head_only(epochs=50, optimizer="adam", peak_lr=1e-3))
    config.evaluate.update(every_epochs=1.0, batch_size=64)
    return config
