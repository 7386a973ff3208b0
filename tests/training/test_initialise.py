"""Initialisation by rule: each scheme's values, what they depend on, and mistakes."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import small

import finetune_jax.training.initial.schemes
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest, named
from finetune_jax.data.batches import training_batches
from finetune_jax.models.modes import EVALUATION
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.initial.lsuv import first_examples
from finetune_jax.training.initial.schemes import (
    Rule,
    check_rules,
    cut,
    draw,
    initialise,
    make_rules,
)
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

CNN: dict[str, Any] = dict(model="cnn", convolutions=(4, 8), dense=(16,))
CONV = (3, 3, 64, 128)  # [H, W, I, O], so fans of 576 and 1152.
DENSE = (300, 100)


@functools.cache
def model():
    """Returns a task, its own initial state, and one as if weights had been loaded."""
    task = small.task(**CNN)
    own = run_once(lambda: random_state(task, 0))
    rng = np.random.default_rng(7)

    def loaded(leaf):
        return rng.normal(3.0, 0.5, leaf.shape).astype(leaf.dtype)

    params = jax.tree.map(loaded, own.params)
    batch_stats = jax.tree.map(loaded, own.batch_stats)
    return task, own, own.replace(params=params, batch_stats=batch_stats)


def started(*schemes, seed=0):
    """Returns the names of leaves and what rules make of them, the statistics too."""
    task, own, loaded = model()
    rules, spec = make_rules(schemes, "file:weights"), small.spec()
    check_rules(rules, named(own.params), task=task, spec=spec)
    state = initialise(
        own, loaded, rules, task=task, spec=spec, seed=seed, first_batch=None
    )
    return named(state.params) | named(state.batch_stats)


def leaves(state):
    return named(state.params) | named(state.batch_stats)


def drawn(name, *arguments, shape=CONV, dtype="float32"):
    rules = {"layer/kernel": Rule(".*", name, arguments)}
    shapes = {"layer/kernel": jax.ShapeDtypeStruct(shape, np.dtype(dtype))}
    return draw(rules, shapes, seed=0)["layer/kernel"]


def same(one, other):
    return {name for name in one if np.array_equal(one[name], other[name])}


def config(*overrides, **arguments):
    plan = (Phase(name="all", steps=2),)
    return small.config(plan=plan, overrides=overrides, **(arguments or CNN))


# What is drawn

# By the papers: the standard deviation, and the bound of what is uniform.
FAN_IN, FAN_OUT = 576, 1152
STD = {
    "xavier_uniform": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "xavier_normal": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "kaiming_uniform": math.sqrt(2 / FAN_IN),
    "kaiming_normal": math.sqrt(2 / FAN_IN),
    "lecun_uniform": math.sqrt(1 / FAN_IN),
    "lecun_normal": math.sqrt(1 / FAN_IN),
}


@pytest.mark.parametrize("name", STD)
@pytest.mark.fast_runs("kaiming_normal")
def test_variances_are_those_of_the_papers_fans(name):
    values = drawn(name)
    # Five standard errors of the standard deviation of a normal sample.
    assert values.std() == pytest.approx(STD[name], rel=5 / math.sqrt(2 * values.size))
    assert abs(values.mean()) < 5 * STD[name] / math.sqrt(values.size)
    if name.endswith("uniform"):
        limit = STD[name] * math.sqrt(3)
        assert 0.999 * limit < np.abs(values).max() <= limit * (1 + 1e-6)


def test_plain_distributions_have_the_arguments_that_rules_give():
    values = drawn("normal", 0.3)
    assert (
        scipy.stats.kstest(values.ravel(), scipy.stats.norm(0, 0.3).cdf).pvalue > 1e-3
    )
    values = drawn("truncated_normal", 0.3)
    cut_off = scipy.stats.truncnorm(-2, 2, scale=0.3)
    assert scipy.stats.kstest(values.ravel(), cut_off.cdf).pvalue > 1e-3
    values = drawn("uniform", 0.3)
    assert (
        scipy.stats.kstest(values.ravel(), scipy.stats.uniform(-0.3, 0.6).cdf).pvalue
        > 1e-3
    )
    assert (drawn("constant", -2.5) == -2.5).all()


@pytest.mark.parametrize("shape", [DENSE[::-1], (3, 3, 4, 20)])
def test_orthogonal_kernels_are_orthogonal_matrices_times_the_gain(shape):
    matrix = drawn("orthogonal", 3.0, shape=shape).reshape(-1, shape[-1])
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    np.testing.assert_allclose(
        matrix.T @ matrix, 9 * np.eye(matrix.shape[1]), atol=2e-5
    )


def test_what_is_drawn_has_the_type_of_its_leaf():
    rules = {
        f"{name}/kernel": Rule(".*", name, tuple(arguments))
        for name, *arguments in (
            ("normal", 1), ("uniform", 1), ("orthogonal",), ("lsuv",),
            ("kaiming_normal",), ("constant", 2), ("matched",),
        )
    }  # fmt: skip
    with jax.enable_x64(True):
        shape = jax.ShapeDtypeStruct((8, 4), np.float64)
        values = draw(rules, dict.fromkeys(rules, shape), seed=0)
    assert set(values) == set(rules)
    assert all(v.shape == (8, 4) for v in values.values())
    assert all(v.dtype == np.float64 for v in values.values())
    assert drawn("normal", 1).dtype == np.float32


def in_torch(name, shape, *arguments):
    """Returns torch's kernel of the same scheme in our axes: [H, W, I, O] or [I, O]."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn_init = torch.nn.init
    tensor = torch.empty([shape[-1], shape[-2], *shape[:-2]])
    {
        "normal": lambda t, std: nn_init.normal_(t, std=std),
        "truncated_normal": lambda t, std: nn_init.trunc_normal_(
            t, std=std, a=-2 * std, b=2 * std
        ),
        "uniform": lambda t, limit: nn_init.uniform_(t, -limit, limit),
        "xavier_uniform": nn_init.xavier_uniform_,
        "xavier_normal": nn_init.xavier_normal_,
        "kaiming_uniform": lambda t: nn_init.kaiming_uniform_(t, nonlinearity="relu"),
        "kaiming_normal": lambda t: nn_init.kaiming_normal_(t, nonlinearity="relu"),
        "lecun_uniform": lambda t: nn_init.kaiming_uniform_(t, nonlinearity="linear"),
        "lecun_normal": lambda t: nn_init.kaiming_normal_(t, nonlinearity="linear"),
        "orthogonal": nn_init.orthogonal_,
    }[name](tensor, *arguments)
    return np.moveaxis(tensor.numpy(), (0, 1), (-1, -2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [CONV, DENSE, (3, 3, 1, 4096)])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, ()) for name in STD]
    + [(n, (0.2,)) for n in ("normal", "truncated_normal", "uniform", "orthogonal")],
)
def test_schemes_agree_with_those_of_torch(name, arguments, shape):
    ours = drawn(name, *arguments, shape=shape)
    theirs = in_torch(name, shape, *arguments)
    assert ours.shape == theirs.shape
    error = 5 * math.sqrt(2 / (2 * ours.size))  # Two samples of this size differ so.
    assert ours.std() == pytest.approx(theirs.std(), rel=error)
    if name.endswith("uniform"):
        most = np.abs(ours).max() / np.abs(theirs).max()
        assert most == pytest.approx(1, abs=20 / ours.size)
    # torch's other normal ones are not cut at two standard deviations.
    if name.endswith("uniform") or name in ("normal", "truncated_normal"):
        found: Any = scipy.stats.ks_2samp(ours.ravel(), theirs.ravel())
        assert found.pvalue > 1e-3
    if name == "orthogonal":
        one, other = (a.reshape(-1, shape[-1]) for a in (ours, theirs))
        is_wide = one.shape[0] < one.shape[1]
        one, other = (one.T, other.T) if is_wide else (one, other)
        np.testing.assert_allclose(one.T @ one, other.T @ other, atol=1e-5)


# What the weights gave


@pytest.mark.slow
def test_shuffled_values_are_a_permutation_of_the_pretrained_ones():
    before, after = leaves(model()[2]), started(("stage.*", "shuffled"))
    for name in ("stage2/conv/kernel", "stage2/bn/scale", "stage3/dense/kernel"):
        assert not np.array_equal(after[name], before[name])
        assert after[name].dtype == before[name].dtype
        np.testing.assert_array_equal(
            np.sort(after[name], axis=None), np.sort(before[name], axis=None)
        )


def test_matched_values_have_mean_and_deviation_of_the_pretrained_ones():
    before, after = leaves(model()[2]), started(("stage3/.*", "matched"))
    name = "stage3/dense/kernel"
    old, new = before[name].ravel(), after[name].ravel()
    assert not set(old) & set(new) and new.dtype == old.dtype
    mean, std = float(old.mean()), float(old.std())
    assert scipy.stats.kstest(new, scipy.stats.norm(mean, std).cdf).pvalue > 1e-3
    assert new.mean() == pytest.approx(mean, abs=5 * std / new.size**0.5)
    assert new.std() == pytest.approx(std, rel=5 / (2 * new.size) ** 0.5)


def test_pretrained_everywhere_is_the_weights_and_initial_everywhere_the_model():
    _, own, loaded = model()
    assert digest(started((".*", "pretrained"))) == digest(leaves(loaded))
    assert digest(started((".*", "initial"))) == digest(leaves(own))
    assert digest(started()) == digest(leaves(loaded))


def test_the_first_rule_that_matches_wins():
    _, own, loaded = model()
    found = started(("stage1/.*", "pretrained"), ("stage.*", "initial"))
    assert same(found, leaves(own)) == {
        n for n in found if n.startswith(("stage2", "stage3"))
    }
    assert same(found, leaves(loaded)) == {
        n for n in found if n.startswith(("stage1", "head"))
    }


# Stages as a whole


@pytest.mark.parametrize("at", ["stage1", "stage2", "head"])
def test_a_cut_model_is_pretrained_below_and_as_new_above(at):
    task, own, loaded = model()
    found = started(*cut(task.models.stages, at))
    stages = task.models.stages
    above = {n for n in found if n.split("/")[0] in stages[stages.index(at) :]}
    assert above and same(found, leaves(own)) == above
    assert same(found, leaves(loaded)) == set(found) - above


@pytest.mark.parametrize(
    "scheme",
    ["xavier_normal", "kaiming_uniform", "lecun_normal", "orthogonal", "lsuv"],
)
@pytest.mark.fast_runs("orthogonal")
def test_schemes_for_kernels_start_all_else_as_the_model_does(scheme):
    _, own, loaded = model()
    found = started(("(stage2|head)/.*", scheme))
    new = {"stage2/conv/kernel", "head/logits/kernel"}
    touched = {n for n in found if n.startswith(("stage2", "head"))}
    assert same(found, leaves(own)) == touched - new
    assert same(found, leaves(loaded)) == set(found) - touched
    assert found["stage2/bn/mean"].any() == 0 and (found["stage2/bn/var"] == 1).all()


@pytest.mark.parametrize(
    ("rule", "renewed"),
    [
        (("stage2/.*", "matched"), True),
        (("stage2/bn/scale", "initial"), True),
        (("stage2/.*/kernel", "initial"), False),
        (("stage2/bn/bias", "initial"), False),
        (("stage2/bn/scale", "constant", 0.0), False),
        (("stage2/.*", "pretrained"), False),
    ],
)
def test_running_averages_go_with_the_scale_of_their_batch_norm(rule, renewed):
    _, own, loaded = model()
    found, averages = started(rule), {"stage2/bn/mean", "stage2/bn/var"}
    assert averages <= same(found, leaves(own if renewed else loaded))
    assert {"stage1/bn/mean", "stage1/bn/var"} <= same(found, leaves(loaded))


# What the values depend on


def test_values_depend_on_seed_and_name_alone():
    name, scheme = "stage3/dense/kernel", ("uniform", 1.0)
    alone = started((name, *scheme))[name]
    among = started(("head/.*", "normal", 1.0), ("stage2/bn/.*|stage3.*", *scheme))
    np.testing.assert_array_equal(among[name], alone)
    assert not np.array_equal(started((name, *scheme), seed=1)[name], alone)
    # Of the same shape, but not of the same name.
    assert not np.array_equal(among["stage2/bn/scale"], among["stage2/bn/bias"])


# Layer-sequential unit variance


def variances(setup, state):
    """Returns the variance of each layer's output, in the order of its own module."""
    batches = training_batches(
        setup.data.train, seed=0, batch_size=32, micro_batches=1, updates=range(1)
    )
    raw = next(iter(batches))["inputs"][0]
    inputs = raw.astype(np.float32) / 255 if raw.dtype == np.uint8 else raw
    _, seen = setup.task.models[""].apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        inputs,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense | nn.Conv),
    )
    found = named(seen["intermediates"])
    return {n.removesuffix("/__call__/0"): np.var(v) for n, v in found.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        CNN,
        pytest.param(dict(model="mlp", hidden=(20, 10)), marks=pytest.mark.slow),
        pytest.param(dict(model="resnet20"), marks=pytest.mark.exhaustive),
    ],
)
def test_lsuv_gives_every_layer_unit_variance_on_the_first_batch(arguments):
    rule = (".*", "lsuv", 0.01)
    setup = make_setup(config(("init.schemes", str((rule,))), **arguments))
    start, _ = setup.start()
    found = variances(setup, start)
    kernels = {n: v for n, v in named(start.params).items() if n.endswith("/kernel")}
    assert {f"{name}/kernel" for name in found} == set(kernels)
    assert all(abs(value - 1) < 0.01 for value in found.values()), found
    for kernel in kernels.values():
        matrix = kernel.reshape(-1, kernel.shape[-1])
        matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        gram = matrix.T @ matrix
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(len(gram)), atol=2e-5)


@pytest.mark.slow
def test_lsuv_scales_what_it_matches_and_stops_after_its_rounds():
    scheme = ("stage3/dense/kernel", "lsuv", 0.01, 1)
    plain = make_setup(config()).start()[0]
    setup = make_setup(config(("init.schemes", str((scheme,)))))
    start, _ = setup.start()
    assert same(leaves(start), leaves(plain)) == set(leaves(start)) - {scheme[0]}
    # Its bias is zero, so one round is enough.
    assert abs(variances(setup, start)["stage3/dense"] - 1) < 1e-5
    assert digest(setup.start()[0]) == digest(start)
    unmeasured, _ = setup.start(measure=False)
    assert abs(variances(setup, unmeasured)["stage3/dense"] - 1) > 0.1


def test_lsuv_refuses_a_layer_whose_output_does_not_vary():
    rules = (("stage1/dense/kernel", "constant", 0.0), ("head/.*", "lsuv"))
    setup = make_setup(config(("init.schemes", str(rules)), model="mlp"))
    with pytest.raises(UserError, match="head/logits/kernel has variance 0.0 over"):
        setup.start()


def test_the_first_examples_are_those_of_the_first_update_but_not_augmented():
    given = config(
        ("data.train_size", "16"),
        ("data.augment", "(('random_crop',), ('flip',))"),
        **CNN,
    )
    given_setup = make_setup(given)
    found = first_examples(given_setup.data, given)
    wanted = next(
        iter(
            training_batches(
                given_setup.data.train, seed=0, batch_size=32, micro_batches=1,
                updates=range(1),
            )
        )
    )  # fmt: skip
    np.testing.assert_array_equal(found["label"], wanted["label"][0])
    assert wanted["inputs"].shape == (1, 32, 16, 16, 1)
    assert found["inputs"].shape == (32, 12, 12, 1)
    prepared = given_setup.task.prepare(found, jax.random.key(0), EVALUATION)
    np.testing.assert_allclose(prepared["inputs"], found["inputs"] / 255, rtol=1e-6)


# Class frequencies


def test_class_frequencies_start_at_the_entropy_of_the_labels():
    rules = (("head/.*/kernel", "constant", 0.0), (".*/bias", "class_frequencies"))
    given = config(
        ("init.schemes", str(rules)), ("data.train", "train[:155]"), model="mlp",
        hidden=(),
    )  # fmt: skip
    setup = make_setup(given)
    start, _ = setup.start()
    label = setup.data.train.label
    counts = np.bincount(label, minlength=10)
    assert len(set(counts)) > 1
    np.testing.assert_allclose(
        start.params["head"]["logits"]["bias"], np.log(counts / 155), rtol=1e-6
    )
    batch = setup.data.train.take(np.arange(155))
    prepared = setup.task.prepare(batch, jax.random.key(0), EVALUATION)
    logits = setup.task.outputs(small.variables(start.params), prepared)["logits"]
    probability = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    entropy = scipy.stats.entropy(counts)
    assert sklearn.metrics.log_loss(label, probability) == pytest.approx(entropy)


def test_balanced_data_gives_equal_biases():
    found = started(("head/logits/bias", "class_frequencies"))
    np.testing.assert_allclose(found["head/logits/bias"], np.log(0.1), rtol=1e-6)
    assert found["head/logits/bias"].dtype == np.float32


# Mistakes


def test_wrong_rules_are_all_refused_before_the_data_is_opened():
    rules = (
        ("head/.*", "xavier_unifrm"), ("(", "initial"), ("head/.*",), "initial",
        (".*", "normal"), (".*", "normal", "big"), (".*", "uniform", -1.0),
        (".*", "initial", 2), (".*", "matched"), (".*", "lsuv", 0.1, 0.5),
        (".*", "constant", math.inf), (".*", "constant", True),
    )  # fmt: skip
    given = config(("data.name", "idx"), ("data.dir", "nowhere"))
    given = given.replaced(init={"schemes": rules})
    with pytest.raises(UserError) as error:
        make_setup(given)
    message = str(error.value)
    for text in (
        "schemes[0]: no 'xavier_unifrm'; did you mean 'xavier_uniform'?",
        "schemes[1]: '(' is not a regular expression",
        "schemes[2]: ('head/.*',) is not (regex, scheme, *arguments)",
        "schemes[3]: 'initial' is not (regex, scheme, *arguments)",
        "schemes[4].std: missing",
        "schemes[5].std: 'big'; 1.0 is such a value",
        "schemes[6]: limit -1.0; more than 0 is needed",
        "schemes[7]: takes no arguments, not (2,)",
        "schemes[8]: 'matched' starts from pretrained values, but config.init.pretr",
        "schemes[9].rounds: 0.5; 10 is such a value",
        "schemes[10].value: inf",
        "schemes[11].value: True",
    ):
        assert text in message
    assert len(message.splitlines()) == len(rules)


def test_rules_that_do_not_fit_the_model_are_all_refused():
    rules = (
        ("stage2/conv/kernal", "initial"),
        ("head/.*", "class_frequencies"),
        ("stage1/.*", "pretrained"),
        ("stage1/conv/.*", "pretrained"),
    )
    given = config(
        ("init.schemes", str(rules)), ("init.pretrained", "zoo:nothing"),
        ("init.fresh", "('stage1/bn/.*',)"), **CNN,
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        make_setup(given)
    message = str(error.value)
    for text in (
        "'stage2/conv/kernal' matches nothing; did you mean 'stage2/conv/kernel'?",
        "'class_frequencies': head/logits/kernel (16, 10) is not the last layer's bias",
        "'pretrained' takes stage1/bn/bias from the weights, but config.init.fresh",
        "'pretrained' takes stage1/bn/scale from the weights",
        "'stage1/conv/.*': earlier rules match all parameters that it does",
    ):
        assert text in message
    assert len(message.splitlines()) == 5


def test_class_frequencies_need_classes_and_the_last_layers_bias():
    task = small.task("cnn", convolutions=(4,), dense=(10,))
    shapes = named(jax.eval_shape(lambda: random_state(task, 0)).params)
    rules = make_rules(((".*dense/bias", "class_frequencies"),), None)
    check = functools.partial(check_rules, rules, shapes, task=task)
    # As many values as there are classes, but in a layer before.
    with pytest.raises(UserError, match=r"stage2/dense/bias \(10,\) is not the last"):
        check(spec=small.spec())
    with pytest.raises(UserError, match="the data has no classes"):
        check(spec=dataclasses.replace(small.spec(), class_names=()))


def test_a_cut_at_no_stage_is_refused():
    with pytest.raises(UserError, match="no stage 'stage4'; did you mean 'stage"):
        cut(("stem", "stage1", "stage2", "head"), "stage4")


# Runs


@pytest.mark.slow
def test_a_run_that_goes_on_takes_its_start_from_checkpoint_0(tmp_path, monkeypatch):
    given = config(
        ("init.schemes", "(('.*', 'lsuv'),)"), ("checkpoint.every_steps", "1"),
        model="mlp", hidden=(8,),
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(small.Killed):
        small.die_before(patch, 1)
        run(given, tmp_path / "run")

    def again(*_):
        raise AssertionError("the layers are scaled again")

    monkeypatch.setattr(finetune_jax.training.initial.schemes, "scale_layers", again)
    assert run(given, tmp_path / "run")["steps"] == 2


def test_a_model_larger_than_the_machine_is_refused(tmp_path):
    with pytest.raises(UserError, match="take 620.0 GB, but this machine has"):
        run(small.config(model="mlp", hidden=(10**9,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
