"""One seed for everything, or one for each source of randomness."""

import numpy as np
import pytest
import small

from finetune_jax.core.pytrees import digest
from finetune_jax.data.batches import training_batches
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

PLAN = (Phase(name="all", steps=3, optimizer="sgd", peak_lr=0.1),)


def config(*overrides):
    return small.config(
        model="mlp", plan=PLAN, hidden=(8,),
        overrides=[
            ("model.head.dropout", "0.5"), ("data.augment", "(('pad_crop', 2),)"),
            ("report.every_steps", "1"), *overrides,
        ],
    )  # fmt: skip


def start(*overrides):
    return make_setup(config(*overrides)).start()[0]


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("init", (False, True, True)),
        ("augmentation", (True, False, True)),
        ("dropout", (True, True, False)),
        ("order", (True, True, True)),
    ],
)
@pytest.mark.fast_runs("init-same0")
def test_a_seed_moves_what_it_is_of_and_nothing_else(source, same):
    one, other = start(), start((f"seed.{source}", "1"))
    found = (
        digest(one.params) == digest(other.params),
        np.array_equal(one.rng[0], other.rng[0]),
        np.array_equal(one.rng[1], other.rng[1]),
    )
    assert found == same


@pytest.mark.slow
def test_equal_seeds_for_all_sources_are_one_seed(tmp_path):
    apart = [
        (f"seed.{name}", "3") for name in ("init", "order", "augmentation", "dropout")
    ]
    results = [
        run(config(*given), tmp_path / str(number))
        for number, given in enumerate(([("seed", "3")], apart))
    ]
    assert results[0]["state_sha256"] == results[1]["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["order", "augmentation", "dropout"])
@pytest.mark.ci_runs("dropout")
def test_every_seed_reaches_the_updates(tmp_path, source):
    one = run(config(), tmp_path / "one")
    other = run(config((f"seed.{source}", "1")), tmp_path / "other")
    assert one["params_sha256"] != other["params_sha256"]
    log = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "other")]
    first = [text.split("\n")[0] for text in log]
    assert first[0] == first[1]  # Before update 0 they are the same.


def test_the_order_has_a_seed_of_its_own():
    def labels(seed):
        setup = make_setup(config(("seed.order", str(seed))))
        batches = training_batches(
            setup.data.train, seed=setup.config.seed.order, batch_size=32,
            micro_batches=1, updates=range(1),
        )  # fmt: skip
        return next(batches)["label"].tolist()

    assert labels(0) == labels(0) != labels(1)
