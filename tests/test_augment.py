"""Augmentation, against torchvision and against what can be counted."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from finetune_jax import augment
from finetune_jax.augment import make_augment
from finetune_jax.errors import UserError

pytestmark = pytest.mark.slow

JITTER = ("color_jitter", 0.4, 0.4, 0.4, 0.1)
# Together they contain each augmentation; (20, 24) become (16, 12).
PIPELINES = (
    ("flip", ("pad_crop", 2), "random_crop"),
    (("random_resized_crop", 0.3), "flip", JITTER),
)
SIZE = (16, 12)
CHANGES = {
    "brightness": (augment.adjust_brightness, (0.0, 0.4, 1.0, 1.7)),
    "contrast": (augment.adjust_contrast, (0.0, 0.4, 1.0, 1.7)),
    "saturation": (augment.adjust_saturation, (0.0, 0.4, 1.0, 1.7)),
    "hue": (augment.adjust_hue, (-0.5, -0.21, 0.0, 0.1, 0.5)),
}


@pytest.fixture
def functional():
    """Returns `apply(name, image, *arguments)`, by torchvision's function of that name."""
    oracles.import_torchvision()
    import torch
    from torchvision.transforms import functional

    def apply(name, image, *arguments, **options):
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        changed = getattr(functional, name)(tensor, *arguments, **options)
        return changed.numpy().transpose(1, 2, 0)

    return apply


def images(count=1, shape=(20, 24, 3), seed=0):
    random = np.random.default_rng(seed)
    return random.random((count, *shape)).astype(np.float32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def augmented(steps, batch, size=None, rngs=None):
    function = jax.jit(make_augment(steps, size))
    return np.asarray(function(batch, keys(len(batch)) if rngs is None else rngs))


# The part is traced, as under vmap, so one size compiles once.
resized_crop = jax.jit(augment.resized_crop, static_argnames="size")


def edge_cases():
    """Returns an image of ties between channels, of greys and of pure colours."""
    image = images(shape=(12, 10, 3))[0]
    corners = list(itertools.product((0.0, 1.0), repeat=3))
    image[0, :8] = corners
    image[1] = image[1, :, :1]
    for row, (one, other) in enumerate(itertools.combinations(range(3), 2)):
        image[2 + row, :, one] = image[2 + row, :, other]
    image[5] *= 1e-6
    image[6] = 0.5 + 1e-6 * image[6]
    return image


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_colour_is_that_of_torchvision(functional, name, channels):
    adjust, amounts = CHANGES[name]
    image, adjust = edge_cases()[..., :channels], jax.jit(adjust)
    for amount in amounts:
        wanted = functional(f"adjust_{name}", image, amount)
        found = adjust(image, np.float32(amount))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=amount)


@pytest.mark.parametrize("size", [(16, 16), (40, 33)])
@pytest.mark.parametrize(
    "box", [(0, 0, 20, 24), (3, 5, 11, 17), (19, 23, 1, 1), (0, 7, 16, 16)]
)
def test_a_resized_crop_is_that_of_torchvision(functional, box, size):
    image = images()[0]
    wanted = functional("resized_crop", image, *box, list(size), antialias=True)
    found = resized_crop(image, box[:2], box[2:], size=size)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_a_resized_crop_sees_nothing_outside_its_box():
    image = np.full((20, 24, 3), np.float32(7))
    image[4:14, 6:21] = images(shape=(10, 15, 3))[0]
    for size in ((32, 32), (5, 4)):
        found = resized_crop(image, (4, 6), (10, 15), size=size)
        assert found.shape == (*size, 3)
        assert found.max() <= 1 + 1e-5
        whole = resized_crop(image[4:14, 6:21], (0, 0), (10, 15), size=size)
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_a_crop_of_the_same_size_is_resized_to_itself():
    image = images()[0]
    found = resized_crop(image, (2, 3), (16, 16), size=(16, 16))
    np.testing.assert_allclose(found, image[2:18, 3:19], atol=1e-6)


def boxes(stored):
    """Returns a function of (keys, min_scale), of the boxes that are drawn."""
    one = functools.partial(augment.random_box, stored=stored)
    drawn = jax.jit(jax.vmap(lambda rng, scale: one(rng, min_scale=scale), (0, None)))
    return lambda rngs, scale: map(np.asarray, drawn(rngs, np.float32(scale)))


@pytest.mark.parametrize(
    ("stored", "largest"),
    [((24, 24), (24, 24)), ((90, 30), (40, 30)), ((9, 60), (9, 12)), ((1, 1), (1, 1))],
)
def test_a_random_box_lies_in_the_image(stored, largest):
    """Of all the area there is none, but for the largest of an allowed ratio."""
    draw = boxes(stored)
    for min_scale in (0.01, 0.5, 1.0):
        corner, sides = draw(keys(500), min_scale)
        assert (sides >= 1).all() and (corner >= 0).all()
        assert (corner + sides <= stored).all()
    assert (sides == largest).all()


def test_random_boxes_have_the_distribution_of_torchvision():
    """Every bound is five standard errors of a mean, at an image of 1000 x 1000.

    A box of less than 3/4 of the area always fits, so that areas are uniform and
    ratios log-uniform there. Beyond, an area a fits with probability
    -log(a) / log(4/3), which says how many boxes there are on either side.
    """
    count, low, most = 20_000, 0.08, math.log(4 / 3)
    corner, sides = boxes((1000, 1000))(keys(count), low)
    area = sides.prod(axis=1) / 1e6
    log_aspect = np.log(sides[:, 1] / sides[:, 0])
    assert abs(log_aspect).max() < most + 0.005 and area.min() > low - 0.001

    def close(values, mean, deviation):
        return abs(np.mean(values) - mean) < 5 * deviation / len(values) ** 0.5

    small = area < 0.75
    beyond = (1 - (0.75 - 0.75 * math.log(0.75))) / most
    share = (0.75 - low) / (0.75 - low + beyond)
    assert close(small, share, (share * (1 - share)) ** 0.5)
    assert close(area[small], (low + 0.75) / 2, (0.75 - low) / 12**0.5)
    assert close(log_aspect[small], 0, 2 * most / 12**0.5)
    assert close(log_aspect[small] ** 2, most**2 / 3, most**2 * (4 / 45) ** 0.5)
    for axis in range(2):
        place = (corner[:, axis] + 0.5) / (1001 - sides[:, axis])
        assert close(place[small], 0.5, 12**-0.5)
    place = (corner[small] + 0.5) / (1001 - sides[small])
    assert close(np.prod(place - 0.5, axis=1), 0, 1 / 12)


def test_random_crops_are_windows_and_every_window_occurs():
    image = images(shape=(6, 7, 1))[0]
    crops = augmented(("random_crop",), np.repeat(image[None], 200, axis=0), (4, 6))
    windows = [
        image[i : i + 4, j : j + 6] for i, j in itertools.product(range(3), range(2))
    ]
    found = [[(c == w).all() for w in windows].index(True) for c in crops]
    # One of six windows is missed with probability 6 * (5 / 6) ** 200 < 1e-14.
    assert set(found) == set(range(6))


def test_flipping_keeps_every_pixel():
    image = images(8)
    flipped = augmented(("flip",), image)
    assert (np.sort(flipped, axis=2) == np.sort(image, axis=2)).all()
    assert (flipped != image).any() and (flipped == image).all(axis=(1, 2, 3)).any()


def test_a_step_draws_from_the_key_folded_with_its_place():
    """So runs that augment go on, after an update of this package, as they began."""
    batch, rngs = images(16, shape=(5, 6, 1)), keys(16)
    found = augmented(("flip", ("pad_crop", 1)), batch)
    for image, rng, ours in zip(batch, rngs, found):
        if jax.random.bernoulli(jax.random.fold_in(rng, 0)):
            image = image[:, ::-1]
        top, left = jax.random.randint(jax.random.fold_in(rng, 1), (2,), 0, 3)
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        assert (ours == padded[top : top + 5, left : left + 6]).all()


@pytest.mark.parametrize("strengths", [(0.4,), (0, 0.4), (0, 0, 0.4), (0, 0, 0, 0.1)])
def test_each_strength_of_the_jitter_changes_what_it_names_alone(strengths):
    image = 0.2 + 0.5 * images(64)
    found = augmented((("color_jitter", *strengths),), image)
    name, (adjust, _) = list(CHANGES.items())[len(strengths) - 1]
    middle = 0.0 if name == "hue" else 1.0
    low, high = middle - strengths[-1], middle + strengths[-1]

    def nearest(image, found):
        tried = jnp.linspace(low, high, 401)
        changed = jax.vmap(lambda amount: adjust(image, amount))(tried)
        error = jnp.abs(changed - found[None]).max(axis=(1, 2, 3))
        return tried[jnp.argmin(error)], error.min()

    amount, error = jax.jit(jax.vmap(nearest))(image, found)
    assert error.max() < 0.01
    # Uniform amounts: the mean of 64 is within five standard errors of the middle, and
    # one of them lies in either outer quarter but with probability 2 * 0.75 ** 64 < 3e-8.
    assert abs(amount.mean() - middle) < 5 * (high - low) / (12 * 64) ** 0.5
    quarter = (high - low) / 4
    assert amount.min() < low + quarter and amount.max() > high - quarter


def test_a_jitter_of_no_strength_changes_no_bit():
    image = images(4)
    assert (augmented(("color_jitter",), image) == image).all()


def test_grey_images_have_no_saturation_and_no_hue():
    image = images(4, shape=(6, 6, 1))
    still = augmented((("color_jitter", 0, 0, 0.4, 0.5),), image)
    assert (still == image).all()
    changed = augmented((("color_jitter", 0.4, 0.4),), image)
    assert changed.shape == image.shape
    assert (changed != image).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_colour_stays_between_0_and_1(name):
    adjust, amounts = CHANGES[name]
    for amount in np.linspace(amounts[0], amounts[-1], 40, dtype=np.float32):
        found = np.asarray(jax.jit(adjust)(edge_cases(), amount))
        assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("steps", PIPELINES)
def test_an_image_depends_on_its_key_and_on_nothing_else(steps):
    function, batch, rngs = jax.jit(make_augment(steps, SIZE)), images(6), keys(6)
    whole = np.asarray(function(batch, rngs))
    assert whole.shape == (6, *SIZE, 3) and np.isfinite(whole).all()
    assert (whole == function(batch, rngs)).all()
    order = np.array([3, 0, 5, 1, 4, 2])
    assert (whole[order] == function(batch[order], rngs[order])).all()
    for i in range(6):
        alone = function(batch[i : i + 1], rngs[i : i + 1])
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5)
    same = np.asarray(function(np.repeat(batch[:1], 6, axis=0), rngs))
    assert len(np.unique(same.reshape(6, -1), axis=0)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", PIPELINES)
def test_compiling_changes_nothing_but_rounding(steps):
    batch = images(2)
    plain = make_augment(steps, SIZE)(batch, keys(2))
    np.testing.assert_allclose(augmented(steps, batch, SIZE), plain, atol=1e-5)


@pytest.mark.parametrize("steps", PIPELINES)
def test_the_number_type_is_kept(steps):
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            batch = jax.ShapeDtypeStruct((2, 20, 24, 3), dtype)
            out = jax.eval_shape(make_augment(steps, SIZE), batch, keys(2))
            assert out.dtype == dtype


def test_without_a_size_every_step_keeps_that_of_the_images():
    for steps in PIPELINES:
        out = jax.eval_shape(make_augment(steps), images(2), keys(2))
        assert out.shape == (2, 20, 24, 3)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("color_jitter", 0.1, -1), "contrast -1; a number from 0 is needed"),
        (("color_jitter", 0, 0, 0, 0.6), "hue 0.6; a number from 0, up to 0.5"),
        (("color_jitter", math.inf), "brightness inf"),
        (("color_jitter", math.nan), "brightness nan"),
        (("color_jitter", True), "brightness True"),
        (("color_jitter", "a"), "brightness 'a'"),
        (
            ("color_jitter", 0, 0, 0, 0, 0),
            "takes brightness, contrast, saturation, hue",
        ),
        (("random_resized_crop", 0), "min_scale 0; a number above 0, up to 1"),
        (("random_resized_crop", 1.1), "min_scale 1.1"),
        (("pad_crop", 1.0), "pixels 1.0; a whole number from 0 is needed"),
        (("pad_crop", -1), "pixels -1"),
        (("flip", 1), "'flip' with 1 values; takes no argument"),
        (("random_crop", 8), "takes no argument"),
        (("random_crap",), "did you mean 'random_crop'"),
        ((), "() is not a step"),
        (1, "1 is not a step"),
    ],
)
def test_a_step_that_cannot_be_run_is_refused_by_name(step, message):
    with pytest.raises(UserError) as found:
        make_augment((("flip",), step))
    assert message in str(found.value)
    assert "config.data.augment[1]: " in str(found.value)


def test_limits_themselves_are_allowed():
    make_augment(
        (("random_resized_crop", 1), ("color_jitter", 3, 0, 0, 0.5), ("pad_crop", 0))
    )


def test_all_wrong_steps_are_named_at_once():
    with pytest.raises(UserError) as found:
        make_augment((("flop",), ("color_jitter", -1, "a"), ("flip",), 7))
    lines = str(found.value).splitlines()
    places = [line.split(":")[0].strip() for line in lines[1:]]
    assert places == [f"config.data.augment[{i}]" for i in (0, 1, 1, 3)]


@pytest.mark.parametrize(
    ("steps", "stored", "message"),
    [
        (("flip", ("pad_crop", 2)), (20, 24), "20x24, but the model takes 16x12"),
        ((), (16, 13), "add one of 'random_crop', 'random_resized_crop'"),
        (("random_crop",), (20, 11), "at least 16x12 is needed"),
        (("random_crop", "random_resized_crop"), (15, 20), "cannot enlarge"),
    ],
)
def test_images_that_would_not_come_out_in_the_models_size_are_refused(
    steps, stored, message
):
    with pytest.raises(UserError, match=r"^config\.data\.train_size: ") as found:
        make_augment(steps, SIZE, stored)
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("steps", "stored"),
    [
        ((), SIZE),
        (("flip", "random_crop"), SIZE),
        (("flip", "random_crop"), (20, 12)),
        (("random_resized_crop", "random_crop"), (8, 30)),
    ],
)
def test_images_that_come_out_in_the_models_size_are_accepted(steps, stored):
    function = make_augment(steps, SIZE, stored)
    out = jax.eval_shape(function, images(2, (*stored, 3)), keys(2))
    assert out.shape == (2, *SIZE, 3)
