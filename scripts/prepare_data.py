"""Prepares a data set of arrays for TFDS, as ArrayRecord, without TensorFlow.

.venv/bin/python scripts/prepare_data.py digits DIR
.venv/bin/python scripts/prepare_data.py arrays:FILE.npz DIR --name=mine

Then --config.data.name=tfds:digits --config.data.dir=DIR reads it.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.loading import load_source
from finetune_jax.data.source import Source


def prepare(source: Source, name: str, folder: pathlib.Path) -> None:
    """Writes a source's splits below a folder as a TFDS data set with tensor features.

    Args:
        source: Its examples have one shape.
        name: Of the data set.
        folder: `data_dir` of TFDS.
    """
    if not source.class_names:
        raise UserError(f"{name}: its labels are not classes, which this script writes")
    import tensorflow_datasets as tfds
    from etils import epath

    first: Any = next(iter(source.splits.values()))
    features = tfds.features.FeaturesDict(
        {
            "inputs": tfds.features.Tensor(
                shape=first.shape, dtype=np.dtype(first.dtype)
            ),
            "label": tfds.features.ClassLabel(names=source.class_names),
        }
    )

    class Arrays(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        # Where TFDS looks for a description; it cannot infer it for a script.
        pkg_dir_path = epath.Path(__file__).parent

        def _info(self):
            return self.dataset_info_from_configs(
                features=features,
                supervised_keys=("inputs", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {
                "train" if split == "all" else split: self._examples(part)
                for split, part in source.splits.items()
            }

        def _examples(self, part):
            for index, label in enumerate(part.label):
                inputs = np.asarray(part.read(index))
                yield index, {"inputs": inputs, "label": int(label)}

        def _generate_examples(self):
            raise NotImplementedError

    Arrays.name = name
    builder = Arrays(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


def main() -> None:
    """Reads the command line and prepares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="digits, iris, idx:FOLDER or arrays:FILE.npz")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--name", help="default: that of the source")
    arguments = parser.parse_args()
    kind, _, place = arguments.source.partition(":")
    prepare(load_source(kind, place or None), arguments.name or kind, arguments.folder)


if __name__ == "__main__":
    main()
