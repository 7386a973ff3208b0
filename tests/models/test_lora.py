"""Low-rank updates: what they compute, what they leave alone, what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import like, named
from finetune_jax.models import make_model
from finetune_jax.models.peft.lora import LoRA, is_lora, merge, with_lora
from finetune_jax.parallel.compiling import run_once
from finetune_jax.plans.phase import Phase
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.loop import Preempted
from finetune_jax.training.restore import restore
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.layouts.resnet import LAYOUTS
from finetune_jax.weights.merge import load_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

RULES = ((".*/lora_[ab]", 1.0), ("head/.*", 1.0), (".*", 0.0))
FAMILIES = ("mlp", "cnn", "resnet20", "resnet18", "efficientnet_lite0")


def made(name, dtype="float32", **arguments):
    kind = jnp.dtype(dtype)
    arguments = {"head": {}, **arguments}
    return make_model(name, arguments, classes=10, dtype=kind, param_dtype=kind)


def inputs(shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)


def shapes(model, x, **options):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, **options))


def values(model, x, seed=0, **options):
    """Returns variables at random, `lora_b` too; kernels as large as they start."""
    rng = np.random.default_rng(seed)

    def value(leaf):
        if leaf.ndim == 1:
            return (0.5 + rng.random(leaf.shape)).astype(leaf.dtype)
        size = np.sqrt(1 / np.prod(leaf.shape[:-1]))
        return (size * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(value, shapes(model, x, **options))


def applied(model, variables, x, **options):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, **options))(variables, x))


def same(one, other):
    one, other = named(one), named(other)
    return one.keys() == other.keys() and all(
        np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes()
        for name in one
    )


def test_rank_0_is_the_model_itself():
    plain = made("resnet20")
    none = made("resnet20", lora_rank=0, lora_alpha=3.0, lora_targets=("nothing",))
    assert type(none) is type(plain) and none == plain


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.fast_runs("mlp", "cnn", "resnet20")
def test_every_kernel_outside_the_head_gets_an_update_in_every_family(name):
    x = inputs((32, 32, 3))
    plain, model = made(name), made(name, lora_rank=2)
    assert isinstance(model, LoRA) and hash(model) == hash(made(name, lora_rank=2))
    assert model == made(name, lora_rank=2) != made(name, lora_rank=3)
    assert model.stages == plain.stages
    before, after = (shapes(m, x, train=False) for m in (plain, model))
    assert after.get("batch_stats") == before.get("batch_stats")
    kernels, leaves = named(before["params"]), named(after["params"])
    wanted = {n: leaf.shape for n, leaf in kernels.items()}
    for kernel, leaf in kernels.items():
        if kernel.endswith("/kernel") and not kernel.startswith("head/"):
            wanted[kernel[:-6] + "lora_a"] = (*leaf.shape[:-1], 2)
            wanted[kernel[:-6] + "lora_b"] = (2, leaf.shape[-1])
    assert {n: leaf.shape for n, leaf in leaves.items()} == wanted
    logits = jax.eval_shape(lambda v: model.apply(v, x, train=False), after)
    assert logits.shape == (3, 10)
    assert (
        jax.eval_shape(lambda p: merge(p, alpha=1.0), after["params"])
        == (before["params"])
    )


@pytest.mark.slow
def test_a_model_starts_as_it_would_without_and_a_as_torch_starts_a_dense_layer():
    x = inputs((16, 16, 1))
    plain, model = (made("mlp", hidden=(64, 32), lora_rank=rank) for rank in (0, 8))
    before, after = (
        run_once(lambda m=m: m.init(jax.random.key(0), x, train=False))
        for m in (plain, model)
    )
    base = {n: v for n, v in named(after).items() if not is_lora(n)}
    assert same(base, before)
    for name, leaf in named(after).items():
        if name.endswith("lora_b"):
            assert not leaf.any()
        if name.endswith("lora_a"):
            bound = 1 / np.sqrt(leaf.size / 8)
            assert 0.98 * bound < np.abs(leaf).max() <= bound
            assert leaf.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    a1, a2 = (after["params"][f"stage{i}"]["dense"]["lora_a"] for i in (1, 2))
    # In units of their bounds, 1/16 and 1/8; one in a hundred may agree by chance.
    assert (a1.ravel()[:100] * 16 != a2.ravel()[:100] * 8).mean() > 0.98
    assert same(merge(after["params"], alpha=1.0), before["params"])
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    assert same(run_once(lambda: model.init(rngs, x, train=False)), after)


def test_a_dense_layer_is_x_w_plus_x_a_b():
    with jax.enable_x64(True):
        x = inputs((5, 4, 1), np.float64)
        model = made("mlp", "float64", hidden=(16,), lora_rank=3, lora_alpha=6.0)
        variables = values(model, x, train=False)
        layer = variables["params"]["stage1"]["dense"]
        flat = x.reshape(3, -1)
        wanted = flat @ layer["kernel"] + layer["bias"]
        wanted += 2.0 * (flat @ layer["lora_a"]) @ layer["lora_b"]
        found = applied(model, variables, x, last="stage1", train=False)
        np.testing.assert_allclose(found, np.maximum(wanted, 0), rtol=0, atol=1e-12)


class Convolution(nn.Module):
    stages = ("only",)
    groups: int

    def setup(self):
        self.only = nn.Conv(
            6, (3, 3), (2, 2), feature_group_count=self.groups, use_bias=False,
            param_dtype=jnp.float64,
        )  # fmt: skip

    def __call__(self, x):
        return self.only(x)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_followed_by_one_of_a_pixel(groups):
    """In groups too: A and B are shared, each output sees its group's inputs."""
    with jax.enable_x64(True):
        x = inputs((7, 7, 4), np.float64)
        model = with_lora(Convolution(groups), lora_rank=2, lora_targets=(".*",))
        params = values(model, x)["params"]
        a, b = params["only"]["lora_a"], params["only"]["lora_b"]
        assert a.shape == (3, 3, 4 // groups, 2) and b.shape == (2, 6)
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(2, 2), padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        wanted = conv(x, params["only"]["kernel"], feature_group_count=groups)
        parts = zip(np.split(x, groups, -1), np.split(b, groups, -1))
        update = [conv(part, a) @ columns for part, columns in parts]
        wanted += 0.5 * jnp.concatenate(update, axis=-1)
        found = applied(model, {"params": params}, x)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


class Attention(nn.Module):
    stages = ("block",)

    def setup(self):
        self.block = nn.MultiHeadDotProductAttention(
            num_heads=2, param_dtype=jnp.float64, deterministic=True
        )

    def __call__(self, x):
        return self.block(x)


def test_kernels_of_attention_are_matrices_of_width_times_all_heads():
    with jax.enable_x64(True):
        x = inputs((5, 8), np.float64)
        plain = Attention()
        model = with_lora(plain, lora_rank=3, lora_alpha=1.5, lora_targets=(".*",))
        params = values(model, x)["params"]
        by_hand = {}
        for name, layer in params["block"].items():
            kernel, a, b = (layer[n] for n in ("kernel", "lora_a", "lora_b"))
            assert kernel.shape == ((2, 4, 8) if name == "out" else (8, 2, 4))
            update = a.reshape(8, 3) @ b.reshape(3, 8)
            kernel = kernel + 0.5 * update.reshape(kernel.shape)
            by_hand[name] = {"kernel": kernel, "bias": layer["bias"]}
        found = applied(model, {"params": params}, x)
        wanted = applied(plain, {"params": {"block": by_hand}}, x)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        nothing = like(params, {n: 0 * v for n, v in named(params).items()})
        assert np.abs(found - applied(model, {"params": nothing}, x)).max() > 0.1


def test_the_plain_model_with_merged_parameters_computes_the_same():
    x = inputs((12, 12, 1))
    plain, model = (made("cnn", dense=(16,), lora_rank=rank) for rank in (0, 2))
    variables = values(model, x, train=False)
    merged = merge(variables["params"], alpha=1.0)
    wanted = shapes(plain, x, train=False)["params"]
    assert jax.tree.structure(merged) == jax.tree.structure(wanted)
    ours = applied(model, variables, x, train=False)
    theirs = applied(plain, {**variables, "params": merged}, x, train=False)
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)
    base = applied(plain, variables, x, train=False)
    assert np.abs(ours - base).max() > 0.01 * scale


def test_a_suffix_runs_from_its_own_parameters():
    x = inputs((12, 12, 1))
    model = made("cnn", dense=(16,), lora_rank=2)
    variables = values(model, x, train=False)
    between = applied(model, variables, x, last="stage1", train=False)
    suffix = {
        collection: {stage: tree[stage] for stage in tree if stage != "stage1"}
        for collection, tree in variables.items()
    }
    found = applied(model, suffix, between, first="stage2", train=False)
    wanted = applied(model, variables, x, train=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"lora_rank": -1}, ["lora_rank: -1; 0 or more"]),
        ({"lora_rank": 2, "lora_alpha": 0.0}, ["lora_alpha: 0.0; not above 0"]),
        ({"lora_rank": 2, "lora_targets": ()}, ["lora_targets: empty"]),
        (
            {"lora_rank": 2, "lora_targets": ("stage1(",)},
            ["'stage1(' is not a regular expression: missing )"],
        ),
        ({"lora_rnak": 2}, ["lora_rnak: unknown; did you mean 'lora_rank'?"]),
        (
            {"lora_rank": 26, "lora_targets": ("stage1/conv/kernal", "stage[12]/.*")},
            [
                "'stage1/conv/kernal' matches no kernel; did you mean "
                "'stage1/conv/kernel'?",
                "lora_rank: 26, but stage1/conv/kernel is a matrix of 25 x 32",
                "The kernels are: head/logits/kernel, stage1/conv/kernel, "
                "stage2/conv/kernel, stage3/dense/kernel.",
            ],
        ),
        (
            {"lora_rank": 33, "lora_targets": ("stage2/.*",)},
            [
                "lora_rank: 33, but stage2/conv/kernel is a matrix of 800 x 32",
                "Lower the rank",
            ],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_compiled(keys, messages):
    config = small.config(model="cnn", convolutions=(32, 32), dense=(64,), **keys)
    with pytest.raises(UserError) as found:
        make_setup(config)
    for message in messages:
        assert message in str(found.value)


def test_a_rank_as_high_as_the_smaller_side_is_taken():
    model = made("cnn", convolutions=(32, 32), dense=(64,), lora_rank=25)
    with pytest.raises(UserError, match="9 x 32"):
        shapes(made("cnn", kernel_size=3, lora_rank=10), inputs((8, 8, 1)), train=False)
    assert shapes(model, inputs((8, 8, 1)), train=False)


def file_of(tensors):
    return Weights(address="file:w", tensors=dict(tensors), sha256={})


def test_published_weights_without_updates_load_and_leave_them_as_they_start():
    x = inputs((16, 16, 3))
    model = made("resnet18", lora_rank=2, lora_targets=("stage4/.*",))
    variables = values(model, x, train=False)
    base = {n: v for n, v in named(variables).items() if not is_lora(n)}
    rng = np.random.default_rng(2)
    theirs = {}
    for name, their_name in LAYOUTS[0].names(base).items():
        value = rng.normal(size=base[name].shape).astype(np.float32)
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        theirs[their_name] = value.transpose(order) if order else value
    plain = load_weights(like_plain(variables), file_of(theirs))
    loaded = load_weights(variables, file_of(theirs))
    assert same(
        {n: v for n, v in named(loaded).items() if not is_lora(n)}, named(plain)
    )
    updates = {n: v for n, v in named(variables).items() if is_lora(n)}
    assert updates and same(updates, {n: named(loaded)[n] for n in updates})


def like_plain(variables):
    return {**variables, "params": merge(variables["params"], alpha=1.0)}


def test_our_own_weights_bring_their_updates_and_must_have_all_of_them():
    x = inputs((12, 12, 1))
    model = made("cnn", dense=(16,), lora_rank=2)
    variables = values(model, x, train=False)
    tensors = named(values(model, x, seed=1, train=False))
    assert same(load_weights(variables, file_of(tensors)), tensors)
    plain = {n: v for n, v in tensors.items() if not is_lora(n)}
    updates = {n: v for n, v in named(variables).items() if is_lora(n)}
    assert same(named(load_weights(variables, file_of(plain))), plain | updates)
    del tensors["params/stage2/conv/lora_b"]
    with pytest.raises(UserError, match="params/stage2/conv/lora_b: not in the weig"):
        load_weights(variables, file_of(tensors))
    with pytest.raises(
        UserError, match="params/stage1/conv/lora_a: in the weights, but"
    ):
        load_weights(like_plain(variables), file_of(tensors))


@pytest.mark.slow
def test_a_run_moves_updates_and_head_alone_and_can_be_stopped(tmp_path, monkeypatch):
    phase = Phase(name="lora", steps=4, rules=RULES, peak_lr=1e-2, weight_decay=0.1)
    config = small.config(
        model="cnn", convolutions=(4, 8), dense=(16,), lora_rank=2, plan=(phase,),
        overrides=[("checkpoint.every_steps", "1")],
    )  # fmt: skip
    result = run(config, tmp_path / "whole")
    setup = make_setup(config)
    checkpoints = Checkpoints(
        tmp_path / "whole" / "checkpoints", keep=1, read_only=True
    )
    first, last = (named(restore(setup, checkpoints, n).params) for n in (0, 4))
    checkpoints.close()
    for name in first:
        learns = is_lora(name) or name.startswith("head/")
        assert same({name: first[name]}, {name: last[name]}) != learns, name

    with pytest.raises(Preempted):
        run(config, tmp_path / "stopped", small.stop_at_once())
    again = run(config, tmp_path / "stopped")
    keys = ("params_sha256", "state_sha256", "frozen_sha256")
    assert [again[key] for key in keys] == [result[key] for key in keys]
