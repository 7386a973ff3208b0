"""Images that are too small for a model that halves them stage by stage."""

from collections.abc import Callable
from typing import Any

import jax

from finetune_jax.core.errors import UserError

# The largest side that `least_side` tries.
MOST = 1024


class TooSmall(UserError):
    """Images of which a stage leaves no pixels.

    Attributes:
        stage: Name of the stage.
    """

    def __init__(self, stage: str):
        """Takes the name of the stage."""
        super().__init__(
            f"config.data.image_size: images are too small for a model: its stage "
            f"{stage!r} leaves no pixels; make them larger, or choose another model"
        )
        self.stage = stage


def check_pixels(x: Any, stage: str) -> None:
    """Checks that maps [B, H, W, C] have pixels.

    Args:
        x: Output of a stage; what has not four axes is not looked at.
        stage: Name of the stage.

    Raises:
        TooSmall: Height or width is 0.
    """
    shape = getattr(x, "shape", ())
    if len(shape) == 4 and 0 in shape[1:3]:
        raise TooSmall(stage)


def least_side(
    init: Callable[[jax.Array], Any], channels: int, side: int
) -> int | None:
    """Returns the least side of square images for which a model has pixels everywhere.

    Args:
        init: Makes the variables of a model for images [1, H, W, C].
        channels: Channels of the images.
        side: Where the search begins.

    Returns:
        The side in pixels, `side` if that is enough; None if it is larger than `MOST`.
    """

    def is_enough(tried: int) -> bool:
        image = jax.ShapeDtypeStruct((1, tried, tried, channels), "float32")
        try:
            jax.eval_shape(init, image)
        except TooSmall:
            return False
        return True

    low = high = side
    while not is_enough(high):
        low, high = high, 2 ** high.bit_length()
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
