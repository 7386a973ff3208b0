"""Fully convolutional models, made of image classifiers: logits for every pixel.

Source: Long et al. 2015, "Fully convolutional networks for semantic segmentation".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.models.layers.heads import ACTIVATIONS, INITIALISERS, make_head
from finetune_jax.models.layers.stages import Staged, conv

# From the first of these stages on, the features of a classifier have no places.
_ENDS = ("pool", "head")
# Keys of the features that pass between stages of a model with taps.
_LAST = "last"


class ConvHead(nn.Module):
    """Scores of every place, enlarged to the size of the image.

    Scores of tapped stages are added on the way, from the smallest maps to the largest.
    Their kernels start at zero (section 4.2 of the source). Enlarging is bilinear and has
    no parameters.

    Attributes:
        classes: Number of logits of a pixel.
        size: Height and width of the images.
        taps: Stages whose maps are scored too, in the order of the stages.
        hidden: Widths of the 3x3 convolutions before the scores; often none.
        activation: Activation after each hidden layer.
        dropout: Rate of dropout before the scores.
        initialiser: Initialiser of the kernels.
    """

    classes: int
    size: tuple[int, int]
    taps: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()
    activation: str = "relu"
    dropout: float = 0.0
    initialiser: str = "lecun_normal"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> jax.Array:
        """Returns logits [B, H, W, K]."""
        last, tapped = _parted(x)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel_init = INITIALISERS[self.initialiser]()
        x_BxHxWxC = as_maps(last, self.size)
        for index, width in enumerate(self.hidden):
            options = {"kernel_init": kernel_init, "padding": "SAME", **kinds}
            layer = conv(width, 3, name=f"hidden{index + 1}", **options)
            x_BxHxWxC = layer(x_BxHxWxC)
            x_BxHxWxC = ACTIVATIONS[self.activation](x_BxHxWxC)
        if self.dropout:
            x_BxHxWxC = nn.Dropout(self.dropout)(x_BxHxWxC, deterministic=not train)
        # The last layer is cheap, and a loss of rounded logits is inaccurate.
        kinds["dtype"] = self.param_dtype
        logits_BxHxWxK = self._scores("logits", kernel_init)(x_BxHxWxC)
        for name in reversed(self.taps):
            maps_BxHxWxC = as_maps(tapped[name], self.size)
            scores = self._scores(f"logits_{name}", nn.initializers.zeros)
            logits_BxHxWxK = enlarged(logits_BxHxWxK, maps_BxHxWxC.shape[1:3])
            logits_BxHxWxK += scores(maps_BxHxWxC)
        return enlarged(logits_BxHxWxK, self.size)

    def _scores(self, name: str, kernel_init: Any) -> nn.Conv:
        kinds = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        options = {"kernel_init": kernel_init, "padding": "SAME", **kinds}
        return conv(self.classes, 1, name=name, **options)


@dataclasses.dataclass(frozen=True)
class FullyConvolutional:
    """The stages of a model up to its last maps, and a head; applied like the model.

    Attributes:
        backbone: The model.
        headed: A model of the new head alone.
        taps: Stages whose maps pass on to the head.
    """

    backbone: nn.Module
    headed: Staged
    taps: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """The model's stages with maps, and the head."""
        return (*stages_with_maps(self.backbone), "head")

    @property
    def param_dtype(self) -> Any:
        """Dtype of the model's parameters."""
        return self.backbone.param_dtype  # type: ignore[attr-defined]

    def init(self, rngs: Any, x: jax.Array, *, train: bool) -> dict[str, Any]:
        """Returns initial variables; the model's stages have those of the model itself."""
        maps, variables = nn.init_with_output(self._through, self.backbone)(
            rngs, x, self.stages[:-1], train
        )
        head = self.headed.init(rngs, maps, train=train)
        return {**variables, "params": {**variables["params"], **head["params"]}}

    def apply(
        self,
        variables: Mapping[str, Any],
        x: Any,
        *,
        first: str | None = None,
        last: str | None = None,
        train: bool,
        rngs: Any = None,
        mutable: Any = (),
    ) -> tuple[Any, Mapping[str, Any]]:
        """Returns the output of stage `last` for the input of `first`, like `apply`."""
        start = 0 if first is None else self.stages.index(first)
        stop = len(self.stages) if last is None else self.stages.index(last) + 1
        names, moved = self.stages[start:stop], {}
        inner = tuple(name for name in names if name != "head")
        if inner:
            run = nn.apply(self._through, self.backbone, mutable=list(mutable))
            x, moved = run(variables, x, inner, train, rngs=rngs)
        if len(names) > len(inner):
            head = {"params": {"head": variables["params"]["head"]}}
            x = self.headed.apply(head, x, train=train, rngs=rngs)
        return x, moved

    def _through(
        self, backbone: Any, x: Any, names: tuple[str, ...], train: bool
    ) -> Any:
        """Returns the output of some stages of the model, with the tapped maps."""
        last, tapped = _parted(x)
        for name in names:
            last = backbone(last, first=name, last=name, train=train)
            if name in self.taps:
                tapped = {**tapped, name: last}
        return {_LAST: last, **tapped} if tapped else last


def fully_convolutional(
    backbone: nn.Module,
    *,
    classes: int,
    size: tuple[int, int],
    head: Mapping[str, Any],
    taps: tuple[str, ...] = (),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> FullyConvolutional:
    """Returns a model whose head returns logits of every pixel.

    Args:
        backbone: A model whose stages return maps [B, H, W, C], or tokens [B, T, D] of a
            grid of patches.
        classes: Number of logits of a pixel.
        size: Height and width of the images.
        head: Arguments as `make_head` takes them; hidden layers are 3x3 convolutions.
        taps: Stages whose maps are scored too: ('stage2',) makes an FCN-16s of a ResNet
            with three stages.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.

    Raises:
        UserError: A stage is unknown, or the head does not take the arguments.
    """
    kinds = {"dtype": dtype, "param_dtype": param_dtype}
    checked = make_head(head, classes=classes, **kinds)
    stages = stages_with_maps(backbone)
    for name in taps:
        registry.choose(dict.fromkeys(stages[:-1]), name, "config.model.taps")
    ordered = tuple(name for name in stages if name in taps)
    module = ConvHead(
        classes=classes,
        size=size,
        taps=ordered,
        hidden=tuple(checked.hidden),
        activation=checked.activation,
        dropout=checked.dropout,
        initialiser=checked.initialiser,
        name="head",
        **kinds,
    )
    return FullyConvolutional(backbone, Staged((module,)), ordered)


def stages_with_maps(backbone: nn.Module) -> tuple[str, ...]:
    """Returns the stages of a classifier before its pooling."""
    stages: tuple[str, ...] = backbone.stages  # type: ignore[attr-defined]
    ends = [stages.index(name) for name in _ENDS if name in stages]
    return stages[: min(ends, default=len(stages))]


def _parted(x: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the last maps, and the tapped maps by the name of their stage."""
    if not isinstance(x, Mapping) or _LAST not in x:
        return x, {}
    return x[_LAST], {name: maps for name, maps in x.items() if name != _LAST}


def as_maps(x: Any, size: tuple[int, int]) -> jax.Array:
    """Returns features as maps [B, H, W, C].

    Args:
        x: Maps, or tokens [B, T, D] of square patches, row by row. A class token before
            them is left out.
        size: Height and width of the images.

    Raises:
        UserError: The features have no places.
    """
    shape = getattr(x, "shape", None)
    if shape is not None and len(shape) == 4:
        return x
    if shape is not None and len(shape) == 3:
        for extra in (0, 1):
            patch = math.isqrt(size[0] * size[1] // max(shape[1] - extra, 1)) or 1
            rows, columns = size[0] // patch, size[1] // patch
            if rows * columns == shape[1] - extra:
                return x[:, extra:].reshape(shape[0], rows, columns, shape[2])
    found = shape or f"a {type(x).__name__}"
    raise UserError(
        f"config.model.name: the model's last stage returns {found}. Segmentation needs "
        "maps [B, H, W, C], or a token for each patch of the image "
        f"({size[0]}x{size[1]} pixels): take a convolutional model, or a ViT."
    )


def enlarged(x_BxHxWxC: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Returns maps resized to a height and width, as torch without aligned corners."""
    batch, *before, channels = x_BxHxWxC.shape
    if tuple(before) == tuple(size):
        return x_BxHxWxC
    return jax.image.resize(x_BxHxWxC, (batch, *size, channels), "bilinear")
