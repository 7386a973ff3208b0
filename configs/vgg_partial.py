"""The last stages of a VGG learn, the others stay as they are: digits, or photos.

Question:  How much of the accuracy of full tuning does tuning the last stages give?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/vgg_partial.py
Expected:  not yet run to its end.
Chosen:    rates and lengths by us, not searched.

`:folder=DIR` does it with a VGG-16 of ImageNet on photos, a folder a class. Not run by us:
its weights do not come with a package.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full, partial

STAGES = (*(f"stage{n}" for n in range(1, 6)), "pool", "classifier", "head")
LAST = ("stage5", "classifier", "head")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:all` trains all stages, `:tiny` makes two updates."""
    config = configs.default()
    config.data.update(train="train", validation="validation", test="test")
    config.data.update(batch_size=32)
    config.evaluate.best = "validation/accuracy"
    phase = {"optimizer": "adam", "peak_lr": 1e-4, "epochs": 5}
    config.plan = as_config(
        full(**phase) if arg == "all" else partial(STAGES, named=LAST, **phase)
    )
    if arg in ("", "all", "tiny"):
        config.data.update(image_size=32, channels=3, mean=(0.5,), std=(0.5,))
        config.model.name = "vgg11_bn"
        config.model.dense = 256  # Instead of 4096, for a thousand small images.
        config.init.pretrained = None
        if arg == "tiny":
            config.data.update(train="train[:64]", validation="validation[:32]")
            config.data.test = "test[:32]"
            return configs.tiny(config)
        return config
    kind, _, folder = arg.partition("=")
    if kind != "folder" or not folder:
        raise ValueError(f"no variant {arg!r}; there are all and folder=DIR")
    config.data.update(
        name="folder", dir=folder, image_size=224, channels=3, resize=256,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment=(("flip",),),
    )  # fmt: skip
    config.model.name = "vgg16"
    config.init.pretrained = "hf:timm/vgg16.tv_in1k"
    config.init.fresh = ("head/.*",)
    return config
