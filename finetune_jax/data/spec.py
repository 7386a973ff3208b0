"""What the rest of the program knows of the data without reading it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.data.images import Geometry

# Keys of `config.data` that say what becomes of an example.
PREPROCESSING = ("mean", "std", "augment", "mix", "resize", "interpolation", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape, classes and preprocessing of the examples.

    Attributes:
        shape: Of one example's inputs as the model takes them: (H, W, C) or (F,).
        train_shape: Of a training example before augmentation.
        dtype: 'uint8' for bytes, which the task scales to [0, 1], else 'float32'.
        class_names: In the order of the labels.
        targets: Names of the numbers that are to be predicted, where there are no classes.
        pixel_classes: Names of the classes of a mask's pixels, where images have masks.
        train_counts: Training examples of each class, one number where there are no
            classes; empty where that is not known.
        mean: Subtracted from the inputs; one number or one a channel.
        std: The inputs are divided by it.
        augment: Steps of augmentation in training.
        mix: Ways of mixing examples in training.
        resize: Of an image's shorter side, before its centre is cut out; None stretches.
        interpolation: 'bilinear' or 'bicubic'.
        decode: 'fast' or 'exact', of training images; all others are decoded exactly.
    """

    shape: tuple[int, ...]
    train_shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    pixel_classes: tuple[str, ...] = ()
    train_counts: tuple[int, ...] = ()
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    augment: tuple = ()
    mix: tuple = ()
    resize: int | None = None
    interpolation: str = "bilinear"
    decode: str = "exact"

    @property
    def train_examples(self) -> int:
        """Examples in the training split."""
        return sum(self.train_counts)

    def geometry(self, training: bool) -> Geometry | None:
        """Returns how images become what batches hold; None for feature vectors.

        Training images are larger by the same factor before and after the cut.
        """
        if len(self.shape) != 3:
            return None
        shape = self.train_shape if training else self.shape
        resize = self.resize and round(self.resize * shape[0] / self.shape[0])
        return Geometry(
            shape=shape,
            resize=resize,
            interpolation=self.interpolation,
            decode=self.decode if training else "exact",
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what the config does not say, for a manifest."""
        plain = dataclasses.asdict(self)
        return {key: plain[key] for key in plain if key not in PREPROCESSING}


def spec_from_json(plain: Mapping[str, Any], data: Mapping[str, Any]) -> DataSpec:
    """Returns the spec that `to_json` wrote.

    Args:
        plain: From the manifest.
        data: The section `config.data`.

    Raises:
        ValueError, TypeError: It is not such a thing.
    """
    known = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in plain.items()
    }
    spec = DataSpec(**known, **{key: data[key] for key in PREPROCESSING})
    shapes = (*spec.shape, *spec.train_shape)
    if not (
        all(type(size) is int and size > 0 for size in shapes)
        and len(spec.shape) == len(spec.train_shape)
        and len(spec.shape) in (1, 3)
        and spec.dtype in ("uint8", "float32")
        and all(
            isinstance(names, tuple) and all(isinstance(name, str) for name in names)
            for names in (spec.class_names, spec.targets, spec.pixel_classes)
        )
        and all(type(count) is int for count in spec.train_counts)
    ):
        raise ValueError("not what data look like")
    return spec
