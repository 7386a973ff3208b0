"""What several domains, models or teachers bring, against learning without them.

FINETUNE_JAX_TESTDATA=DIR .venv/bin/python -m finetune_jax.sweep \
    --sweep=experiments/domains/sweep.py:QUESTION run --jobs=2

Questions: `joint`: joint learning of digits and clothes, at equal compute; DIR has
`fashion_mnist/` with the IDX files. `noisy`, `rotated`, `inverted`: adaptation to digits
without labels, shifted so. `mutual`: two networks that learn from each other. `distill`: a
student and a teacher that has seen all labels. Only `joint` needs DIR.
"""

import functools
from typing import Any

from finetune_jax import config as configs
from finetune_jax import sweeps
from finetune_jax.core.paths import existing
from finetune_jax.plans import Phase

UPDATES, ADABN = 400, 40
BACKBONE = r"(?!head/).*"
LEARN = {"name": "learn", "optimizer": "adam", "peak_lr": 3e-3}
WHOLE, HALF = Phase(steps=UPDATES, **LEARN), Phase(steps=UPDATES // 2, **LEARN)
AVERAGES = Phase(
    name="adabn", steps=ADABN, optimizer="sgd", rules=((".*", 0.0),),
    batch_stats="update_all",
)  # fmt: skip
SHIFTS: dict[str, tuple] = {
    "noisy": (("noise", 0.5),),
    "rotated": (("rotate", 35.0),),
    "inverted": (("invert",),),
}


def base() -> Any:
    """Returns the config that all arms have in common."""
    config = configs.default()
    config.data.update(
        name="digits", test="test", batch_size=64, image_size=8, channels=1
    )
    config.model.update(name="cnn", convolutions=(16, 32), dense=(64,), kernel_size=3)
    config.report.every_steps = 100
    return config


def joint() -> sweeps.Sweep:
    """Returns joint learning of ten digits a class and clothes, against fine-tuning."""
    folder = existing("$FINETUNE_JAX_TESTDATA/fashion_mnist", "config.data.dir")
    few = {"data.per_class": 10}
    clothes = {"name": "idx", "dir": folder, "train": "train[:6000]"}
    domains = ({"domain": "digits", "per_class": 10}, {"domain": "clothes", **clothes})
    start = {"init.pretrained": "sweep:clothes", "init.fresh": ("head/.*",)}

    def together(**task: Any) -> sweeps.Arm:
        keys = {
            "plan": WHOLE,
            "task": {"name": "joint", **task},
            "data.domains": domains,
        }
        return sweeps.Arm(overrides=keys, metric="test/digits/accuracy")

    own = {"shared": (BACKBONE,), "statistics": "domain"}
    return sweeps.Sweep(
        base=base(),
        sources={
            "clothes": sweeps.Source(
                overrides={"plan": HALF, "data": clothes}, by_seed=True
            )
        },
        cases={"digits, 10 labels a class": {}},
        arms={
            "fine-tuning": {"plan": HALF, **few, **start},
            "digits alone": {"plan": WHOLE, **few},
            "joint, backbone shared": together(**own),
            "joint, first stage shared": together(shared=("stage1/.*",)),
            "joint, soft sharing": together(shared=(), soft=0.01),
            "joint, uncertainty": together(**own, balance="uncertainty"),
        },
        seeds=5,
        threads=1,
    )


def adaptation(shift: str) -> sweeps.Sweep:
    """Returns methods that adapt to a shifted copy of the digits without labels."""
    target = {"domain": shift, "labelled": False, "shift": SHIFTS[shift]}
    adapted = (Phase(steps=UPDATES - ADABN, **LEARN), AVERAGES)

    def arm(plan: Any, method: str = "none") -> dict[str, Any]:
        return {"plan": plan, "task": {"name": "domain_adapt", "method": method}}

    return sweeps.Sweep(
        base=base(),
        cases={
            f"{shift} digits, no labels": {
                "data.domains": ({"domain": "clean", "stratified": False}, target)
            }
        },
        arms={
            "source alone": arm(WHOLE),
            "AdaBN": arm(adapted),
            **{m: arm(adapted, m) for m in ("dann", "mmd", "coral", "self_training")},
        },
        seeds=5,
        metric=f"test/{shift}/accuracy",
        threads=1,
    )


def mutual() -> sweeps.Sweep:
    """Returns two networks that learn with and without each other."""
    return sweeps.Sweep(
        base="configs/mutual_digits.py",
        arms={"alone": {"task.weight": 0.0}, "mutual": {}},
        seeds=5,
        threads=1,
    )


def distill() -> sweeps.Sweep:
    """Returns a student with and without a teacher."""
    file = "configs/distill_digits.py"
    return sweeps.Sweep(
        base=file,
        sources={"teacher": sweeps.Source(base=f"{file}:teacher")},
        arms={
            "plain": sweeps.Arm(base=f"{file}:plain"),
            "taught": {"model.members[0].pretrained": "sweep:teacher"},
        },
        seeds=5,
        threads=1,
    )


QUESTIONS = {
    "joint": joint,
    **{shift: functools.partial(adaptation, shift) for shift in SHIFTS},
    "mutual": mutual,
    "distill": distill,
}


def get_sweep(arg: str = "joint") -> sweeps.Sweep:
    """Returns the sweep of a question."""
    if arg not in QUESTIONS:
        raise ValueError(f"no question {arg!r}; there are {', '.join(QUESTIONS)}")
    return QUESTIONS[arg]()
