"""Our networks give the logits of torch's, from their weights as those name them."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from finetune_jax.models import make_model
from finetune_jax.pretrained.addresses import Weights
from finetune_jax.pretrained.load import load_weights

pytestmark = pytest.mark.slow
RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "resnext50_32x4d",
)  # fmt: skip
DEPTHS = {
    "resnet18": [2, 2, 2, 2],
    "resnet34": [3, 4, 6, 3],
    "resnet50": [3, 4, 6, 3],
    "resnet101": [3, 4, 23, 3],
    "resnet152": [3, 8, 36, 3],
}
CASES = [
    *(("torchvision", name) for name in RESNETS),
    *(("timm", name) for name in RESNETS),
    *(("transformers", name) for name in DEPTHS),
    ("timm", "efficientnet_lite0"),
]
CLASSES = 10


def oracle(library, name):
    """Returns a module with random weights, and statistics that matter."""
    if library == "torchvision":
        made = getattr(oracles.import_torchvision().models, name)(num_classes=CLASSES)
    elif library == "timm":
        theirs = f"tf_{name}" if name.startswith("efficientnet") else name
        made = oracles.import_timm().create_model(theirs, num_classes=CLASSES)
    else:
        transformers = oracles.import_transformers()
        kind = "basic" if name in ("resnet18", "resnet34") else "bottleneck"
        widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
        config = transformers.ResNetConfig(
            depths=DEPTHS[name],
            layer_type=kind,
            hidden_sizes=widths,
            num_labels=CLASSES,
        )
        made = transformers.ResNetForImageClassification(config)
    return randomised(made)


def randomised(module):
    import torch

    rng = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.weight.data.uniform_(0.5, 1.5, generator=rng)
            layer.bias.data.normal_(0, 0.2, generator=rng)
            layer.running_mean.normal_(0, 0.2, generator=rng)
            layer.running_var.uniform_(0.5, 1.5, generator=rng)
    return module.eval()


def our_logits(name, tensors, x, precision):
    model = make_model(
        name, {"head": {}}, classes=CLASSES, dtype=precision, param_dtype=precision
    )
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.asarray(x[:1]), train=False)
    )
    # Flax starts running averages in float32, whatever the parameters are.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, precision), shapes
    )
    weights = Weights(address="oracle", tensors=tensors, sha256={})
    variables = load_weights(shapes, weights)
    return np.asarray(
        jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    )


@pytest.mark.parametrize("library, name", CASES, ids=["-".join(case) for case in CASES])
def test_logits_are_the_oracles(library, name):
    module = oracle(library, name)
    import torch

    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x).permute(0, 3, 1, 2))
    theirs = getattr(found, "logits", found).numpy()
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    ours = our_logits(name, tensors, x, jnp.float32)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("number", range(5))
def test_efficientnet_lites_are_timms_in_float64(number):
    """Deep ReLU6 networks amplify rounding; 64 bits tell it from a mistake."""
    module = oracle("timm", f"efficientnet_lite{number}").double()
    import torch

    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    with torch.no_grad():
        theirs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    with jax.enable_x64(True):
        ours = our_logits(f"efficientnet_lite{number}", tensors, x, jnp.float64)
    assert np.abs(ours - theirs).max() <= 1e-10 * np.abs(theirs).max()
