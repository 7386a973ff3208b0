"""TFDS without TensorFlow, on a data set that is really prepared."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from finetune_jax import config as configs
from finetune_jax.data.dataset import load_source, make_data
from finetune_jax.errors import DataMissing

ROOT = pathlib.Path(__file__).parents[1]


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
