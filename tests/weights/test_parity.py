"""Our networks compute what their publishers' do, from their weights as these name them.

Logits, what every stage gives, gradients, and what goes back into a file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle_models
import pytest
import small

from finetune_jax.core.pytrees import named
from finetune_jax.models import resnet
from finetune_jax.models.convnext import MODELS
from finetune_jax.models.vgg import MODELS as VGG_MODELS
from finetune_jax.models.vit import SIZES, Shape
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.layout import recognise
from finetune_jax.weights.merge import load_weights

pytestmark = pytest.mark.slow
CLASSES = oracle_models.CLASSES


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in a layout.

    Attributes:
        library: The oracle's.
        name: Of the model.
        size: Of the images.
        arguments: Of our model.
        fields: Further arguments of our model, which the oracle is told as `theirs`.
        sizes: Arguments of the family's function, by position; empty for the named ones.
        theirs: Arguments of the oracle.
    """

    library: str
    name: str
    size: int = 64
    arguments: dict = dataclasses.field(default_factory=dict)
    fields: dict = dataclasses.field(default_factory=dict)
    theirs: dict = dataclasses.field(default_factory=dict)
    sizes: tuple = ()

    def __str__(self):
        said = [*self.arguments.values(), *self.theirs.values()]
        return "-".join([self.library, self.name, *map(str, said)])


def vgg(library, name, dense=32, **widths):
    fields, theirs = {"dense": dense, "dropout": 0.0}, {"dense": dense, **widths}
    stages, normalises = VGG_MODELS[name].args
    for given in widths.values():
        stages = tuple((blocks, wide) for (blocks, _), wide in zip(stages, given))
    return Row(library, name, fields=fields, theirs=theirs, sizes=(stages, normalises))


def vit(library, name, arguments=(), *, depth=None, **theirs):
    _, size, patch = name.split("_")
    width, deep, heads = SIZES[size]
    patch = int(patch.removeprefix("patch"))
    depth = depth or deep
    arguments = dict(arguments)
    if library.startswith("transformers"):
        arguments["epsilon"] = 1e-12
    theirs |= {"depth": depth, "image_size": 2 * patch}
    sizes = (Shape(width, depth, heads, patch),)
    return Row(library, name, 2 * patch, arguments, {}, theirs, sizes)


def convnext(library, name, *shape):
    blocks, widths = shape or MODELS[name].args[0]
    if name != "convnext_tiny":
        blocks = (1, 1, 2, 1)  # The other blocks are the same again.
    arguments = {"epsilon": 1e-12} if library == "transformers" else {}
    theirs = {"widths": widths, "depths": blocks}
    sizes = (type(MODELS[name].args[0])(blocks, widths),)
    return Row(library, name, 64, arguments, {}, theirs, sizes)


RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "resnext50_32x4d",
)  # fmt: skip
VGGS = [f"vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn")]
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base")
MEAN = {"pool": "mean"}
ROWS = [
    *(Row("torchvision", name) for name in RESNETS),
    *(Row("timm", name) for name in RESNETS),
    *(Row("transformers", name) for name in oracle_models.DEPTHS),
    Row("timm", "efficientnet_lite0"),
    *(vgg(library, name) for library in ("torchvision", "timm") for name in VGGS),
    *(vit("timm", f"vit_tiny_patch{p}") for p in (14, 16, 32)),
    *(vit("timm", f"vit_small_patch{p}") for p in (14, 16, 32)),
    vit("timm", "vit_base_patch16"),
    # The other blocks are the same again.
    *(vit("timm", f"vit_base_patch{p}", depth=3) for p in (14, 32)),
    *(vit("timm", f"vit_large_patch{p}", depth=3) for p in (14, 16, 32)),
    vit("timm", "vit_tiny_patch16", {"pool": "mean_norm"}, global_pool="avg"),
    vit("timm", "vit_tiny_patch16", MEAN, global_pool="avg", fc_norm=False),
    vit(
        "timm", "vit_tiny_patch16", {**MEAN, "class_token": False}, class_token=False,
        global_pool="avg", fc_norm=False,
    ),
    *(vit("torchvision", f"vit_base_patch{p}", depth=3) for p in (16, 32)),
    *(vit("torchvision", f"vit_large_patch{p}", depth=3) for p in (16, 32)),
    vit("transformers", "vit_tiny_patch16"),
    *(vit("transformers", f"vit_base_patch{p}", depth=3) for p in (16, 32)),
    *(vit("transformers", f"vit_large_patch{p}", depth=3) for p in (16, 32)),
    vit("transformers, as modules", "vit_tiny_patch16"),
    *(convnext(lib, n) for lib in ("torchvision", "timm", "transformers")
      for n in CONVNEXTS),
]  # fmt: skip


def made(row, precision, **more):
    given = {"classes": CLASSES, "dtype": precision, "param_dtype": precision}
    given |= {"head": {}, **row.arguments, **row.fields, **more}
    return small.of_sizes(row.name, *row.sizes, **given)


def loaded(row, model, tensors, precision):
    """Returns variables from tensors, and checks that they become these again."""
    x = jnp.zeros((1, row.size, row.size, 3), precision)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    # Flax starts running averages in float32, whatever the parameters are.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, precision), shapes
    )
    weights = Weights(address="oracle", tensors=tensors, sha256={})
    variables = load_weights(shapes, weights)
    layout = recognise(named(shapes), tensors, "oracle")
    assert_same(layout.tensors(named(variables), tensors), tensors)
    return variables, layout


def assert_same(found, tensors):
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes(), name


def stage_by_stage(model, variables, x):
    """Returns what every stage gives."""

    @jax.jit
    def run(variables, x):
        found = {}
        for stage in model.stages:
            x = model.apply(variables, x, first=stage, last=stage, train=False)
            found[stage] = x
        return found

    return {stage: np.asarray(x) for stage, x in run(variables, x).items()}


def errors(ours, theirs):
    """Returns the largest difference in each stage, relative to the largest value."""
    assert len(theirs) >= 5 and theirs.keys() <= ours.keys()
    found = {}
    for stage, wanted in theirs.items():
        mine = ours[stage].reshape(wanted.shape) if stage != "head" else ours[stage]
        found[stage] = np.abs(mine - wanted).max() / np.abs(wanted).max()
    return found


def assert_close(ours, theirs, tolerance):
    assert max(errors(ours, theirs).values()) <= tolerance, errors(ours, theirs)


@pytest.mark.parametrize("row", ROWS, ids=map(str, ROWS))
@pytest.mark.ci_runs(
    "torchvision-resnet18",
    "torchvision-resnext50_32x4d",
    "timm-resnet18",
    "transformers-resnet18",
    "timm-efficientnet_lite0",
    "torchvision-vgg11_bn-32",
    "timm-vgg11-32",
    "timm-vit_tiny_patch16-mean_norm-avg-12-32",
    "timm-vit_tiny_patch16-mean-False-False-avg-False-12-32",
    "torchvision-vit_base_patch32-3-64",
    "transformers-vit_tiny_patch16-1e-12-12-32",
    "transformers, as modules-vit_tiny_patch16-1e-12-12-32",
    "torchvision-convnext_small-(96, 192, 384, 768)-(1, 1, 2, 1)",
    "timm-convnext_small-(96, 192, 384, 768)-(1, 1, 2, 1)",
    "transformers-convnext_small-1e-12-(96, 192, 384, 768)-(1, 1, 2, 1)",
)
def test_stages_and_logits_are_the_oracles(row):
    oracle = oracle_models.make(row.library, row.name, **row.theirs)
    model = made(row, jnp.float32)
    variables, _ = loaded(row, model, oracle.tensors(), jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, row.size, row.size, 3))
    x = x.astype(np.float32)
    ours, theirs = stage_by_stage(model, variables, x), oracle.run(x)
    if not row.name.startswith("efficientnet"):
        assert_close(ours, theirs, 1e-5)
        return
    # Within these, torch's single precision is further than that from its double one.
    oracle.module.double()
    exact = oracle.run(x.astype(np.float64))
    own = errors(theirs, exact)
    for stage, error in errors(ours, exact).items():
        assert error <= max(1e-5, 2 * own[stage]), stage
    assert errors(ours, theirs)["head"] <= 1e-5


@pytest.mark.parametrize("number", range(5))
@pytest.mark.ci_runs("0")
def test_efficientnet_lites_are_timms_in_float64(number):
    """Deep ReLU6 networks amplify rounding; 64 bits tell it from a mistake."""
    row = Row("timm", f"efficientnet_lite{number}")
    oracle = oracle_models.make("timm", row.name)
    oracle.module.double()
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    with jax.enable_x64(True):
        model = made(row, jnp.float64)
        variables, _ = loaded(row, model, oracle.tensors(), jnp.float64)
        assert_close(stage_by_stage(model, variables, x), oracle.run(x), 1e-10)


ONCE = (1, 1, 1, 1)
NARROW = (8, 8, 16, 16, 16)
GRADIENTS = [  # Of few blocks: what takes time is compiling.
    Row(
        "torchvision",
        "resnet50",
        sizes=(resnet.Shape(ONCE),),
        theirs={"depths": ONCE},
    ),
    Row(
        "timm",
        "efficientnet_lite0",
        sizes=(1.0, 0.1),
        theirs={"depth": 1},
    ),
    vgg("torchvision", "vgg11_bn", widths=NARROW),
    vgg("timm", "vgg13", widths=NARROW),
    vit("timm", "vit_tiny_patch16", depth=3),
    vit("torchvision", "vit_tiny_patch32", depth=2),
    vit("transformers", "vit_tiny_patch14", depth=2),
    convnext("torchvision", "convnext_tiny", ONCE, (8, 12, 16, 24)),
]


@pytest.mark.parametrize("row", GRADIENTS, ids=map(str, GRADIENTS))
@pytest.mark.ci_runs(
    "torchvision-resnet50-(1, 1, 1, 1)",
    "timm-efficientnet_lite0-1",
    "torchvision-vgg11_bn-32-(8, 8, 16, 16, 16)",
    "timm-vit_tiny_patch16-3-32",
    "torchvision-convnext_tiny-(8, 12, 16, 24)-(1, 1, 1, 1)",
)
def test_gradients_of_a_training_step_are_the_oracles_in_float64(row):
    oracle = oracle_models.make(row.library, row.name, **row.theirs)
    oracle.module.double()
    import torch

    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(4, row.size, row.size, 3)), np.array([1, 0, 3, 9])
    tensors = oracle.tensors()
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    logits = oracle.module.train()(torch.from_numpy(x).permute(0, 3, 1, 2))
    logits = getattr(logits, "logits", logits)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(label)).backward()
    with jax.enable_x64(True):
        model = made(row, jnp.float64)
        variables, layout = loaded(row, model, tensors, jnp.float64)
        stats = variables.get("batch_stats", {})

        def loss(params):
            logits, _ = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            chosen = jax.nn.log_softmax(logits)[np.arange(len(label)), label]
            return -chosen.mean()

        found = jax.jit(jax.grad(loss))(variables["params"])
        found = layout.tensors(named({"params": found}))
    for leaf in oracle.module.parameters():
        leaf.data = leaf.grad
    wanted = {name: grad for name, grad in oracle.tensors().items() if name in found}
    assert len(wanted) == len(found) == len(list(oracle.module.parameters()))
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # Some are nothing but rounding, such as those of keys' biases.
        limit = max(1e-6 * np.abs(gradient).max(), 1e-13 * largest)
        assert np.abs(found[name] - gradient).max() <= limit, name
