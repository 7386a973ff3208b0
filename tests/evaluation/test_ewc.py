"""Elastic weight consolidation in a run: the domain's Fisher information holds weights."""

import pytest
import small
from small import lines, same_result

from finetune_jax.core.errors import UserError
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run

pytestmark = pytest.mark.usefixtures("no_pictures")


def config(strength, also=True, **overrides):
    plan = (
        Phase(
            name="all", steps=24, optimizer="sgd", peak_lr=0.05, schedule="constant",
            regularise=(("ewc", strength, "(?!head/).*"),),
        ),
    )  # fmt: skip
    keys = {
        "init.fisher": "digits_again", "init.fisher_examples": 40,
        "evaluate.distance": True,
    } | overrides  # fmt: skip
    config = small.editable(small.config(
        model="mlp", plan=plan, hidden=(8,),
        overrides=[(key, str(value)) for key, value in keys.items()],
    ))  # fmt: skip
    entry = {"label": "digits_again", "name": "digits", "train": "train"}
    config.evaluate.also = (entry,) if also else ()
    return small.resolved(config)


@pytest.mark.slow
def test_what_the_source_needs_moves_less_the_stronger_it_is_held(tmp_path):
    moved = [
        run(config(strength), tmp_path / str(strength))["distance/stage1"]
        for strength in (0.0, 5.0, 30.0)
    ]
    assert moved[0] > 1.05 * moved[1] > 1.05**2 * moved[2] > 0, moved


@pytest.mark.slow
def test_a_killed_run_finds_the_same_fisher_information_again(tmp_path, monkeypatch):
    whole = run(config(10.0), tmp_path / "one")
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 5)
        run(config(10.0), tmp_path / "two")
    assert same_result(run(config(10.0), tmp_path / "two"), whole)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


def test_without_a_domain_there_is_no_fisher_information(tmp_path):
    with pytest.raises(UserError, match=r"config\.init\.fisher"):
        run(config(1.0, **{"init.fisher": "None"}), tmp_path / "run")
    with pytest.raises(UserError, match="digits_again"):
        run(config(1.0, also=False), tmp_path / "run")
