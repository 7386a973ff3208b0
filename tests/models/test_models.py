import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax.core.pytrees import count, named
from finetune_jax.models import make_model
from finetune_jax.parallel.compiling import run_once

MODELS = {  # Name, input, parameters, stages.
    "mlp": ((28, 28, 1), 784 * 64 + 64 + 650, 2),
    "cnn": ((28, 28, 1), 3_274_730, 4),
    "resnet8": ((28, 28, 1), 75_002, 6),
    "resnet20": ((28, 28, 1), 269_434, 6),
    "resnet32": ((16, 16, 3), 464_154, 6),
    "resnet56": ((16, 16, 3), 853_018, 6),
    # torchvision's numbers for 1,000 classes, less 990 rows of the last layer.
    "resnet18": ((32, 32, 3), 11_689_512 - 990 * 513, 7),
    "resnet34": ((32, 32, 3), 21_797_672 - 990 * 513, 7),
    "resnet50": ((32, 32, 3), 25_557_032 - 990 * 2049, 7),
    "resnet101": ((32, 32, 3), 44_549_160 - 990 * 2049, 7),
    "resnet152": ((32, 32, 3), 60_192_808 - 990 * 2049, 7),
    "wide_resnet50_2": ((32, 32, 3), 68_883_240 - 990 * 2049, 7),
    "resnext50_32x4d": ((32, 32, 3), 25_028_904 - 990 * 2049, 7),
    "efficientnet_lite0": ((32, 32, 3), 4_652_008 - 990 * 1281, 11),
    "efficientnet_lite1": ((32, 32, 3), 5_416_680 - 990 * 1281, 11),
    "efficientnet_lite2": ((32, 32, 3), 6_092_072 - 990 * 1281, 11),
    "efficientnet_lite3": ((32, 32, 3), 8_197_096 - 990 * 1281, 11),
    "efficientnet_lite4": ((32, 32, 3), 13_006_568 - 990 * 1281, 11),
    "vgg11": ((32, 32, 3), 132_863_336 - 990 * 4097, 8),
    "vgg11_bn": ((32, 32, 3), 132_868_840 - 990 * 4097, 8),
    "vgg13": ((32, 32, 3), 133_047_848 - 990 * 4097, 8),
    "vgg13_bn": ((32, 32, 3), 133_053_736 - 990 * 4097, 8),
    "vgg16": ((32, 32, 3), 138_357_544 - 990 * 4097, 8),
    "vgg16_bn": ((32, 32, 3), 138_365_992 - 990 * 4097, 8),
    "vgg19": ((32, 32, 3), 143_667_240 - 990 * 4097, 8),
    "vgg19_bn": ((32, 32, 3), 143_678_248 - 990 * 4097, 8),
    # timm's numbers for 10 classes and 2 x 2 patches.
    "vit_tiny_patch14": ((28, 28, 3), 5_454_922, 16),
    "vit_tiny_patch16": ((32, 32, 3), 5_489_482, 16),
    "vit_tiny_patch32": ((64, 64, 3), 5_931_850, 16),
    "vit_small_patch14": ((28, 28, 3), 21_526_666, 16),
    "vit_small_patch16": ((32, 32, 3), 21_595_786, 16),
    "vit_small_patch32": ((64, 64, 3), 22_480_522, 16),
    "vit_base_patch14": ((28, 28, 3), 85_520_650, 16),
    "vit_base_patch16": ((32, 32, 3), 85_658_890, 16),
    "vit_base_patch32": ((64, 64, 3), 87_428_362, 16),
    "vit_large_patch14": ((28, 28, 3), 302_930_954, 28),
    "vit_large_patch16": ((32, 32, 3), 303_115_274, 28),
    "vit_large_patch32": ((64, 64, 3), 305_474_570, 28),
    "convnext_tiny": ((32, 32, 3), 28_589_128 - 990 * 769, 8),
    "convnext_small": ((32, 32, 3), 50_223_688 - 990 * 769, 8),
    "convnext_base": ((32, 32, 3), 88_591_464 - 990 * 1025, 8),
}
RUN = ("mlp", "cnn", "resnet20", "resnet18")  # The others: test_parity.
# One of each family runs in CI, the others by `make test-exhaustive`.
TIERS = dict.fromkeys(("mlp", "cnn", "efficientnet_lite0", "vgg11_bn", "resnet8"), ())
TIERS |= dict.fromkeys(
    ("resnet18", "resnext50_32x4d", "vit_tiny_patch16", "convnext_tiny"),
    pytest.mark.slow,
)


def made(name, dtype="float32", **arguments):
    return make_model(
        name,
        {"head": {}, **arguments},
        classes=10,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype("float32"),
    )


def randomised(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (
            (0.5 + rng.random(a.shape)).astype(np.float32)
            if a.ndim == 1
            else np.asarray(a)
        ),
        tree,
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=TIERS.get(n, pytest.mark.exhaustive)) for n in MODELS],
)
def test_a_model_has_its_size_and_runs_from_stage_to_stage(name):
    shape, parameters, stages = MODELS[name]
    model = made(name)
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    def init():
        return model.init(jax.random.key(0), x, train=False)

    shapes = jax.eval_shape(init)
    assert count(shapes["params"]) == parameters
    assert len(model.stages) == stages and model.stages[-1] == "head"
    assert {n.split("/")[0] for n in named(shapes["params"])} <= set(model.stages)
    if name not in RUN:
        return  # More of the same blocks.
    variables = randomised(run_once(init))

    def run(x, first=None, last=None):
        step = jax.jit(
            lambda v, x: model.apply(v, x, first=first, last=last, train=False)
        )
        return np.asarray(step(variables, x))

    whole = run(x)
    assert whole.shape == (2, 10) and np.isfinite(whole).all()
    cut = model.stages[stages // 2]
    before = model.stages[stages // 2 - 1]
    np.testing.assert_allclose(
        run(run(x, last=before), first=cut), whole, rtol=1e-4, atol=1e-5
    )


def conv(x, kernel, stride, padding):
    """A convolution in plain numpy, float64."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height = (x.shape[1] - size) // stride + 1
    width = (x.shape[2] - size) // stride + 1
    y = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(size):
        for j in range(size):
            part = x[:, i:, j:][:, ::stride, ::stride][:, :height, :width]
            y += part @ kernel[i, j]
    return y


def norm(x, params, stats):
    scale = params["scale"] / np.sqrt(stats["var"] + 1e-5)
    return (x - stats["mean"]) * scale + params["bias"]


@pytest.mark.slow
def test_resnet20_is_that_of_the_paper():
    """Against a rewrite in numpy, with statistics and scales at random."""
    model = made("resnet20")
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 1)).astype(np.float32)
    variables = randomised(
        run_once(lambda: model.init(jax.random.key(0), x, train=False))
    )
    params, stats = variables["params"], variables["batch_stats"]
    y = conv(x.astype(np.float64), params["stem"]["conv"]["kernel"], 1, 1)
    y = np.maximum(norm(y, params["stem"]["bn"], stats["stem"]["bn"]), 0)
    for stage, width in (("stage1", 16), ("stage2", 32), ("stage3", 64)):
        for index in range(3):
            p, s = params[stage][f"block{index + 1}"], stats[stage][f"block{index + 1}"]
            stride = 2 if index == 0 and stage != "stage1" else 1
            z = conv(y, p["conv1"]["kernel"], stride, 1)
            z = np.maximum(norm(z, p["bn1"], s["bn1"]), 0)
            z = norm(conv(z, p["conv2"]["kernel"], 1, 1), p["bn2"], s["bn2"])
            y = y[:, ::stride, ::stride]
            extra = width - y.shape[-1]
            y = np.pad(y, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
            y = np.maximum(y + z, 0)
    head = params["head"]["logits"]
    wanted = y.mean(axis=(1, 2)) @ head["kernel"] + head["bias"]
    found = np.asarray(model.apply(variables, x, train=False))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_head_is_a_stack():
    head = {
        "hidden": (7, 5),
        "activation": "tanh",
        "dropout": 0.5,
        "initialiser": "zeros",
    }
    model = made("mlp", head=head)
    x = np.ones((4, 3), np.float32)
    params = model.init(jax.random.key(0), x, train=False)["params"]
    shapes = {name: leaf.shape for name, leaf in named(params["head"]).items()}
    assert shapes["hidden1/kernel"] == (64, 7) and shapes["hidden2/kernel"] == (7, 5)
    assert shapes["logits/kernel"] == (5, 10)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(params["head"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
@pytest.mark.ci_runs("cnn")
def test_bfloat16_computes_in_it_and_keeps_parameters_and_logits_in_float32(name):
    shape = (12, 12, 1)
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    full, half = made(name), made(name, "bfloat16")
    variables, again = (
        run_once(lambda m=m: m.init(jax.random.key(0), x, train=False))
        for m in (full, half)
    )
    variables = randomised(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype("float32")}
    features = half.apply(variables, x, last=half.stages[-2], train=False)
    assert features.dtype == jnp.bfloat16
    ours, theirs = (
        np.asarray(m.apply(variables, x, train=False)) for m in (half, full)
    )
    assert ours.dtype == np.float32
    assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.slow
def test_bfloat16_trains():
    from finetune_jax.plans.phase import Phase

    task = small.task("cnn", overrides=[("precision", "bfloat16")], dense=(16,))
    trainer = small.Trainer(task, Phase(name="all", steps=9, optimizer="adam"))
    losses = [float(trainer.update(small.batch(), 3e-3)["loss"]) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    assert {a.dtype for a in jax.tree.leaves(trainer.state.params)} == {
        np.dtype("float32")
    }
