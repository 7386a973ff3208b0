"""VGGs of torchvision and timm, with and without BatchNorm."""

from typing import Any

from finetune_jax.weights.fields import MEAN_POOLS, Fields
from finetune_jax.weights.layout import Built, Layout, Row, Turn

PLACES = 7
# Input of the first dense layer: we flatten [H, W, C], torch [C, H, W].
FLATTENED = Turn(
    ours=lambda a: (
        a.reshape(len(a), -1, PLACES, PLACES).transpose(2, 3, 1, 0).reshape(-1, len(a))
    ),
    theirs=lambda a: (
        a.reshape(PLACES, PLACES, -1, a.shape[-1])
        .transpose(3, 2, 0, 1)
        .reshape(a.shape[-1], -1)
    ),
)
# timm has convolutions instead of the dense layers.
CONVOLVED = Turn(
    ours=lambda a: a.transpose(2, 3, 1, 0).reshape(-1, len(a)),
    theirs=lambda a: a.reshape(PLACES, PLACES, -1, a.shape[-1]).transpose(3, 2, 0, 1),
)
ONE_PIXEL = Turn(ours=lambda a: a[:, :, 0, 0].T, theirs=lambda a: a.T[:, :, None, None])

# Their numbers count ReLUs and max-pooling: two or three a block, and one a stage.
PLAIN: list[Row] = [("stage{s}/block{b}/conv", "features.{2n+s-1}")]
NORMALISED: list[Row] = [
    ("stage{s}/block{b}/conv", "features.{3n+s-1}"),
    ("stage{s}/block{b}/bn", "features.{3n+s}"),
]
TORCHVISION: list[Row] = [
    ("classifier/dense1", "classifier.0", FLATTENED),
    ("classifier/dense2", "classifier.3"),
    ("head/logits", "classifier.6"),
]
TIMM: list[Row] = [
    ("classifier/dense1", "pre_logits.fc1", CONVOLVED),
    ("classifier/dense2", "pre_logits.fc2", ONE_PIXEL),
    ("head/logits", "head.fc"),
]

LAYOUTS = (
    Layout(name="torchvision VGG", rows=PLAIN + TORCHVISION),
    Layout(name="torchvision VGG with BatchNorm", rows=NORMALISED + TORCHVISION),
    Layout(name="timm VGG", rows=PLAIN + TIMM),
    Layout(name="timm VGG with BatchNorm", rows=NORMALISED + TIMM),
)

# Supported values of timm's arguments.
_TIMM_ARGUMENTS = {
    "output_stride": (32,), "global_pool": MEAN_POOLS,
    "mlp_ratio": (1,), "act_layer": ("relu",), "norm_layer": ("batchnorm2d", "batchnorm"),
}  # fmt: skip


def read_timm(
    fields: Fields, arguments: Fields, architecture: str, name: str
) -> tuple[str, ...]:
    """Reads `config.json` of timm; see `weights.layouts`."""
    if not fields.is_model(architecture.removeprefix("tv_"), name):
        return tuple(arguments)
    fields.must("global_pool", *MEAN_POOLS)
    return arguments.musts(_TIMM_ARGUMENTS)


def timm_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in timm and its arguments; see `weights.layouts`."""
    return built.name, {}


torchvision_model = timm_model
