"""Joint learning: what is shared is one, what is not is as if it were alone."""

import dataclasses
import json

import devices
import jax
import mixtures
import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.modes.options import Options
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import read_weights

DIGITS = {"domain": "digits", "name": "digits"}
INVERTED = mixtures.INVERTED
DOMAINS = ("digits", "inverted")
CNN = {"convolutions": (4,), "dense": (8,), "kernel_size": 3}


def specs(classes=(10, 10), shapes=((8, 8, 1), (8, 8, 1)), share=8):
    """Returns a spec of domains 'one', 'two', ..."""
    domains = {
        name: small.spec(shape, count, share=share)
        for name, count, shape in zip(("one", "two", "three"), classes, shapes)
    }
    first = small.spec((8, 8, 1))
    return dataclasses.replace(
        first, class_names=(), train_counts=(100,), domains=domains
    )


def task(spec=None, *, model="cnn", precision="float32", **arguments):
    own = CNN if model == "cnn" else {"hidden": (8,)}
    config = small.config(model=model, overrides=[("precision", precision)], **own)
    config = config.replaced(task={"name": "joint", **arguments})
    return small.task_of(config, spec or specs())


@pytest.mark.slow
def test_with_nothing_shared_two_domains_are_two_runs():
    """Their orders, keys and initial values too; no clipping over all of them."""
    settings = {"shared": (), "data": {"augment": (("pad_crop", 1),)}}
    together, _ = mixtures.trained(mixtures.config(DIGITS, INVERTED, **settings))
    found = named(together.state.params)
    settings["data"]["batch_size"] = 8
    for entry in (DIGITS, INVERTED):
        alone, _ = mixtures.trained(mixtures.config(entry, **settings))
        own = {n: x for n, x in found.items() if n.startswith(entry["domain"])}
        mixtures.assert_close(own, named(alone.state.params), 1e-6)


@pytest.mark.slow
def test_with_everything_shared_it_is_one_run_on_both_batches():
    with jax.enable_x64(True):
        phase = Phase(name="all", steps=3, optimizer="sgd", batch_stats="hold")
        joint = small.Trainer(
            task(precision="float64", shared=(".*",), balance="examples"), phase
        )
        plain = small.Trainer(
            small.task("cnn", (8, 8, 1), [("precision", "float64")], **CNN), phase
        )
        assert named(joint.state.params).keys() == named(plain.state.params).keys()
        for seed in range(3):
            parts = mixtures.nested_batch({"one": 8, "two": 4}, seed=seed)
            parts["two"]["weight"][0, 1] = 0.0
            ours = joint.update(parts)
            both = {
                name: np.concatenate([parts["one"][name], parts["two"][name]], axis=1)
                for name in parts["one"]
            }
            theirs = plain.update(both)
            assert ours["loss"] == pytest.approx(float(theirs["loss"]), rel=1e-12)
        mixtures.assert_close(
            named(joint.state.params), named(plain.state.params), 1e-12
        )


@pytest.mark.slow
def test_a_domain_alone_is_the_plain_task():
    """In training mode, with BatchNorm: loss, gradient and running averages."""
    phase = Phase(name="all", steps=3, optimizer="sgd")
    one = specs(classes=(10,))
    joint = small.Trainer(task(one, shared=(".*",)), phase)
    plain = small.Trainer(small.task("cnn", (8, 8, 1), **CNN), phase)
    batch = small.batch(8, (8, 8, 1))
    ours, theirs = joint.update({"one": batch}), plain.update(batch)
    assert ours["one/loss"] == pytest.approx(float(theirs["loss"]), rel=1e-6)
    for kind in ("params", "batch_stats"):
        pair = (named(getattr(t.state, kind)) for t in (joint, plain))
        mixtures.assert_close(*pair, 1e-6)


def test_heads_are_each_domains_own_and_the_rest_is_shared():
    made = task(specs(classes=(10, 3)))
    names = named(run_once(lambda: random_state(made, 0)).params)
    assert made.models.stages == ("stage1", "stage2", "one/head", "two/head")
    assert names["two/head/logits/bias"].shape == (3,)
    assert "stage1/conv/kernel" in names or "stage1/Conv_0/kernel" in names
    assert not [n for n in names if n.startswith(("one/stage", "two/stage"))]
    named_stages = task(specs(), shared=("stage1/.*",))
    assert named_stages.models.stages[:3] == ("stage1", "one/stage2", "one/head")


@pytest.mark.slow
def test_a_shared_stage_gets_the_gradient_of_both_domains():
    """And a head that of its own domain only."""
    made, phase = task(model="mlp"), Phase(name="all", steps=1, optimizer="sgd")
    start = run_once(lambda: random_state(made, 0))
    moves = []
    for present in (("one",), ("two",), ("one", "two")):
        trainer = small.Trainer(made, phase, state=start)
        batch = mixtures.nested_batch({"one": 8, "two": 8})
        trainer.update({name: batch[name] for name in present})
        after = named(trainer.state.params)
        moves.append(
            {n: np.asarray(after[n]) - x for n, x in named(start.params).items()}
        )
    one, two, both = moves
    for name in both:
        np.testing.assert_allclose(both[name], one[name] + two[name], atol=2e-6)
        if name.startswith("one/"):
            assert not np.any(two[name]) and np.any(one[name])


@pytest.mark.slow
def test_running_averages_are_shared_or_each_domains_own():
    phase = Phase(name="all", steps=1, optimizer="sgd")
    batch = mixtures.nested_batch({"one": 8, "two": 8})
    batch["two"]["inputs"] = batch["two"]["inputs"] // 4
    own = small.Trainer(task(statistics="domain"), phase)
    own.update(batch)
    shared = small.Trainer(task(), phase)
    shared.update(batch)
    apart, common = named(own.state.batch_stats), named(shared.state.batch_stats)
    assert {n.partition("/")[0] for n in apart} == {"one", "two"}
    for name, mean in common.items():
        one, two = apart[f"one/{name}"], apart[f"two/{name}"]
        assert not np.allclose(one, two)
        np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-6)


@pytest.mark.slow
def test_what_is_frozen_of_shared_stages_runs_as_in_evaluation():
    head = Phase(
        name="heads", steps=1, optimizer="sgd",
        rules=((".*head/.*", 1.0), (".*", 0.0)),
    )  # fmt: skip
    trainer = small.Trainer(task(statistics="domain"), head)
    before = mixtures.host(trainer.state)
    trainer.update(mixtures.nested_batch({"one": 8, "two": 8}))
    frozen = trainer.phase.frozen(trainer.state)
    for name, leaf in trainer.phase.frozen(before).items():
        np.testing.assert_array_equal(frozen[name], leaf)
    assert set(named(before.batch_stats)) <= {n.partition("/")[2] for n in frozen}


@pytest.mark.slow
def test_micro_batches_are_one_batch():
    """The divisors are those of the whole update, of domains of other sizes too."""
    found = []
    for parts in (1, 2):
        phase = Phase(
            name="all", steps=1, optimizer="sgd", batch_stats="hold",
            accumulate_steps=parts,
        )  # fmt: skip
        made = task(model="mlp", balance="uncertainty", soft=0.1, shared=("stage1/.*",))
        trainer = small.Trainer(made, phase)
        batch = mixtures.nested_batch({"one": 8, "two": 4})
        batch["one"]["weight"][0, :3] = 0.0
        batch = jax.tree.map(lambda x, k=parts: x.reshape(k, -1, *x.shape[2:]), batch)
        metrics = trainer.update(batch)
        found.append((named(trainer.state.params), float(metrics["loss"])))
    mixtures.assert_close(found[0][0], found[1][0], 1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


@pytest.mark.slow
def test_uncertainties_learn_and_soft_sharing_pulls():
    phase = Phase(name="all", steps=1, optimizer="sgd")
    made = task(model="mlp", balance="uncertainty", shared=(), soft=0.5)
    trainer = small.Trainer(made, phase)
    before = named(mixtures.host(trainer.state.params))
    metrics = trainer.update(mixtures.nested_batch({"one": 8, "two": 8}), rate=0.1)
    after = named(mixtures.host(trainer.state.params))
    for domain in ("one", "two"):
        name = f"{domain}/log_variance/bias"
        gradient = 0.5 - float(metrics[f"{domain}/loss"])  # At s = 0.
        assert after[name] == pytest.approx(-0.1 * gradient, rel=1e-5)
    name = next(n for n in before if n.startswith("one/stage1") and "kernel" in n)
    other = name.replace("one/", "two/")
    free = small.Trainer(task(model="mlp", balance="uncertainty", shared=()), phase)
    free.update(mixtures.nested_batch({"one": 8, "two": 8}), rate=0.1)
    pulled = after[name] - np.asarray(named(free.state.params)[name])
    np.testing.assert_allclose(
        pulled, -0.1 * 0.5 * (before[name] - before[other]), atol=1e-6
    )


@pytest.mark.slow
def test_devices_agree_in_float64():
    """Domains of two sizes, weighed examples, BatchNorm of each domain."""
    with jax.enable_x64(True):
        made = task(precision="float64", balance="uncertainty", statistics="domain")
        phase = Phase(name="all", steps=3, optimizer="sgd", accumulate_steps=2)
        found = {}
        for kind in ("one", "jit", "pmap"):
            batch = mixtures.nested_batch({"one": 32, "two": 16})
            batch["one"]["weight"][0, :3] = (0.0, 2.0, 0.5)
            batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[2:]), batch)
            found[kind] = mixtures.on_devices(kind, made, phase, [batch] * 3)
    for kind in ("jit", "pmap"):
        state, losses = found[kind]
        wanted, wanted_losses = found["one"]
        devices.assert_close(state.params, wanted.params, 1e-10)
        devices.assert_close(state.batch_stats, wanted.batch_stats, 1e-10)
        assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["weights", "round_robin"])
@pytest.mark.ci_runs("weights")
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, mixing):
    config = mixtures.config(
        DIGITS, INVERTED, data={"test": "test", "validation": None, "mixing": mixing},
        balance="uncertainty",
    )  # fmt: skip
    straight = run(config, tmp_path / "straight")
    with pytest.raises(Preempted):
        run(config, tmp_path / "stopped", small.stop_at_once())
    stopped = run(config, tmp_path / "stopped")
    for key in ("params_sha256", "state_sha256", "final"):
        assert straight[key] == stopped[key]
    assert small.lines(tmp_path / "straight") == small.lines(tmp_path / "stopped")
    final = straight["final"]
    accuracies = [final[f"test/{d}/accuracy"] for d in ("digits", "inverted")]
    assert final["test/accuracy"] == pytest.approx(np.mean(accuracies))
    page = (tmp_path / "straight" / "report" / "index.html").read_text()
    assert "test of inverted" in page
    manifest = json.loads((tmp_path / "straight" / "manifest.json").read_text())
    assert set(manifest["data"]["domains"]) == {"digits", "inverted"}


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (
            specs(shapes=((8, 8, 1), (8, 8, 3))),
            {},
            r"stage1.*kernel: one \(3, 3, 1, 4\), two \(3, 3, 3, 4\)",
        ),
        (specs(classes=(10, 3)), {"shared": (".*",)}, "head/logits/bias: one"),
        (specs(), {"shared": ("stage9/.*",)}, "stage9.* matches nothing"),
        (specs(), {"shared": ("(",)}, "is not a regular expression"),
        (specs(), {"weights": (1.0,)}, "1 of them, but 2 domains"),
        (specs(), {"weights": (0.0, 0.0)}, "not all 0"),
        (specs(), {"weights": (1.0, 2.0), "balance": "examples"}, "all count the same"),
        (specs(), {"balance": "domain"}, "did you mean 'domains'"),
        (specs(), {"of": "clasify"}, "did you mean 'classify'"),
        (specs(), {"soft": -1.0}, "0 or more"),
        (small.spec(), {}, "config.data.domains"),
    ],
)
def test_what_cannot_be_learned_together_is_refused(spec, arguments, message):
    with pytest.raises(UserError, match=message):
        task(spec, **arguments)


@pytest.mark.slow
def test_domains_of_other_sizes_and_channels_share_what_fits():
    spec = specs(shapes=((8, 8, 1), (12, 12, 3)), classes=(10, 3))
    made = task(spec, shared=("stage1/(?!.*[Cc]onv).*",))
    trainer = small.Trainer(made, Phase(name="all", steps=1, optimizer="sgd"))
    shapes = {"two": (12, 12, 3)}
    batch = mixtures.nested_batch({"one": 8, "two": 8}, shapes=shapes)
    batch["two"]["label"] %= 3
    assert np.isfinite(trainer.update(batch)["loss"])


def test_a_plan_of_several_domains_is_printed(capsys):
    from finetune_jax.modes import plan

    config = mixtures.config(DIGITS, INVERTED)
    plan.main(config, Options(config="", workdir=None))
    printed = capsys.readouterr().out
    assert "inverted 8x8x1 (10 classes, 8 an update)" in printed
    assert "digits/head, inverted/head" in printed.replace("\n", " ")


@pytest.mark.slow
def test_the_last_domain_is_what_a_run_predicts(tmp_path):
    config = mixtures.config(
        {**DIGITS, "train": "train[:30]", "per_class": None},
        {**INVERTED, "domain": "few", "mean": (0.5,)},
        data={"test": "test", "validation": None},
        plan=(Phase(name="all", steps=30, optimizer="adam", peak_lr=1e-2),),
    )
    result = run(config, tmp_path / "run")
    predictor = open_predictor(config, tmp_path / "run")
    test = make_setup(config).data.held_out["test"].parts["few"]
    records = predictor.records(test)
    right = [r["class"] == str(label) for r, label in zip(records, test.label)]
    assert np.mean(right) == pytest.approx(result["test/few/accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("shared", [(r"(?!head/).*",), ()])
@pytest.mark.ci_runs("shared0")
def test_every_domain_begins_with_the_pretrained_weights(shared):
    config = mixtures.config(
        DIGITS, INVERTED, shared=shared, statistics="domain",
        overrides=[
            ("init.pretrained", "zoo:resnet20_fashion_mnist"),
            ("init.fresh", "('.*head/.*',)"),
        ],
    )  # fmt: skip
    given = small.editable(config)
    given.model.name = "resnet20"
    del given.model["hidden"]
    state, loaded = make_setup(small.resolved(given)).start()
    saved = read_weights("zoo:resnet20_fashion_mnist").tensors
    params, stats = named(state.params), named(state.batch_stats)
    assert loaded.layout and loaded.sha256
    names = (
        ["stem/conv/kernel"] if shared else [f"{d}/stem/conv/kernel" for d in DOMAINS]
    )
    kernel = saved["params/stem/conv/kernel"]
    for name in names:
        np.testing.assert_array_equal(params[name], kernel)
    heads = [params[f"{domain}/head/logits/kernel"] for domain in DOMAINS]
    assert not np.array_equal(*heads)
    means = [
        n for n in saved if n.startswith("batch_stats/stem") and n.endswith("mean")
    ]
    for domain in DOMAINS:
        name = means[0].partition("/")[2]
        np.testing.assert_array_equal(stats[f"{domain}/{name}"], saved[means[0]])
