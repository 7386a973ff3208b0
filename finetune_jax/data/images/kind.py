"""Images as a kind of data, with or without masks of their pixels."""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data import sources
from finetune_jax.data.array_inputs import (
    SUFFIXES,
    ArrayReader,
    ImageInputs,
    check_dtype,
    check_numbers,
    is_array,
)
from finetune_jax.data.dataset import Data, Dataset, unlabelled
from finetune_jax.data.images.decoding import Geometry, read_image
from finetune_jax.data.images.depth import bytes_problem, depth_warnings
from finetune_jax.data.images.image_formats import why_no_image
from finetune_jax.data.images.mask_files import MaskWriter
from finetune_jax.data.images.pixels import Pixels, to_predict
from finetune_jax.data.kind import (
    Example,
    FileRule,
    Kind,
    Opened,
    Resources,
    suffix_rule,
)
from finetune_jax.data.loading import open_arrays, train_shape
from finetune_jax.data.preprocessing import (
    ArraySpec,
    array_spec,
    arrays_to_json,
    check_preprocessing,
    domain_spec,
)
from finetune_jax.data.reading.threads import attempts
from finetune_jax.data.source import Source
from finetune_jax.data.spec import DataSpec

# Fields of `ArraySpec` that a program needs that prepares images for the model.
_SERVED = ("resize", "interpolation", "mean", "std")


class Images(Kind):
    """Images [H, W, C], bytes or floats."""

    keys = ("image_size", "channels", "train_size", "resize", "augment", "mix", "shift")
    absent = "the data has no images"

    def open(self, section: Mapping[str, Any], resources: Resources) -> Opened:
        """Returns the images, or the vectors, that `config.data` describes."""
        return open_arrays(section)

    def check(self, spec: DataSpec) -> None:
        """Checks that the preprocessing fits the inputs."""
        check_preprocessing(spec)

    def inputs_from_json(self, plain: Mapping[str, Any], section: Mapping) -> ArraySpec:
        """Returns the preprocessing of images."""
        pixels = plain.get("pixels")
        return array_spec(section, pixels and Pixels(**pixels))

    def inputs_to_json(self, spec: DataSpec) -> dict[str, Any]:
        """Returns the preprocessing, and how pixels were read."""
        return arrays_to_json(spec)

    def without_data(
        self, section: Mapping[str, Any], classes: int | None
    ) -> DataSpec | None:
        """Returns the spec of images of the size, channels and classes of the config."""
        size, channels = section["image_size"], section["channels"]
        needed = {
            "data.image_size": size,
            "data.channels": channels,
            "model.classes": classes,
        }
        problems = [f"config.{key}" for key, value in needed.items() if value is None]
        if problems or classes is None:
            raise UserError(*problems, header="Without the data a plan needs:")
        module = section["name"].partition(":")[0]
        source = registry.module(sources, module, "config.data.name")
        has_masks, names = hasattr(source, "MASKS"), tuple(map(str, range(classes)))
        shape = (size, size, channels)
        spec = DataSpec(
            kind="images",
            shape=shape,
            train_shape=train_shape(shape, section["train_size"]),
            dtype="uint8",
            inputs=array_spec(section),
            augment=section["augment"],
            mix=section["mix"],
            class_names=() if has_masks else names,
            pixel_classes=names if has_masks else (),
        )
        check_preprocessing(spec)
        return spec

    def domain_spec(
        self, spec: DataSpec, source: Source, given: Mapping[str, Any], where: str
    ) -> DataSpec:
        """Returns the spec of other images, which are resized to the run's shape."""
        return domain_spec(spec, source, given, where)

    def geometry(self, spec: DataSpec, *, training: bool) -> Geometry:
        """Returns how images are resized and cut.

        Training images are larger by the same factor before and after the cut.
        """
        given: ArraySpec = spec.inputs
        shape = spec.train_shape if training else spec.shape
        return Geometry(
            shape=shape,
            resize=given.resize and round(given.resize * shape[0] / spec.shape[0]),
            interpolation=given.interpolation,
            decode=given.decode if training else "exact",
        )

    def reader(
        self, spec: DataSpec, section: Mapping[str, Any], workdir: pathlib.Path
    ) -> ArrayReader:
        """Returns the reader of image files, or of arrays only if images are floats."""
        inputs = f"its inputs are {spec.dtype} {spec.shape}."

        def check(array: np.ndarray, name: str, alone: bool) -> np.ndarray:
            check_numbers(array, spec, name, array.ndim in (3, 4))
            array, lines = to_predict(
                array, spec.inputs.pixels, spec.dtype, name, alone=alone
            )
            for line in lines:
                warnings.warn(line, stacklevel=2)
            return check_dtype(array, spec, name)

        if spec.dtype != "uint8":
            files = suffix_rule(SUFFIXES, "arrays", inputs)
            return ArrayReader(spec=spec, files=files, check=check)
        images = ImageInputs(
            types=(str, pathlib.Path, Image.Image),
            read=lambda images: _decoded(images, spec),
            check=_check_depth,
        )
        files = FileRule(
            name="images",
            why_not=why_no_image,
            why_not_named=lambda path: None if is_array(path) else why_no_image(path),
            advice=f"It takes images, {' and '.join(SUFFIXES)}; {inputs}",
            warnings=lambda paths: list(
                depth_warnings("--inputs", [p for p in paths if not is_array(p)])
            ),
        )
        return ArrayReader(spec=spec, files=files, check=check, images=images)

    def describe(self, spec: DataSpec) -> str:
        """Returns dtype, height, width and channels."""
        return f"{spec.dtype} {'x'.join(map(str, spec.shape))}"

    def serving_inputs(self, spec: DataSpec) -> dict[str, Any]:
        """Returns how images are resized and normalised."""
        fields = dataclasses.asdict(spec.inputs)
        return {"preprocessing": {key: fields[key] for key in _SERVED}}

    def examples(
        self, data: Data, dataset: Dataset, positions: np.ndarray
    ) -> list[Example] | None:
        """Returns images in bytes, floats scaled by their range.

        None if they have neither one nor three channels.
        """
        if data.spec.shape[-1] not in (1, 3):
            return None
        images = dataset.take(positions)["inputs"]
        if images.dtype != np.uint8:
            low, high = images.min(), images.max()
            scaled = (images - low) * (255 / max(high - low, 1e-9))
            images = scaled.astype(np.uint8)
        return [Example(image=image) for image in images]

    def record_writer(
        self, spec: DataSpec, folder: pathlib.Path
    ) -> Callable[[dict[str, Any], str], dict[str, Any]]:
        """Returns a function that writes the mask of a record to a file in the folder."""
        geometry = self.geometry(spec, training=False)
        writer = MaskWriter(folder, geometry, len(spec.pixel_classes))

        def written(record: dict[str, Any], name: str) -> dict[str, Any]:
            if "mask" not in record:
                return record
            return {**record, "mask": writer.write(record["mask"], name)}

        return written


def _decoded(
    images: Sequence[Any], spec: DataSpec
) -> tuple[Dataset | None, list[UserError | None]]:
    """Returns the images that can be read, None if none can, and the error of each.

    Args:
        images: Paths or images of Pillow.
        spec: Description of the run's data.
    """
    geometry = KIND.geometry(spec, training=False)
    found = attempts(lambda image: read_image(image, geometry), images)
    errors = [error for _, error in found]
    good = [values for values, error in found if error is None]
    if not good:
        return None, errors
    # They are resized already.
    inputs = dataclasses.replace(spec.inputs, resize=None)
    return unlabelled(np.stack(good), dataclasses.replace(spec, inputs=inputs)), errors


def _check_depth(places: Sequence[int], images: Sequence[Any]) -> None:
    """Warns about images of 16 bits that would become almost black.

    Raises:
        UserError: Lists Pillow's images of more than 8 bits that hold bytes.
    """
    problems = [
        f"input {place}: {problem}"
        for place, image in zip(places, images)
        if isinstance(image, Image.Image) and (problem := bytes_problem(image))
    ]
    raise_if(problems, "Some images would become black:")
    for line in depth_warnings("inputs", images):
        warnings.warn(line, stacklevel=2)


KIND = Images()
