"""Distances, CKA and Fisher information against their definitions."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.data.dataset import dataset_of
from finetune_jax.data.source import array_source
from finetune_jax.evaluation import cka as cka_module
from finetune_jax.evaluation import fisher
from finetune_jax.evaluation.cka import gram, similarity, stage_features
from finetune_jax.evaluation.diagnostics import distances, make_extras, open_domains
from finetune_jax.evaluation.fisher import fisher_information
from finetune_jax.models.modes import EVALUATION
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.training.assembly import make_evaluator
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

PLAN = (Phase(name="head", steps=3, rules=small.HEAD, batch_stats="hold", peak_lr=0.1),
        Phase(name="all", steps=3, peak_lr=1e-2))  # fmt: skip


def config(plan=PLAN, **overrides):
    keys = {"evaluate.every_steps": 2, **overrides}
    overrides = [(key, str(value)) for key, value in keys.items()]
    return small.config(model="mlp", hidden=(16, 8), plan=plan, overrides=overrides)


def test_a_distance_is_the_norm_of_the_difference_over_that_of_the_start():
    rng = np.random.default_rng(0)

    def tree():
        return {
            "stage1": {
                "kernel": rng.normal(size=(3, 4)).astype(np.float32),
                "bias": rng.normal(size=4).astype(np.float32),
            },
            "head": {"kernel": rng.normal(size=(4, 2)).astype(np.float32)},
        }

    start, now = tree(), tree()
    found = distances(start, now)
    for stage in ("stage1", "head"):
        one, other = (
            np.concatenate([np.ravel(v) for v in t[stage].values()]).astype(np.float64)
            for t in (start, now)
        )
        expected = np.linalg.norm(other - one) / np.linalg.norm(one)
        assert found[stage] == pytest.approx(expected, rel=1e-14)
    assert distances(start, start) == {"stage1": 0.0, "head": 0.0}


def test_a_distance_from_zeros_is_a_norm_and_what_is_infinite_has_not_moved():
    start = {"a": {"w": np.zeros(2)}, "b": {"w": np.array([np.inf, 3.0, 4.0])}}
    now = {"a": {"w": np.array([3.0, 4.0])}, "b": {"w": np.array([np.inf, 3.0, 4.0])}}
    assert distances(start, now) == {"a": 5.0, "b": 0.0}
    assert distances(start, start) == {"a": 0.0, "b": 0.0}


def test_distances_of_several_models_are_told_apart():
    start = {
        "student": {"stem": {"w": np.ones(4)}},
        "teacher": {"stem": {"w": np.ones(1)}},
    }
    now = {
        "student": {"stem": {"w": np.ones(4)}},
        "teacher": {"stem": {"w": np.zeros(1)}},
    }
    found = distances(start, now, ("student", "teacher"))
    assert found == {"student/stem": 0.0, "teacher/stem": 1.0}


def hsic_cka(one, other):
    """CKA by its definition, with the centring matrix (Kornblith et al., eq. 2, 3)."""
    examples = len(one)
    centre = np.eye(examples) - np.ones((examples, examples)) / examples

    def hsic(a, b):
        return np.trace(a @ centre @ b @ centre) / (examples - 1) ** 2

    a, b = one @ one.T, other @ other.T
    return hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))


def cka(one, other):
    return similarity(gram(one), gram(other))


def test_cka_is_that_of_the_definition(monkeypatch):
    rng = np.random.default_rng(0)
    one = rng.normal(3.0, 1.0, (20, 50))
    other = one @ rng.normal(size=(50, 7)) + rng.normal(-1.0, 2.0, (20, 7))
    expected = hsic_cka(one, other)
    assert 0.1 < expected < 0.95
    assert cka(one, other) == pytest.approx(expected, rel=1e-12)
    # By features, the other side of its equation: |Y'X|^2 / (|X'X| |Y'Y|).
    x, y = one - one.mean(0), other - other.mean(0)
    by_features = np.linalg.norm(y.T @ x) ** 2
    by_features /= np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    assert cka(one, other) == pytest.approx(by_features, rel=1e-12)
    monkeypatch.setattr(cka_module, "GRAM_COLUMNS", 8)
    assert cka(one, other) == pytest.approx(expected, rel=1e-12)


def test_cka_does_not_see_rotations_scales_and_shifts():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(15, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert cka(one, one) == pytest.approx(1, abs=1e-12)
    assert cka(one, one @ rotation) == pytest.approx(1, abs=1e-12)
    assert cka(one, -1e-3 * one + 7) == pytest.approx(1, abs=1e-9)
    stretched = one * np.array([100, 1, 1, 1, 1, 1])
    assert cka(one, stretched) < 0.9


def test_cka_of_features_that_do_not_vary_is_a_number():
    rng = np.random.default_rng(2)
    varying, constant = rng.normal(size=(10, 3)), np.full((10, 3), 0.1)
    assert cka(constant, 3 * constant) == 1.0
    assert cka(varying, constant) == cka(constant, varying) == 0.0
    assert cka(np.zeros((10, 3)), varying) == 0.0


def test_the_features_of_a_stage_are_its_output_in_evaluation():
    task = small.task("cnn", convolutions=(4,), dense=())
    params, batch_stats = run_once(lambda: task.init(jax.random.key(0)))
    batch = {name: array[0] for name, array in small.batch(6).items()}
    features = jax.jit(functools.partial(stage_features, task=task))
    found = features(params, batch_stats, batch)
    assert set(found) == set(task.models.stages)
    prepared = task.prepare(batch, jax.random.key(0), EVALUATION)
    variables = {"params": params, "batch_stats": batch_stats}
    for stage in task.models.stages:
        run_to = functools.partial(task.models.apply, last=stage)
        y, _ = jax.jit(run_to)(variables, prepared["inputs"])
        np.testing.assert_allclose(found[stage], y.reshape(6, -1), rtol=1e-5, atol=1e-6)


KEYS = {"evaluate.distance": True, "evaluate.cka": 40}


def measured(workdir, kind):
    """Returns the metrics of one kind by step."""
    found = {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        part = {k: v for k, v in line.items() if k.startswith(f"{kind}/")}
        if part:
            found[line["step"]] = part
    return found


@pytest.mark.slow
def test_a_run_tells_what_has_moved_and_what_has_not(tmp_path):
    result = run(config(**KEYS), tmp_path / "run")
    far, like_start = (measured(tmp_path / "run", k) for k in ("distance", "cka"))
    stages = ("stage1", "stage2", "head")
    assert list(far) == list(like_start) == [0, 2, 3, 4, 6]
    assert set(far[0].values()) == {0.0}
    for step in (0, 2, 3):  # The backbone is frozen.
        for stage in stages[:-1]:
            assert far[step][f"distance/{stage}"] == 0
            assert like_start[step][f"cka/{stage}"] == pytest.approx(1, abs=1e-12)
    for step in (2, 3):
        assert far[step]["distance/head"] > 0
    for stage in stages:
        assert far[6][f"distance/{stage}"] > 1e-3
        assert 0 < like_start[6][f"cka/{stage}"] < 1 - 1e-6
    for kind, found in (("distance", far), ("cka", like_start)):
        final = {k: v for k, v in result["final"].items() if k.startswith(f"{kind}/")}
        assert final == found[6]
    assert "NaN" not in json.dumps(result)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
@pytest.mark.slow
def test_eight_devices_measure_what_one_does(kind):
    found = []
    for mode, devices in (("jit", 1), (kind, 8)):
        setup = make_setup(
            config(**KEYS, **{"parallel.mode": mode, "parallel.devices": devices})
        )
        start, _ = setup.start()
        rng = np.random.default_rng(0)
        moved = start.replace(
            params=jax.tree.map(
                lambda leaf, rng=rng: (
                    leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
                ),
                start.params,
            )
        )
        extras = make_extras(setup.config, setup.data, start, ())
        evaluator = make_evaluator(setup, start)
        placed = setup.devices.place(moved)
        found.append({k: v for e in extras for k, v in e(evaluator, placed).items()})
    one, many = found
    assert len(one) == 6 and one.keys() == many.keys()
    assert many == pytest.approx(one, rel=1e-5)
    assert 0 < one["cka/stage1"] < 1 - 1e-4


def test_too_few_examples_to_compare_are_refused_before_training():
    setup = make_setup(config(**{"evaluate.cka": 1000}))
    with pytest.raises(UserError, match="validation has 360 examples"):
        open_domains(setup.config, setup.data)
    bare = config(**{"evaluate.cka": 5, "data.validation": None, "data.test": None})
    with pytest.raises(UserError, match="neither validation nor test"):
        open_domains(bare, make_setup(bare).data)


def regression(features=3, classes=3, examples=40):
    """Returns (task, parameters, data) of a softmax regression."""
    rng = np.random.default_rng(0)
    task = small.task(
        "mlp", (features,), fields={"mean": (0.3,)}, hidden=(5,), classes=10
    )
    params, batch_stats = run_once(lambda: task.init(jax.random.key(3)))
    assert batch_stats == {}
    inputs = rng.normal(size=(examples, features)).astype(np.float32)
    label = rng.integers(0, classes, examples)
    source = array_source("small", {"all": (inputs, label)})
    spec = small.spec((features,), classes)
    dataset = dataset_of(source, spec, np.arange(examples), label.astype(np.int32))
    return task, params, dataset


@pytest.mark.slow
@pytest.mark.parametrize("examples", [40, 7])
def test_fisher_information_is_the_mean_of_squares_of_gradients(monkeypatch, examples):
    """Example by example with `jax.grad`, for the labels that are drawn there."""
    task, params, dataset = regression()
    found = fisher_information(task, params, {}, dataset, examples=examples, seed=5)

    @jax.jit
    def logits_of(params, x):
        return task.models.apply({"params": params}, x)[0][0]

    @jax.jit
    @jax.grad
    def gradient(params, x, y):
        return jax.nn.log_softmax(logits_of(params, x))[y]

    drawn = np.random.default_rng(5).permutation(40)[:examples]
    total = {name: np.zeros(leaf.shape) for name, leaf in named(params).items()}
    for place in drawn:
        x = (jnp.asarray(dataset.take(np.array([place]))["inputs"]) - 0.3) / 1.0

        rng = jax.random.fold_in(jax.random.key(5), int(place))
        y = int(jax.random.categorical(rng, logits_of(params, x)))
        for name, leaf in named(gradient(params, x, y)).items():
            total[name] += np.asarray(leaf, np.float64) ** 2
    for name, leaf in named(found).items():
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, total[name] / examples, rtol=1e-4, atol=1e-9)
    monkeypatch.setattr(fisher, "MOST_GRADIENTS", 4)
    chunked = fisher_information(task, params, {}, dataset, examples=examples, seed=5)
    for name, leaf in named(chunked).items():
        np.testing.assert_allclose(leaf, named(found)[name], rtol=1e-5, atol=1e-12)


@pytest.mark.slow
def test_fisher_information_of_the_head_is_that_of_softmax_regression():
    """In expectation: the mean of p (1 - p) h^2, h being the head's input.

    Each of 40 examples stands in the data a hundred times, with labels drawn anew.
    """
    repeats = 100
    task, params, dataset = regression()
    many = np.tile(np.arange(40), repeats)
    dataset = dataclasses.replace(dataset, indices=many, label=dataset.label[many])
    found = named(fisher_information(task, params, {}, dataset, examples=9999, seed=0))
    variables = {"params": params}
    x = jnp.asarray(dataset.take(np.arange(40))["inputs"]) - 0.3
    hidden, _ = task.models.apply(variables, x, last="stage1")
    logits, _ = task.models.apply(variables, x)
    hidden, p = (np.asarray(v, np.float64) for v in (hidden, jax.nn.softmax(logits)))
    hidden = np.concatenate([hidden, np.ones((40, 1))], axis=1)  # The bias' input is 1.
    information = np.einsum("bf,bk->fk", hidden**2, p * (1 - p)) / 40
    # The variance of (1[y = k] - p)^2, y being k with probability p.
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2
    error = np.sqrt(np.einsum("bf,bk->fk", hidden**4, variance) / repeats) / 40
    ours = np.concatenate(
        [found["head/logits/kernel"], found["head/logits/bias"][None]]
    )
    # A factor of two would show in every entry of a feature that is not always zero.
    assert (4 * error <= information).all() and np.median(information) > 1e-3
    # 60 entries, each within four standard errors of its mean.
    assert (np.abs(ours - information) <= 4 * error + 1e-9).all()
