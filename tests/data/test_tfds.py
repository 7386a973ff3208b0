"""TFDS without TensorFlow, on a data set that is really prepared."""

import io
import pathlib
import subprocess
import sys

import numpy as np
import pictures
import pytest
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, fit
from finetune_jax.data.loading import load_source
from finetune_jax.data.sources.tfds import TfdsExamples

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a folder in which the script has prepared digits as ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    script = ROOT / "scripts" / "prepare_data.py"
    done = subprocess.run(
        [sys.executable, str(script), "digits", str(folder)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(folder.rglob("*.array_record*"))
    return str(folder)


def data(name, directory):
    config = configs.default().data
    config.update(name=name, dir=directory, validation="validation", test="test")
    return make_data(config, seed=0)


def test_a_prepared_data_set_is_that_which_was_prepared(prepared):
    ours, theirs = data("tfds:digits", prepared), data("digits", None)
    assert ours.spec == theirs.spec
    assert "tensorflow" not in sys.modules
    for one, other in (
        (ours.train, theirs.train),
        (ours.held_out["test"], theirs.held_out["test"]),
    ):
        everything = np.arange(len(other))
        for name, array in one.take(everything).items():
            np.testing.assert_array_equal(array, other.take(everything)[name])


def test_a_data_set_that_is_not_prepared_says_what_to_do(tmp_path):
    for name in ("tfds:mnist", "tfds:nothing_of_this_name"):
        with pytest.raises(DataMissing, match="cannot be read|not prepared"):
            load_source(name, str(tmp_path))


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")])
def test_stored_images_are_those_that_tfds_decodes(kind, mode):
    import tensorflow_datasets as tfds

    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # Which TFDS, like TensorFlow, does not look at.
    image = Image.fromarray(pictures.image((90, 120, 30), size=(60, 40))).convert(mode)
    image.save(file, kind, exif=exif)
    feature = tfds.features.Image(shape=(None, None, len(mode)))
    records = [
        {"image": data, "label": 0}
        for data in (file.getvalue(), file.getvalue()[: len(file.getvalue()) // 2])
    ]
    part = TfdsExamples(records, ("image", "label"), feature, True)
    wanted = np.asarray(feature.decode_example_np(file.getvalue()))
    wanted = wanted.reshape(60, 40, len(mode))
    np.testing.assert_array_equal(part.read(0), wanted)
    exact, fast = (
        Geometry(shape=(16, 16, 3), resize=18, decode=decode)
        for decode in ("exact", "fast")
    )
    np.testing.assert_array_equal(part.read(0, exact), fit(wanted, exact))
    is_reduced = (part.read(0, fast) != part.read(0, exact)).any()
    assert is_reduced == (kind == "JPEG")
    if kind == "JPEG":
        with pytest.raises(UserError, match="example 1: cannot be read"):
            part.read(1, exact)
