"""What the rest of the program knows of the data without reading it."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape, classes and preprocessing of the examples.

    Attributes:
        shape: Of one example's inputs as batches hold it: (H, W, C) or (F,).
        dtype: 'uint8' for bytes, which the task scales to [0, 1], else 'float32'.
        class_names: In the order of the labels.
        train_examples: In the training split; None where that is not known.
        mean: Subtracted from the inputs; one number or one a channel.
        std: The inputs are divided by it.
        augment: Steps of augmentation in training.
    """

    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...]
    train_examples: int | None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    augment: tuple = ()
