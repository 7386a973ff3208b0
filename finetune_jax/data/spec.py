"""What the rest of the program knows of the data without reading it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import problems_error
from finetune_jax.data.images.decoding import Geometry
from finetune_jax.data.images.pixels import Pixels
from finetune_jax.data.labels import class_name
from finetune_jax.data.tables.schema import TableSpec, table_from_json
from finetune_jax.data.text.tokens import TextOptions, TextSpec

# Largest mean and deviation of values in [0, 1] that is plausible; chosen by us.
_LARGEST = 2
# Largest magnitude of standardised values that is plausible; chosen by us.
_LARGEST_STANDARDISED = 30
# Keys of `config.data` that say what becomes of an example.
PREPROCESSING = ("mean", "std", "augment", "mix", "resize", "interpolation", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape, classes and preprocessing of the examples.

    Attributes:
        shape: Of one example's inputs as the model takes them: (H, W, C) or (F,),
            or (2, T) of a text: ids and sentences.
        train_shape: Of a training example before augmentation.
        dtype: 'uint8' for bytes, which the task scales to [0, 1], 'int32' for texts and
            tables, else 'float32'.
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
        text: What is known of texts; None of what is none.
        labelled: Whether updates get labels.
        share: Examples in one update, of a domain among several.
        domains: What the examples of each domain look like, by its name; empty where
            there is one data set. All else then is the first's, but `train_counts`, one
            number.
        table: What is known of a table's columns; None of what is none.
        pixels: How the values of image arrays were read, if they were not bytes.
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
    text: TextSpec | None = None
    labelled: bool = True
    share: int = 0
    domains: "Mapping[str, DataSpec]" = dataclasses.field(default_factory=dict)
    table: TableSpec | None = None
    pixels: Pixels | None = None

    @property
    def train_examples(self) -> int:
        """Examples in the training split."""
        return sum(self.train_counts)

    def lines(self) -> list[str]:
        """Returns what a person wants to know of a table's columns, a line each."""
        return [] if self.table is None else self.table.lines()

    def why_always_others(self, views: int | None) -> str | None:
        """Returns why no update gets the inputs of another one; None if updates may.

        Args:
            views: Augmented versions of each example; None augments in every update.
        """
        if self.mix:
            return "config.data.mix makes others in every update"
        if self.augment and views is None:
            return (
                "config.data.augment makes others in every update; "
                "config.data.cache_views=K keeps K versions of each"
            )
        return None

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
        if self.pixels is None:
            del plain["pixels"]
        return {key: plain[key] for key in plain if key not in PREPROCESSING}


def preprocessing_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a spec that `config.data` has, the plain ones where it is None.

    Args:
        data: The section.
    """
    plain = {field.name: field.default for field in dataclasses.fields(DataSpec)}
    return {
        key: plain[key] if data[key] is None else data[key] for key in PREPROCESSING
    }


def spec_from_json(plain: Mapping[str, Any], data: Mapping[str, Any]) -> DataSpec:
    """Returns the spec that `to_json` wrote.

    Args:
        plain: From the manifest.
        data: The section `config.data`.

    Raises:
        ValueError, TypeError: It is not such a thing.
    """
    known: dict[str, Any] = {key: _as_tuple(value) for key, value in plain.items()}
    # Theirs is known as a whole: the config has what they have in common.
    known["domains"] = {
        name: spec_from_json(domain, domain)
        for name, domain in known.pop("domains", {}).items()
    }
    data = {key: _as_tuple(data[key]) for key in PREPROCESSING}
    known = {key: value for key, value in known.items() if key not in data}
    text: Any = known.pop("text", None)
    if text is not None:
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in text["options"].items()
        }
        known["text"] = TextSpec(**{**text, "options": TextOptions(**options)})
    if known.get("table") is not None:
        known["table"] = table_from_json(known["table"])
    if known.get("pixels") is not None:
        known["pixels"] = Pixels(**plain["pixels"])
    spec = DataSpec(**known, **preprocessing_of(data))
    shapes = (*spec.shape, *spec.train_shape)
    if not (
        all(type(size) is int and size > 0 for size in shapes)
        and len(spec.shape) == len(spec.train_shape)
        and len(spec.shape) in (1, 2, 3)
        and spec.dtype in ("uint8", "float32", "int32")
        and all(
            isinstance(names, tuple) and all(isinstance(name, str) for name in names)
            for names in (spec.class_names, spec.targets, spec.pixel_classes)
        )
        and all(type(count) is int for count in spec.train_counts)
    ):
        raise ValueError("not what data look like")
    return spec


def check_reads_alike(spec: DataSpec, plain: Mapping[str, Any], where: str) -> None:
    """Checks that data are read as a run has read them.

    Args:
        spec: What the data look like today.
        plain: What they looked like, as `to_json` wrote it.
        where: Start of the message.

    Raises:
        UserError: Classes, their order, or the values of images are read otherwise.
    """
    problems = _read_otherwise(spec, plain)
    for name, own in spec.domains.items():
        then = plain.get("domains", {}).get(name, {})
        problems += [f"domain {name!r}: {text}" for text in _read_otherwise(own, then)]
    if problems:
        raise problems_error(
            f"{where}: the data are not read as the run has read them:",
            problems,
            "Bring the data back, or train again.",
        )


def _read_otherwise(spec: DataSpec, plain: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("class_names", "targets", "pixel_classes"):
        then, now = plain.get(key), getattr(spec, key)
        # Former versions did not strip names, nor write 1.0 as 1.
        if then is not None and [*map(class_name, then)] != [*map(class_name, now)]:
            problems.append(
                f"{key}: {', '.join(now)[:200]}; {', '.join(then)[:200]} then"
            )
    dtype = plain.get("dtype", spec.dtype)
    scale = (plain.get("pixels") or {}).get("scale")
    now = spec.pixels and spec.pixels.scale
    # Former versions did not write the scale, and took floats as they are.
    is_other = scale != now if scale else now == "255" and "dtype" in plain
    if dtype != spec.dtype or is_other:
        told = f" ({now})" if now else ""
        problems.append(f"images: {spec.dtype}{told}; {dtype} then")
    return problems


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def check_preprocessing(spec: DataSpec) -> None:
    """Checks that the preprocessing fits the inputs.

    Raises:
        UserError: Lists all that does not.
    """
    problems = [
        f"config.data.{name}: {len(value)} numbers, but inputs have {spec.shape[-1]} "
        "channels; give one number or one for each"
        for name, value in (("mean", spec.mean), ("std", spec.std))
        if len(value) not in (1, spec.shape[-1])
    ]
    if spec.dtype == "uint8" or (spec.pixels and spec.pixels.scale in ("unit", "255")):
        problems += [
            f"config.data.{name}: {tuple(value)}, but images are scaled to [0, 1] first; "
            "divide it by 255"
            for name, value in (("mean", spec.mean), ("std", spec.std))
            if max(value) > _LARGEST
        ]
    if problem := not problems and _magnitude_problem(spec):
        problems.append(problem)
    if len(spec.shape) != 3:
        problems += [
            f"config.data.{name}: the data has no images"
            for name in ("augment", "resize")
            if getattr(spec, name)
        ]
    elif spec.dtype != "uint8" and (named := _need_bytes(spec.augment)):
        problems.append(
            f"config.data.augment: {', '.join(named)} needs bytes, whose range is known; "
            f"the data is {spec.dtype}"
        )
    elif spec.resize is not None and spec.resize < max(spec.shape[:2]):
        problems.append(
            f"config.data.resize: {spec.resize}, but {spec.shape[0]}x{spec.shape[1]} is "
            "cut out of what is resized; make it at least as large, or None"
        )
    if problems:
        raise problems_error("The preprocessing does not fit the data:", problems)


def _magnitude_problem(spec: DataSpec) -> str | None:
    """Returns a problem if images with negative values are far from standardised."""
    if spec.pixels is None or spec.pixels.scale != "as they are":
        return None
    low, high = spec.pixels.low, spec.pixels.high
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    left = np.abs([(low - mean) / std, (high - mean) / std]).max()
    if max(-low, high) <= _LARGEST_STANDARDISED or left <= _LARGEST_STANDARDISED:
        return None
    return (
        f"config.data.mean and std: images from {low:.6g} to {high:.6g} are neither "
        f"standardised nor become so (up to {left:.6g} after both); give their mean and "
        "standard deviation, or save the images as bytes, or as floats from 0 to 1"
    )


def _need_bytes(augment: tuple) -> list[str]:
    """Returns the steps of augmentation that need to know the range of the values."""
    names = [step[0] for step in augment if isinstance(step, tuple) and step]
    return [name for name in names if name in ("color_jitter", "rand_augment")]
