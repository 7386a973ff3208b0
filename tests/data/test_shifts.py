"""Shifted copies of a data set."""

import numpy as np
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.data.images.decoding import Geometry
from finetune_jax.data.shifts import shifted
from finetune_jax.data.sources import digits, iris

PLAIN = digits.load()
GEOMETRY = Geometry(shape=(8, 8, 1))


def image(*steps, index=5):
    source = shifted(PLAIN, steps) if steps else PLAIN
    return source.splits["all"].read(index, GEOMETRY)


def test_an_inverted_image_is_its_negative():
    np.testing.assert_array_equal(image(("invert",)), 255 - image())
    np.testing.assert_array_equal(image(("invert",), ("invert",)), image())


def test_a_rotation_by_a_right_angle_is_numpys():
    np.testing.assert_array_equal(image(("rotate", 90.0)), np.rot90(image()))
    assert not np.array_equal(image(("rotate", 30.0)), image())


def test_noise_is_the_same_in_every_epoch_and_another_for_every_image():
    step = ("noise", 0.1)
    np.testing.assert_array_equal(image(step), image(step))
    drawn = [image(step, index=i).astype(int) - image(index=i) for i in (5, 6)]
    assert not np.array_equal(*drawn)
    noise = np.concatenate(
        [
            (image(step, index=i).astype(float) - image(index=i))[
                (image(index=i) > 90) & (image(index=i) < 165)
            ]
            for i in range(300)
        ]
    )
    assert noise.std() == pytest.approx(25.5, rel=0.05)


def test_labels_names_and_shapes_stay_and_the_fingerprint_does_not():
    source = shifted(PLAIN, (("invert",),))
    examples, plain = source.splits["all"], PLAIN.splits["all"]
    assert examples.label is plain.label
    assert (len(examples), examples.shape, examples.dtype) == (1797, (8, 8, 1), "uint8")
    assert examples.name(3) == plain.name(3)
    assert source.fingerprint() != PLAIN.fingerprint()


@pytest.mark.parametrize(
    ("source", "steps", "message"),
    [
        (PLAIN, (("invrt",),), "did you mean 'invert'"),
        (PLAIN, (("rotate",),), r"\('rotate', degrees\)"),
        (PLAIN, (("noise", -1.0),), "0 or more"),
        (iris.load(), (("invert",),), "it has no images"),
    ],
)
def test_shifts_that_cannot_be_are_refused(source, steps, message):
    with pytest.raises(UserError, match=message):
        shifted(source, steps)
