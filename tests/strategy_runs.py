"""A short run of every strategy."""

from typing import Any

import small

from finetune_jax.plans import strategies

MLP = dict(model="mlp", hidden=(8, 8))

CNN = dict(model="cnn", convolutions=(4,), dense=(8,), kernel_size=3)

STAGES = ("stage1", "stage2", "head")

FIELDS: dict[str, Any] = dict(steps=2, peak_lr=1e-2, optimizer="adam")

CARRY: dict[str, Any] = dict(**FIELDS, optimizer_state="carry")

# Model and plan.
PLANS = {
    "full": (MLP, strategies.full(**FIELDS)),
    "head_only": (MLP, strategies.head_only(**FIELDS)),
    "partial": (CNN, strategies.partial(STAGES, named=("stage1",), **FIELDS)),
    "layerwise": (MLP, strategies.layerwise(STAGES, **CARRY)),
    "gradual": (CNN, strategies.gradual(STAGES, decay=0.5, **CARRY)),
    "progressive": (MLP, strategies.progressive(STAGES, steps=2, optimizer="adam")),
    "two_stage": (
        CNN, strategies.two_stage(head_lr=1e-2, all_lr=1e-3, steps=2, optimizer="adam"),
    ),
    "alternating": (MLP, strategies.alternating(STAGES, cycles=2, **FIELDS)),
    "discriminative": (MLP, strategies.discriminative(STAGES, decay=0.3, **FIELDS)),
    "surgical": (MLP, strategies.surgical(STAGES, block="stage1", **FIELDS)),
    "bias_only": (MLP, strategies.bias_only(**FIELDS)),
    "norm_only": (CNN, strategies.norm_only(**FIELDS)),
    "lora": (dict(**MLP, lora_rank=2), strategies.lora(**FIELDS)),
}  # fmt: skip


def config(name):
    """Returns a config of digits, saved at the ends of phases and where it is stopped."""
    model, plan = PLANS[name]
    overrides = {
        "report.every_steps": "1",
        "evaluate.best": "validation/loss",
        "data.train": "train[:200]",
        "data.validation": "validation[:20]",
        "data.test": "test[:20]",
        "model.head.dropout": "0.2",
    }
    return small.config(plan=plan, overrides=tuple(overrides.items()), **model)
