"""Configs of small runs over several processes: `--config=process_configs.py:NAME`."""

import pathlib

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config, gradual, head_only

TEXTS = {
    "layers": 2, "width": 16, "heads": 2, "hidden": 16, "vocabulary": 16,
    "positions": 32, "dropout": 0.1, "attention_dropout": 0.1, "pool": "mean",
}  # fmt: skip
JOINT = (
    {"domain": "digits", "name": "digits"},
    {"domain": "halves", "name": "digits", "train": "train[:50%]"},
)


def resnet(config):
    """BatchNorm moves, dropout in the head, two micro-batches, examples of any weight."""
    config.task.class_weights = "balanced"
    config.data.update(name="digits", validation="validation", test="test")
    config.data.update(image_size=16, batch_size=16, augment=(("pad_crop", 2),))
    config.model.name = "resnet20"
    config.model.head.dropout = 0.1
    config.plan = as_config(
        (
            Phase(name="all", steps=12, peak_lr=1e-2, accumulate_steps=2),
            Phase(name="more", steps=8, peak_lr=1e-3),
        )
    )
    config.evaluate.update(every_steps=10, best="validation/accuracy")


def bert(config):
    """Texts of different length, dropout everywhere."""
    config.task.name = "text"
    config.data.update(
        name="tsv", text=("sentence",), header=("sentence", "label"),
        validation="validation", test="test", max_tokens=12, buckets=(4, 8),
        batch_size=8,
    )  # fmt: skip
    config.model.name = "minilm_l6"
    for name, value in TEXTS.items():
        config.model[name] = value
    config.plan = as_config(
        (Phase(name="all", steps=20, peak_lr=1e-2, accumulate_steps=2),)
    )


def prefix(config):
    """The outputs of frozen stages are cached."""
    resnet(config)
    config.data.augment = ()
    config.plan = as_config(head_only(steps=20, peak_lr=1e-2))
    config.init.pretrained = "zoo:resnet20_fashion_mnist"
    config.init.fresh = ("head/.*",)


def phases(config):
    """Several phases, checkpoints inside them."""
    config.data.update(name="iris", validation="validation", test="test")
    config.data.batch_size = 16
    config.model.name = "mlp"
    config.model.hidden = (16, 16)
    config.plan = as_config(
        gradual(("hidden1", "hidden2", "head"), steps=40, peak_lr=1e-2)
    )
    config.checkpoint.every_steps = 20
    config.evaluate.update(every_steps=30, best="validation/loss")


def population(config):
    """Three members, in turn."""
    phases(config)
    config.plan = as_config((Phase(name="all", steps=20, peak_lr=1e-2),))
    config.population = (
        (("plan[0].peak_lr", 1e-2),), (("plan[0].peak_lr", 1e-3),), (("seed", 1),)
    )  # fmt: skip


def joint(config):
    """Two domains in every update."""
    config.task = dict(name="joint", shared=(r"(?!head/).*",))
    config.data.update(name="digits", validation="validation", test="test")
    config.data.update(image_size=8, batch_size=16)
    config.data.domains = tuple(map(ml_collections.ConfigDict, JOINT))
    config.model.name = "cnn"
    config.plan = as_config((Phase(name="all", steps=20, peak_lr=1e-2),))


def table(config):
    """Numbers and categories from a CSV file."""
    config.task.name = "tabular"
    config.data.update(name="csv", validation="validation", test="test")
    config.data.batch_size = 16
    config.model.name = "table_mlp"
    config.plan = as_config((Phase(name="all", steps=20, peak_lr=1e-2),))


def get_config(arg: str = "resnet"):
    """Returns the config with a name."""
    config = configs.default()
    globals()[arg](config)
    return config


PATH = pathlib.Path(__file__)
