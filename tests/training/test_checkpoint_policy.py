"""Runs that keep fewer or smaller checkpoints: they resume, open and serve as weights."""

import json
from typing import Any

import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import bytes_below
from finetune_jax.core.pytrees import digest, named
from finetune_jax.data.dataset import no_data
from finetune_jax.plans.phase import Phase
from finetune_jax.report.workdir import read_config
from finetune_jax.training.loop import Preempted
from finetune_jax.training.restore import best_state
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

MODEL: dict[str, Any] = dict(model="mlp", hidden=(256,))
HEAD = Phase(name="head", steps=4, rules=small.HEAD, optimizer="adam")
SHORT = {
    "data.train": "train[:96]",
    "data.validation": "validation[:32]",
    "data.test": "None",
    "data.cache": "off",
    "evaluate.best": "validation/loss",
    "evaluate.every_steps": "2",
    "report.every_steps": "1",
}


def config(*phases, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    pairs = tuple({**SHORT, **overrides}.items())
    return small.config(plan=phases, overrides=pairs, **MODEL)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns the workdir of a run whose weights others load."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_jax.training.run.write_report", lambda *_: None)
        run(config(Phase(name="all", steps=1)), workdir)
    return workdir


def trained_only(source, **overrides):
    return config(
        HEAD, init__pretrained=f"orbax:{source}", checkpoint__params="trained", **overrides
    )  # fmt: skip


@pytest.mark.slow
def test_frozen_values_stay_in_the_weight_file(source, tmp_path, no_pictures):
    workdir = tmp_path / "trained"
    with pytest.raises(Preempted):
        run(trained_only(source), workdir, small.stop_at_once())
    result = run(trained_only(source), workdir)
    whole = run(config(HEAD, init__pretrained=f"orbax:{source}"), tmp_path / "all")
    assert small.same_result(result, whole)
    assert small.lines(workdir) == small.lines(tmp_path / "all")
    sizes = [found["disk_bytes"]["checkpoints"] for found in (result, whole)]
    assert sizes[0] == bytes_below(workdir / "checkpoints") < sizes[1] / 2
    # As a prediction opens it, without data.
    plain = read_config(workdir)
    setup = make_setup(plain, no_data(make_setup(plain).data.spec))
    states = [best_state(setup, folder)[0] for folder in (workdir, tmp_path / "all")]
    assert digest(states[0].params) == digest(states[1].params)


@pytest.mark.slow
def test_weights_that_have_changed_are_told(source, tmp_path, no_pictures):
    workdir = tmp_path / "run"
    run(trained_only(source), workdir)
    other = run(config(Phase(name="all", steps=2)), tmp_path / "other")
    assert other["steps"] == 2
    text = (
        (workdir / "config.json")
        .read_text()
        .replace(str(source), str(tmp_path / "other"))
    )
    (workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.checkpoint.params: .* has others now"):
        best_state(make_setup(read_config(workdir)), workdir)
    with pytest.raises(UserError, match="export the run"):
        run(config(HEAD, init__pretrained=f"orbax:{workdir}"), tmp_path / "next")


@pytest.mark.parametrize(
    ("phase", "overrides"),
    [
        (HEAD, {}),
        (Phase(name="all", steps=1), {"pretrained": True}),
        (HEAD, {"pretrained": True, "init__schemes": "(('head/.*', 'initial'),)"}),
    ],
)
def test_values_that_are_not_in_a_file_cannot_be_left_to_it(
    phase, overrides, source, tmp_path, no_pictures
):
    overrides = dict(overrides)
    if overrides.pop("pretrained", False):
        overrides["init__pretrained"] = f"orbax:{source}"
    wanted = config(phase, checkpoint__params="trained", **overrides)
    with pytest.raises(UserError, match=r"config.checkpoint.params: 'trained', but"):
        run(wanted, tmp_path / "run")


def test_a_finished_run_may_keep_the_best_checkpoint_only(
    source, tmp_path, no_pictures
):
    """It is read as weights too, whose frozen part is that of checkpoint 0."""
    workdir = tmp_path / "run"
    wanted = config(
        HEAD, init__pretrained=f"orbax:{source}", checkpoint__best_only="True",
        checkpoint__keep="3",
    )  # fmt: skip
    result = run(wanted, workdir)
    names = {place.name for place in (workdir / "checkpoints").iterdir()}
    assert names == {"0", str(result["best_step"])}
    size = bytes_below(workdir / "checkpoints")
    assert size == result["disk_bytes"]["checkpoints"]
    meta = workdir / "checkpoints" / str(result["best_step"]) / "meta" / "metadata"
    assert json.loads(meta.read_text())["shared"]
    setup = make_setup(config(HEAD, init__pretrained=f"orbax:{workdir}"))
    start, loaded = setup.start()
    best, _ = best_state(make_setup(wanted), workdir)
    assert digest(named(start.params)) == digest(named(best.params))
    assert len(loaded.sha256) > 4
