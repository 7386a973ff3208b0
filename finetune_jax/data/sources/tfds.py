"""`tfds:NAME`: a data set that TensorFlow Datasets has prepared as ArrayRecord.

It is read by `tfds.data_source`, without TensorFlow. `scripts/prepare_data.py` prepares
one from arrays; image data sets of TFDS are prepared by TFDS itself, with TensorFlow.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import DataMissing, UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.data.images.decoding import Geometry, fit_named, read_image
from finetune_jax.data.images.pixels import (
    BYTES,
    Pixels,
    axes_problem,
    decided,
    extent_of,
    read_as,
)
from finetune_jax.data.labels import classes_of
from finetune_jax.data.source import Source
from finetune_jax.data.text.tokens import Rows

KINDS = ("text", "images")
_JPEG = b"\xff\xd8\xff"


class TfdsExamples:
    """The examples of one split; read when asked for, labels at the start."""

    def __init__(
        self, records: Any, keys: tuple[str, str], feature: Any, is_encoded: bool
    ):
        """Takes the records, names of inputs and label, and the feature of the inputs."""
        self._records, self._inputs_key = records, keys[0]
        self._decode = feature.decode_example_np if is_encoded else np.asarray
        self.label = np.asarray(
            [int(np.asarray(records[i][keys[1]])) for i in range(len(records))],
            np.int32,
        )
        shape = tuple(feature.shape)
        if len(shape) == 2:
            shape = (*shape, 1)
        if len(shape) == 3 and shape[-1] in (2, 4):  # Alpha is laid on white.
            shape = (*shape[:-1], shape[-1] - 1)
        self.shape = None if None in shape else shape
        self.dtype = "uint8" if feature.np_dtype == np.uint8 else "float32"
        self.pixels: Pixels | None = None

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.label)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns the inputs of one example, [H, W, C] or [F], fitted if that is asked.

        A JPEG is decoded here, so that it can be at reduced scale; an orientation
        in it counts for nothing, as with TFDS.
        """
        name, content = self.name(index), self._records[index][self._inputs_key]
        if isinstance(content, bytes) and content.startswith(_JPEG):
            return read_image(content, geometry, name=name, upright=False)
        value = self._stored(content)
        if self.pixels is None:
            value = value.astype(self.dtype, copy=False)
        else:
            value = read_as(value[None], self.pixels)[0]
        return value if geometry is None else fit_named(value, geometry, name)

    def name(self, index: int) -> str:
        """Returns the number of one example."""
        return f"example {index}"

    def _stored(self, content: Any) -> np.ndarray:
        value = np.asarray(self._decode(content))
        return value[..., None] if value.ndim == 2 else value

    def values(self) -> Iterator[np.ndarray]:
        """Yields every example as it is stored, images as [1, H, W, C]."""
        for index in range(len(self)):
            yield self._stored(self._records[index][self._inputs_key])[None]


def _opened(
    directory: str | None, argument: str | None
) -> tuple[Any, dict[str, Any], set[str]]:
    """Returns the info of a data set, its records by split, and its encoded features.

    Raises:
        UserError: Not prepared in the folder.
    """
    if not argument:
        raise UserError("config.data.name: tfds needs a name, as in 'tfds:mnist'")
    # It advises to install TensorFlow, which reading prepared data does not need.
    logging.getLogger("tensorflow_datasets").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    options: dict[str, Any] = {}
    if directory:
        options["data_dir"] = str(user_path(directory, "config.data.dir"))
    try:
        builder: Any = tfds.builder(argument, **options)
        info = builder.info
        # Images come as they are stored, to be decoded here.
        decoders = {
            key: tfds.decode.SkipDecoding()
            for key, feature in info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        records = {
            split: builder.as_data_source(split=split, decoders=decoders)
            for split in info.splits
        }
    except Exception as error:  # TFDS raises errors of many kinds, not all documented.
        raise DataMissing(
            f"config.data.name: tfds:{argument} cannot be read from "
            f"{directory or 'the default folder of TFDS'}: {error}"
        ) from error
    if not records:
        raise DataMissing(
            f"config.data.name: tfds:{argument} is not prepared in "
            f"{directory or 'the default folder of TFDS'}. Prepare it there with "
            "file_format='array_record', or set config.data.dir."
        )
    return info, records, set(decoders)


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits of the data set `argument`, found in `config.data.dir`.

    Raises:
        UserError: Not prepared there, or features that are no classification.
    """
    import tensorflow_datasets as tfds

    info, records, encoded = _opened(directory, argument)
    keys = _keys(tfds, argument or "", info)
    feature, classes = info.features[keys[0]], info.features[keys[1]]
    examples = {
        split: TfdsExamples(part, keys, feature, keys[0] in encoded)
        for split, part in records.items()
    }
    if len(examples) == 1:
        examples = {"all": next(iter(examples.values()))}
    content = json.dumps([info.full_name, str(info.features), _checksums(info)])
    name = f"tfds:{argument}"
    labels, warnings = _class_names(name, classes, examples)
    pixels, line = _pixels(name, feature, examples)
    return Source(
        name=name,
        splits=examples,
        class_names=labels,
        pixels=pixels,
        warnings=(*warnings, *([line] if line else [])),
        fingerprint=lambda: hashlib.sha256(content.encode()).hexdigest(),
    )


def _class_names(
    name: str, feature: Any, examples: Mapping[str, TfdsExamples]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the class names of a label's feature, and warnings.

    Raises:
        UserError: There is a single class, or a name twice.
    """
    labels = np.concatenate([part.label for part in examples.values()])
    given = list(feature.names or map(str, range(feature.num_classes or 0)))
    counts = {text: int((labels == place).sum()) for place, text in enumerate(given)}
    classes = classes_of(counts, name, given=given, unit="examples")
    raise_if(classes.problems, f"config.data.name: {name} cannot be used:")
    return classes.names, classes.warnings


def _pixels(
    name: str, feature: Any, examples: Mapping[str, TfdsExamples]
) -> tuple[Pixels | None, str]:
    """Returns how values of images are read, and a line to tell; all are looked at.

    Raises:
        UserError: Their axes or their range are unclear.
    """
    if len(feature.shape) < 2:
        return None, ""
    shape = (1, *(size or 8 for size in feature.shape[:2]), *feature.shape[2:])
    if problem := axes_problem(shape):
        raise UserError(f"config.data.name: {name}: images {problem}")
    if feature.np_dtype == np.uint8:
        pixels, line = BYTES, ""
    else:
        rows = (row for part in examples.values() for row in part.values())
        pixels, line = decided(extent_of(rows))
    if pixels is None:
        raise UserError(f"config.data.name: {name}: images: {line}")
    for part in examples.values():
        part.pixels, part.dtype = pixels, pixels.dtype
    if shape[-1] in (2, 4) and len(shape) == 4:
        line += f"{'; ' if line else ''}the last channel, alpha, is laid on white"
    told = f"{name}: images: {line}" if line else ""
    return None if pixels.scale == "bytes" else pixels, told


def load_rows(
    directory: str | None, argument: str | None, header: Sequence[str]
) -> dict[str, Rows]:
    """Returns the texts and labels of the data set `argument`, a column a feature.

    Raises:
        UserError: Not prepared in `config.data.dir`.
    """
    if header:
        raise UserError("config.data.header: the features of TFDS have names")
    info, records, _ = _opened(directory, argument)
    found = {
        split: Rows(
            where=f"tfds:{argument}, {split}",
            columns=list(info.features),
            cells=[
                _plain(part[row], info.features, f"tfds:{argument}, {split}, row {row}")
                for row in range(len(part))
            ],
            lines=range(len(part)),
        )
        for split, part in records.items()
    }
    return {"all": next(iter(found.values()))} if len(found) == 1 else found


def _plain(record: Mapping[str, Any], features: Any, where: str) -> dict[str, Any]:
    """Returns the values of a record as a file of texts would have them."""

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {key!r} is not UTF-8: {error}") from error
        if isinstance(value, Mapping):
            return {name: plain(key, part) for name, part in value.items()}
        if np.ndim(value):
            return [plain(key, part) for part in value]
        feature = getattr(features[key], "feature", features[key])
        if hasattr(feature, "int2str"):
            # GLUE's test splits have -1 for labels that are not published.
            return feature.int2str(int(value)) if int(value) >= 0 else None
        return np.asarray(value).item()

    return {key: plain(key, value) for key, value in record.items()}


def _keys(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """Returns the names of the feature to classify and of the label."""

    def named(*kinds: type) -> list[str]:
        return [key for key, one in info.features.items() if isinstance(one, kinds)]

    labels = named(tfds.features.ClassLabel)
    inputs = named(tfds.features.Image, tfds.features.Tensor)
    inputs = [key for key in inputs if key not in labels]  # Which are tensors, too.
    if info.supervised_keys and all(k in info.features for k in info.supervised_keys):
        pair = tuple(info.supervised_keys[:2])
        if pair[0] in inputs and pair[1] in labels:
            return pair
    if len(labels) != 1 or len(inputs) != 1:
        raise UserError(
            f"tfds:{name}: needed are one image or tensor and one class label, "
            f"but the features are {dict(info.features)}"
        )
    return inputs[0], labels[0]


def _checksums(info: Any) -> list:
    return sorted(
        (split, part.num_examples, list(part.shard_lengths), part.num_bytes)
        for split, part in info.splits.items()
    )
