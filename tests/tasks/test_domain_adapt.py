"""Domain adaptation: what each method adds, and that it does its job without labels."""

import dataclasses

import devices
import jax
import mixtures
import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest, named
from finetune_jax.modes.options import Options
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.objectives.domain_losses import coral, mmd, ramp
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run

pytestmark = pytest.mark.usefixtures("no_pictures")

DIGITS = {"domain": "digits", "name": "digits"}
TARGET = {**mixtures.INVERTED, "labelled": False}
SIZES = {"source": 32, "target": 16}
CNN = {"convolutions": (4,), "dense": (8,), "kernel_size": 3}
SGD = Phase(name="all", steps=3, optimizer="sgd")


def specs(classes=(10, 10), shapes=((8, 8, 1),) * 2, labelled=(True, False)):
    domains = {
        name: small.spec(shape, count, share=8, labelled=is_labelled)
        for name, count, shape, is_labelled in zip(SIZES, classes, shapes, labelled)
    }
    first = small.spec((8, 8, 1))
    return dataclasses.replace(
        first, class_names=(), train_counts=(100,), domains=domains
    )


def task(spec=None, *, model="cnn", precision="float32", **arguments):
    own = CNN if model == "cnn" else {"hidden": (8, 8)}
    config = small.config(model=model, overrides=[("precision", precision)], **own)
    config = config.replaced(task={"name": "domain_adapt", **arguments})
    return small.task_of(config, spec or specs())


def batch(sizes=None):
    return mixtures.nested_batch(sizes or SIZES, unlabelled=("target",))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dann", "mmd", "coral", "self_training"])
@pytest.mark.ci_runs("dann")
def test_devices_agree_in_float64(method):
    """What compares examples compares those of all devices."""
    with jax.enable_x64(True):
        made = task(precision="float64", method=method, threshold=0.11)
        found = {}
        for kind in ("one", "jit", "pmap"):
            taken = batch()
            taken["target"]["weight"][0, :2] = (0.0, 0.5)
            found[kind] = mixtures.on_devices(kind, made, SGD, [taken] * 3)
    for kind in ("jit", "pmap"):
        state, losses = found[kind]
        wanted, wanted_losses = found["one"]
        devices.assert_close(state.params, wanted.params, 1e-10)
        devices.assert_close(state.batch_stats, wanted.batch_stats, 1e-10)
        assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.parametrize(
    "method", [pytest.param("mmd", marks=pytest.mark.slow), "coral"]
)
@pytest.mark.slow
def test_the_loss_is_that_of_the_source_and_a_distance(method):
    made = task(model="mlp", method=method, strength=2.0)
    state = run_once(lambda: random_state(made, 0))
    held = Phase(name="all", steps=1, optimizer="sgd", batch_stats="hold")
    trainer = small.Trainer(made, held, state=state)
    metrics = trainer.step(
        trainer.state, trainer.fixed, batch(), np.float32(0), np.float32(0.3)
    )[1]
    features = {}
    for name, part in batch().items():
        micro = {key: array[0] for key, array in part.items()}
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        inputs = micro["inputs"] / np.float32(255)
        features[name] = np.asarray(
            made.models[""].apply(variables, inputs, last="stage2", train=False)
        )
    ones = {name: np.ones(len(x), np.float32) for name, x in features.items()}
    distance = {"mmd": mmd, "coral": coral}[method](
        features["source"], features["target"], ones["source"], ones["target"]
    )
    added = 2.0 * float(ramp(np.float32(0.3))) * float(distance)
    assert metrics["alignment"] == pytest.approx(added, rel=1e-4)
    wanted = float(metrics["source/loss"]) + added
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_the_discriminator_learns_what_the_classifier_unlearns():
    """With reversed gradients the backbone moves the other way than without."""
    arguments = {"model": "mlp", "method": "dann", "schedule": "constant"}
    made = task(**arguments)
    held = Phase(name="all", steps=1, optimizer="sgd", batch_stats="hold")
    start = run_once(lambda: random_state(made, 0))
    moves = {}
    for strength in (0.0, 1.0, 2.0):
        other = task(strength=strength, **arguments)
        trainer = small.Trainer(other, held, state=start)
        trainer.update(batch(), rate=1.0)
        after = named(mixtures.host(trainer.state.params))
        moves[strength] = {n: after[n] - x for n, x in named(start.params).items()}
    for name in moves[0.0]:
        once = moves[1.0][name] - moves[0.0][name]
        twice = moves[2.0][name] - moves[0.0][name]
        np.testing.assert_allclose(twice, 2 * once, atol=1e-5)
        if name.startswith(("discriminator", "head")):  # Theirs is not reversed.
            np.testing.assert_allclose(once, 0, atol=1e-6)
        else:
            assert np.any(once)


@pytest.mark.slow
def test_a_phase_that_trains_nothing_gives_the_target_its_running_averages():
    """AdaBN: no parameter moves, and no average is the source's."""
    adapt = Phase(
        name="adabn", steps=1, optimizer="sgd", rules=((".*", 0.0),),
        batch_stats="update_all",
    )  # fmt: skip
    made = task(method="none")
    found = []
    for seed in (0, 9):  # Other examples of the source.
        trainer = small.Trainer(made, adapt)
        before = digest(mixtures.host(trainer.state.params))
        taken = batch()
        taken["source"]["inputs"] = np.roll(taken["source"]["inputs"], seed, axis=1)
        taken["source"]["inputs"][0, :seed] = 255
        trainer.update(taken)
        assert digest(mixtures.host(trainer.state.params)) == before
        found.append(named(mixtures.host(trainer.state.batch_stats)))
    mixtures.assert_close(*found, 0.0)
    trainer = small.Trainer(made, SGD)
    start = named(mixtures.host(trainer.state.batch_stats))
    assert all(np.any(found[0][name] != leaf) for name, leaf in start.items())


@pytest.mark.slow
def test_a_stopped_run_with_adabn_ends_in_the_same_bits(tmp_path):
    """And its second phase moves what is measured on the target, not its parameters."""
    source = Phase(name="source", steps=20, optimizer="adam", peak_lr=1e-2)
    adabn = Phase(
        name="adabn", steps=5, optimizer="sgd", rules=((".*", 0.0),),
        batch_stats="update_all",
    )  # fmt: skip
    noisy = {
        **DIGITS, "domain": "noisy", "labelled": False, "shift": (("noise", 0.4),),
    }  # fmt: skip
    given = mixtures.config(
        {**DIGITS, "stratified": False}, noisy, task="domain_adapt", method="none",
        plan=(source, adabn), data={"batch_size": 64},
    )  # fmt: skip
    given = small.editable(given)
    given.model.name, given.model.convolutions = "cnn", (8,)
    given.model.dense, given.model.kernel_size = (32,), 3
    del given.model["hidden"]
    config = small.resolved(given)
    straight = run(config, tmp_path / "straight")
    before = [line for line in small.lines(tmp_path / "straight") if line["step"] == 20]
    before = [line for line in before if "test/noisy/accuracy" in line][-1]
    assert straight["test/noisy/loss"] != before["test/noisy/loss"]
    with pytest.raises(Preempted):
        run(config, tmp_path / "stopped", small.stop_at_once())
    stopped = run(config, tmp_path / "stopped")
    assert stopped["state_sha256"] == straight["state_sha256"]


def test_a_plan_tells_which_domain_has_no_labels(capsys):
    from finetune_jax.modes import plan

    plan.main(
        mixtures.config(DIGITS, TARGET, task="domain_adapt"),
        Options(config="", workdir=None),
    )
    printed = capsys.readouterr().out
    assert "inverted 8x8x1 (10 classes, 8 an update, without labels)" in printed
    assert "discriminator/layers" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (specs(labelled=(True, True)), {}, "none with labelled=False"),
        (specs(labelled=(False, False)), {}, "none with labelled=True"),
        (specs(classes=(10, 3)), {}, "their classes differ"),
        (specs(shapes=((8, 8, 1), (8, 8, 3))), {}, "their shapes differ"),
        (specs(), {"method": "dan"}, "did you mean 'dann'"),
        (specs(), {"features": "head"}, "no stage 'head' before the head"),
        (specs(), {"threshold": 1.5}, "0 to 1"),
        (specs(), {"strength": -1.0}, "0 or more"),
        (small.spec(), {}, "config.data.domains"),
    ],
)
def test_domains_that_cannot_be_adapted_are_refused(spec, arguments, message):
    with pytest.raises(UserError, match=message):
        task(spec, **arguments)
