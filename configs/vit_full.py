"""All of a Vision Transformer, tuned at a small rate: digits, or a folder of photos.

Question:  What does a transformer learn from a thousand images, with and without weights?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/vit_full.py
Expected:  not yet run to its end.
Chosen:    rates and lengths by us, not searched.

`:folder=DIR` tunes a ViT-S/16 of ImageNet-21k on photos, a folder a class. Not run by us:
its weights do not come with a package.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config; `:tiny` makes two updates on few digits."""
    config = configs.default()
    config.data.update(train="train", validation="validation", test="test")
    config.data.update(mean=(0.5,), std=(0.5,), batch_size=32)
    config.evaluate.best = "validation/accuracy"
    config.evaluate.every_epochs = 5.0
    phase = {"optimizer": "adamw", "weight_decay": 0.05, "clip_norm": 1.0}
    if arg in ("", "tiny"):
        config.data.image_size = 64
        config.model.name = "vit_tiny_patch16"
        config.init.pretrained = None
        phase |= {"epochs": 20, "peak_lr": 1e-3, "warmup_steps": 100}
        config.plan = as_config(full(**phase))
        if arg == "tiny":
            config.data.update(train="train[:64]", validation="validation[:32]")
            config.data.test = "test[:32]"
            return configs.tiny(config)
        return config
    kind, _, folder = arg.partition("=")
    if kind != "folder" or not folder:
        raise ValueError(f"no variant {arg!r}; there is folder=DIR")
    config.data.update(
        name="folder", dir=folder, image_size=224, channels=3, resize=248,
        interpolation="bicubic", augment=(("flip",), ("random_resized_crop", 0.35)),
    )  # fmt: skip
    config.model.name = "vit_small_patch16"
    config.model.stochastic_depth = 0.1
    config.init.pretrained = "hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    config.init.fresh = ("head/.*",)
    # A rate of 3e-5 to 1e-4 is usual where all of a transformer is tuned by Adam.
    phase |= {"epochs": 10, "peak_lr": 5e-5, "warmup_steps": 200}
    config.plan = as_config(full(**phase))
    return config
