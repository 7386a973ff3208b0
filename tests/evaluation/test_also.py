"""Other domains, on which a run is measured besides its own."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import small
from other_domains import config
from safetensors.numpy import save_file

from finetune_jax import main
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.evaluation.diagnostics import domain_named, open_domains
from finetune_jax.evaluation.fisher import domain_fisher
from finetune_jax.evaluation.other_domains import with_head
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.training.assembly import make_evaluator
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Digits 0 to 4 of another size, as bytes that are 100 too high at most."""
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    few = bunch.target < 5
    images = np.repeat(np.repeat(bunch.images[few] * 9, 2, axis=1), 2, axis=2) + 100
    path = tmp_path_factory.mktemp("other") / "other.npz"
    np.savez(path, x=images.astype(np.uint8), y=bunch.target[few])
    return str(path)


def entries(other):
    common = {"name": "arrays", "dir": other, "mean": (0.5,), "std": (0.25,)}
    return (
        {"label": "now", "head": "current", **common},
        {"label": "before", "head": "start", "test": "validation[:50%]", **common},
        {"label": "digits", "name": "digits", "split_seed": 3},
    )


def moved(state, seed=0):
    """Returns a state of which every parameter is another."""
    rng = np.random.default_rng(seed)
    return state.replace(
        params=jax.tree.map(
            lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype),
            state.params,
        )
    )


def alone(other, hidden=(8,), **overrides):
    """Returns the setup of a run that has the other domain for its own."""
    data = {"name": "arrays", "dir": other, "mean": (0.5,), "std": (0.25,)}
    given = {f"data__{key}": value for key, value in data.items()}
    return make_setup(config((), hidden, **(given | overrides)))


@pytest.mark.parametrize("kind", ["one", "jit", "pmap"])
@pytest.mark.fast_runs("one")
def test_a_domain_is_measured_as_a_run_of_its_own_would_be(other, kind):
    mode = {"one": ("jit", 1), "jit": ("jit", 8), "pmap": ("pmap", 8)}[kind]
    devices = {"parallel__mode": mode[0], "parallel__devices": mode[1]}
    hidden = () if kind == "one" else (8,)  # With BatchNorm, and without.
    setup = make_setup(config(entries(other), hidden, **devices))
    start, _ = setup.start()
    evaluator = make_evaluator(setup, start, open_domains(setup.config, setup.data))
    state = moved(start)
    placed = setup.devices.place(state)
    found = evaluator.measure(placed, {}, prefix=None)
    assert set(found) == {
        f"{label}/{name}"
        for label in ("now", "before", "digits")
        for name in ("accuracy", "loss")
    }
    theirs = alone(
        other, hidden, model__classes=10, data__validation="validation[:50%]"
    )
    judge = make_evaluator(theirs, start)
    own = judge.measure(theirs.devices.place(state), theirs.data.held_out, prefix=None)
    with_start = state.params | {"head": start.params["head"]}
    old = judge.measure(
        theirs.devices.place(state.replace(params=with_start)),
        theirs.data.held_out,
        prefix=None,
    )
    for name in ("accuracy", "loss"):
        assert found[f"now/{name}"] == pytest.approx(own[f"test/{name}"], rel=1e-6)
        expected = old[f"validation/{name}"]
        assert found[f"before/{name}"] == pytest.approx(expected, rel=1e-6)
    assert own["validation/loss"] != old["validation/loss"]
    # The run's own data cut otherwise.
    seeded = make_setup(config((), hidden, data__split_seed=3))
    own = make_evaluator(seeded, start).measure(
        seeded.devices.place(state), seeded.data.held_out, prefix=None
    )
    assert found["digits/loss"] == pytest.approx(own["test/loss"], rel=1e-6)


def lines(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_taken_up_again_logs_the_same_lines(other, tmp_path, monkeypatch, capsys):
    everything = {"evaluate__distance": True, "evaluate__cka": 20}
    given = config(entries(other), **everything)
    whole = run(given, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 5)
        run(given, tmp_path / "run")
    result = run(given, tmp_path / "run")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert result["final"] == whole["final"] and result["best"] == whole["best"]
    seen = [line for line in lines(tmp_path / "whole") if "before/loss" in line]
    # Before update 0, at intervals, and at the ends of phases.
    assert [line["step"] for line in seen] == [0, 2, 3, 4, 6]
    assert {k: v for k, v in seen[-1].items() if k in whole["final"]} == whole["final"]
    # The head's training changes nothing for the head that was there before it.
    assert len({line["before/loss"] for line in seen[:3]}) == 1
    assert len({line["before/loss"] for line in seen}) == 3
    assert len({line["now/loss"] for line in seen}) == 5
    assert main.run(["--mode=evaluate", f"--workdir={tmp_path / 'run'}"]) == 0
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {k: again[k] for k in whole["final"]} == whole["final"]


def pretrained(path, classes, seed=1):
    """Writes the weights of a model with so many logits; returns address, tensors."""
    setup = make_setup(config((), model__classes=classes))
    state, _ = setup.start()
    state = moved(state, seed)
    tensors = named({"params": state.params, "batch_stats": state.batch_stats})
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return f"file:{path}", state


FRESH = {"init__fresh": ("head/.*",)}


@pytest.mark.slow
def test_the_pretrained_head_may_have_other_classes_than_the_run(other, tmp_path):
    """Five classes there, ten here: the weights' head serves its own domain."""
    data = {"name": "arrays", "dir": other, "mean": (0.5,), "std": (0.25,)}
    theirs = alone(other)
    before, _ = theirs.start()
    before = moved(before, 1)
    tensors = named({"params": before.params, "batch_stats": before.batch_stats})
    path = tmp_path / "weights.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    also = ({"label": "source", "head": "pretrained", **data, "train": "train"},)
    given = config(also, init__pretrained=f"file:{path}", **FRESH)
    setup = make_setup(given)
    start, _ = setup.start()
    domains = open_domains(setup.config, setup.data)
    found = make_evaluator(setup, start, domains).measure(
        setup.devices.place(start), {}, prefix=None
    )
    own = make_evaluator(theirs, before).measure(
        theirs.devices.place(before), theirs.data.held_out, prefix=None
    )
    for name in ("accuracy", "loss"):
        assert found[f"source/{name}"] == pytest.approx(own[f"test/{name}"], rel=1e-6)
    # EWC reads it like the parameters of the run, whose head it says nothing of.
    fisher = domain_fisher(domain_named(domains, "source"), start, examples=8, seed=0)
    assert jax.tree.map(np.shape, fisher) == jax.tree.map(np.shape, start.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(fisher["head"]))
    assert all(
        leaf.any() and (leaf >= 0).all()
        for name, leaf in named(fisher).items()
        if name.endswith("kernel") and not name.startswith("head/")
    )


def test_a_pretrained_head_as_wide_as_the_models_serves_fewer_classes(other, tmp_path):
    address, before = pretrained(tmp_path / "weights.safetensors", 10)
    also = ({"label": "source", "head": "pretrained", "name": "arrays", "dir": other},)
    setup = make_setup(config(also, init__pretrained=address, **FRESH))
    start, _ = setup.start()
    (domain,) = open_domains(setup.config, setup.data)
    for name, leaf in domain.head_variables(start).items():
        expected = named({"params": before.params})[name]
        np.testing.assert_array_equal(leaf, expected)
    assert domain.task.models[""]["head"].classes == 10


def test_a_pretrained_head_that_does_not_fit_is_refused(other, tmp_path):
    address, _ = pretrained(tmp_path / "weights.safetensors", 12)
    also = ({"label": "source", "head": "pretrained", "name": "arrays", "dir": other},)
    setup = make_setup(config(also, init__pretrained=address, **FRESH))
    with pytest.raises(UserError) as found:
        open_domains(setup.config, setup.data)
    assert "params/head/logits/kernel: model (8, 5), weights (8, 12)" in str(
        found.value
    )
    assert "config.evaluate.also[0].head" in str(found.value)


def test_a_low_rank_head_is_swapped_whole(other, tmp_path):
    """The pretrained head has no low-rank update, so its own counts as zero."""
    address, before = pretrained(tmp_path / "weights.safetensors", 10)
    also = ({"label": "source", "head": "pretrained", "name": "arrays", "dir": other},)
    lora = {"model__lora_rank": 2, "model__lora_targets": (".*",)}
    setup = make_setup(config(also, init__pretrained=address, **lora))
    start, _ = setup.start()
    assert "lora_b" in start.params["head"]["logits"]
    (domain,) = open_domains(setup.config, setup.data)
    params, _ = with_head(start.params, start.batch_stats, domain.head_variables(start))
    assert not params["head"]["logits"]["lora_b"].any()
    np.testing.assert_array_equal(
        params["head"]["logits"]["kernel"], before.params["head"]["logits"]["kernel"]
    )


def test_all_that_is_wrong_with_other_domains_is_told_at_once(other, tmp_path):
    wide = tmp_path / "wide.npz"
    np.savez(wide, x=np.zeros((48, 8, 8), np.uint8), y=np.arange(48) % 12)
    flat = tmp_path / "flat.npz"
    np.savez(flat, x=np.zeros((20, 7), np.float32), y=np.arange(20) % 2)
    numbers = tmp_path / "numbers.npz"
    np.savez(numbers, x=np.zeros((20, 8, 8), np.uint8), y=np.linspace(0, 1, 20))
    arrays = functools.partial(dict, name="arrays")
    also = (
        {"label": "test"}, {"label": "Source-1"}, {"label": "a"}, {"label": "a"},
        {"label": "b", "head": "curent"}, {"label": "c", "head": "pretrained"},
        {"label": "d", "name": "digitz"}, {"label": "e", "test": "tset"},
        {"label": "f"}, {"label": "g", "mean": (0.1, 0.2)},
        {"label": "h", "train": "trian"}, arrays(label="i", dir=str(wide)),
        arrays(label="j", dir=str(flat)), arrays(label="k", dir="nowhere.npz"),
        arrays(label="l", dir=str(numbers)),
        {"label": "m", "resize": 4},
    )  # fmt: skip
    setup = make_setup(config(also, init__fisher="aa", evaluate__cka=9999))
    with pytest.raises(UserError) as found:
        open_domains(setup.config, setup.data)
    text, where = str(found.value), "config.evaluate.also"
    for part in (
        f"{where}[0].label: 'test' names other metrics",
        f"{where}[1].label: 'Source-1'; a-z",
        f"{where}[3].label: 'a' twice",
        f"{where}[4].head: 'curent' is not one of",
        f"{where}[5].head: 'pretrained', but config.init.pretrained is None",
        f"{where}[6].name: no 'digitz'; did you mean 'digits'?",
        f"{where}[7].test: no 'tset'; did you mean 'test'?",
        f"{where}[9].mean: 2 numbers",
        f"{where}[10].train: no 'trian'; did you mean 'train'?",
        f"{where}[11].head: 'current' has 10 logits, but arrays has 12 classes",
        f"{where}[12].name: its examples are (7,), and the model takes (8, 8, 1)",
        f"{where}[13].dir: no file 'nowhere.npz'",
        f"{where}[14].name: the labels of arrays are not classes",
        f"{where}[15].resize: 4, but 8x8",
        "config.init.fisher: no 'aa' in config.evaluate.also; did you mean 'a'?",
        "config.evaluate.cka: 9999, but validation has 360 examples",
    ):
        assert part in text, (part, text)


def test_only_validation_chooses_the_best_checkpoint(other):
    given = config(entries(other), evaluate__best="now/accuracy")
    with pytest.raises(UserError, match="'now/accuracy' cannot choose"):
        make_setup(given)


def test_a_domain_with_other_classes_than_the_run_is_refused(tmp_path):
    """By position they would be measured as wrong, or as right, without a word."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 2
    for name, classes in (("own", ["red", "green"]), ("swapped", ["green", "red"]),
                          ("foreign", ["cat", "dog"]), ("half", ["red", "apple"]),
                          ("numbers", ["0", "1"])):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, class_names=classes)

    def told(name, head="current"):
        path = str(tmp_path / f"{name}.npz")
        also = ({"label": "a", "name": "arrays", "dir": path, "head": head},)
        own = {"data__name": "arrays", "data__dir": str(tmp_path / "own.npz")}
        setup = make_setup(config(also, **own))
        (domain,) = open_domains(setup.config, setup.data)
        # Only by name are the labels others.
        wanted = y[domain.test.indices]
        wanted = 1 - wanted if name == "swapped" else wanted
        assert domain.test.label.tolist() == wanted.tolist()
        return "\n".join(domain.warnings)

    assert not told("own")
    assert "numbered as the run's" in told("swapped")
    assert "'0' is 'red', '1' is 'green'" in told("numbers")
    assert "'cat' is 'red', 'dog' is 'green'" in told("foreign", "start")
    for name, absent in (("foreign", "cat, dog"), ("half", "apple")):
        with pytest.raises(UserError, match=rf"also\[0\].name: {absent}: not among"):
            told(name)
