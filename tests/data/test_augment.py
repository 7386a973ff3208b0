"""Augmentation, against torchvision and against what can be counted."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
import small
from sklearn.datasets import load_sample_images

from finetune_jax.core.errors import UserError
from finetune_jax.data.augmentation import colour, rand_augment
from finetune_jax.data.augmentation import steps as augment
from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.models.modes import Mode

pytestmark = pytest.mark.slow

JITTER = ("color_jitter", 0.4, 0.4, 0.4, 0.1)
# Together they contain each augmentation; (20, 24) become (16, 12).
PIPELINES = (
    ("flip", ("pad_crop", 2), "random_crop"),
    (("random_resized_crop", 0.3), "flip", JITTER),
    ("random_crop", ("rand_augment", 2, 15), ("random_erasing", 0.8)),
)
SIZE = (16, 12)
CHANGES = {
    "brightness": (colour.adjust_brightness, (0.0, 0.4, 1.0, 1.7)),
    "contrast": (colour.adjust_contrast, (0.0, 0.4, 1.0, 1.7)),
    "saturation": (colour.adjust_saturation, (0.0, 0.4, 1.0, 1.7)),
    "hue": (colour.adjust_hue, (-0.5, -0.21, 0.0, 0.1, 0.5)),
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


def erased(count, *arguments, shape=(20, 24, 3), fill=(0.0,)):
    """Returns which pixels of equal images are erased, bools [N, H, W]."""
    image = np.ones((count, *shape), np.float32)
    step = ("random_erasing", *arguments)
    function = jax.jit(make_augment((step,), fill=fill))
    found = np.asarray(function(image, keys(count)))
    blank = (found == np.asarray(fill, np.float32)).all(axis=-1)
    assert (blank | (found == 1).all(axis=-1)).all()
    return blank


def test_erasing_fills_one_box_with_the_mean_of_every_channel():
    blank = erased(200, 1.0, fill=(0.1, 0.2, 0.3))
    assert blank.any(axis=(1, 2)).all()
    for box in blank:
        rows, columns = box.any(axis=1), box.any(axis=0)
        assert (box == np.outer(rows, columns)).all()
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2


def test_what_is_erased_is_0_after_normalisation():
    fields = {"augment": (("random_erasing", 1.0),)}
    fields |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.7)}
    task = small.task("resnet20", (12, 12, 3), fields=fields)
    rows = {k: v[0] for k, v in small.batch(8, (12, 12, 3)).items()}
    mode = Mode(learning=frozenset({"head"}))
    found = task.prepare(rows, jax.random.key(0), mode)["inputs"]
    blank = np.asarray(found == 0).all(axis=-1).sum(axis=(1, 2))
    assert (blank >= 2).all() and (blank <= 0.4 * 144).all()


def test_erasing_has_its_probability():
    assert not erased(200, 0.0).any()
    share = erased(2000, 0.3).any(axis=(1, 2)).mean()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_areas_that_never_fit_erase_nothing():
    assert not erased(50, 1.0, 1.0, 1.0).any()


def test_erased_boxes_have_the_distribution_of_torchvision():
    """Two samples of each figure, by the test of Kolmogorov and Smirnov."""
    oracles.import_torchvision()
    import torch
    from torchvision.transforms import RandomErasing

    stored, count = (200, 240), 2000
    blank = erased(count, 1.0, 0.02, 0.5, shape=(*stored, 1))
    torch.manual_seed(0)
    image = torch.ones(1, *stored)
    theirs = [
        RandomErasing.get_params(image, (0.02, 0.5), (0.3, 3.3), [0.0])[:4]
        for _ in range(count)
    ]
    rows, columns = blank.any(axis=2), blank.any(axis=1)
    corner = rows.argmax(axis=1), columns.argmax(axis=1)
    ours = np.stack([*corner, rows.sum(axis=1), columns.sum(axis=1)], axis=1)

    def figures(boxes):
        top, left, tall, wide = np.asarray(boxes, float).T
        return top, left, tall * wide, tall / wide, top + tall / 2, left + wide / 2

    for one, other in zip(figures(ours), figures(theirs)):
        assert scipy.stats.ks_2samp(one, other).pvalue > 0.01


def photographs():
    """Returns real images [H, W, 3] of bytes, odd and even in size."""
    first, second = load_sample_images().images
    return first[::7, ::8][:61, :79], second[::9, ::9][:44, :64]


def midway(shape, name, strength):
    """Returns which pixels are taken from midway between two others, to 1e-4."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    if name == "ShearX":
        x = x + strength * y
    elif name == "ShearY":
        y = y + strength * x
    elif name == "Rotate":
        turn = np.exp(1j * np.deg2rad(strength))
        place = (x - shape[1] / 2 + 1j * (y - shape[0] / 2)) * turn
        x, y = place.real + shape[1] / 2, place.imag + shape[0] / 2
    return (np.abs(x - np.round(x)) < 1e-4) | (np.abs(y - np.round(y)) < 1e-4)


def is_whole(image):
    """Returns which stretched values are whole, float32 dropping some to one less."""
    low, high = (f(image.astype(int), axis=(0, 1)) for f in (np.min, np.max))
    return ((image - low) * 255 % (high - low) == 0) & (image > low)


@pytest.mark.parametrize("magnitude", [0, 4, 9, 17, 30])
def test_an_operation_is_that_of_torchvision(magnitude):
    """To the byte, if it blends nothing, but for ties of float32.

    A blend of bytes drops fractions, at its end and in the grey or blurred image that
    it moves away from: less than a level, and a level times that move. Of floats it is
    the same.
    """
    oracles.import_torchvision()
    import torch
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    operate = jax.jit(functools.partial(rand_augment.operate, magnitude=magnitude))

    def theirs(tensor, name, strength):
        found = _apply_op(tensor, name, strength, InterpolationMode.NEAREST, None)
        return found.numpy().transpose(1, 2, 0)

    def compare(image, name, strength):
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        index = rand_augment.OPERATIONS.index(name)
        ours = np.asarray(operate(np.float32(image / 255), index, int(strength < 0)))
        error = np.abs(ours - theirs(tensor, name, strength) / 255)
        bound = 1e-6
        if name in rand_augment.BLENDS:
            bound += (1 + abs(strength)) / 255
            wanted = theirs(tensor / 255, name, strength)
            np.testing.assert_allclose(ours, wanted, atol=1e-6, err_msg=name)
        tie = midway(image.shape, name, strength)
        assert tie.mean() < 0.1
        if name == "AutoContrast":
            tie = is_whole(image)
            assert error.max() < 1.01 / 255
        assert error[~tie].max() <= bound, name

    for image in photographs():
        space = RandAugment()._augmentation_space(31, image.shape[:2])
        assert tuple(space) == rand_augment.OPERATIONS
        for name, (strengths, signed) in space.items():
            strength = float(strengths[magnitude]) if strengths.ndim else 0.0
            for sign in (1, -1) if signed else (1,):
                compare(image, name, sign * strength)


def test_every_operation_is_drawn_equally_often_both_ways():
    """Bounds are five standard deviations."""
    image = photographs()[1][:, :, :1][::2, ::2].astype(np.float32) / 255
    image[0, 0], image[0, 1] = 0.05, 0.9  # Not the full range: AutoContrast shows.
    count = 2800
    found = augmented((("rand_augment", 1, 20),), np.repeat(image[None], count, axis=0))
    operate = jax.jit(functools.partial(rand_augment.operate, magnitude=20))
    ways = list(itertools.product(range(len(rand_augment.OPERATIONS)), (0, 1)))
    outcomes = np.stack([operate(image, *way) for way in ways])
    same = np.abs(outcomes[:, None] - outcomes).max(axis=(2, 3, 4)) < 1e-5
    is_outcome = np.array(
        [np.abs(found - outcome).max(axis=(1, 2, 3)) < 1e-5 for outcome in outcomes]
    )
    assert is_outcome.any(axis=0).all()
    for ours, seen in zip(same, is_outcome):
        share = ours.mean()
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(seen.mean() - share) < 5 * deviation
    # A grey image has no colour, and signs do not matter to five of the operations.
    assert len(np.unique(same, axis=0)) == len(ways) - 7


def test_flat_and_tiny_images_pass_every_operation():
    for image in (np.full((6, 5, 3), np.float32(0.3)), images(shape=(2, 1, 3))[0]):
        operate = jax.jit(functools.partial(rand_augment.operate, magnitude=9))
        for index in range(len(rand_augment.OPERATIONS)):
            found = np.asarray(operate(image, index, 0))
            assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


def test_two_operations_are_done_one_after_the_other():
    image, rng = jnp.asarray(photographs()[1] / 255), jax.random.key(8)
    limits = jnp.array([[len(rand_augment.OPERATIONS), 2]])
    draws = jax.random.randint(rng, (2, 2), 0, limits)
    wanted = image
    for operation, negative in draws:
        wanted = rand_augment.operate(wanted, operation, negative, magnitude=9)
    found = rand_augment.rand_augment(image, rng, 2, 9)
    assert (found == wanted).all() and (found != image).any()


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


@pytest.mark.bits
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
@pytest.mark.ci_runs("steps2")
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
@pytest.mark.ci_runs("steps2")
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
        (("random_erasing", 1.1), "probability 1.1; a number from 0, up to 1"),
        (("random_erasing", 1, 0), "min_area 0; a number above 0, up to 1"),
        (("random_erasing", 1, 0.5), "min_area 0.5 is above max_area 0.33"),
        (("rand_augment", 0), "num_ops 0; a whole number from 1"),
        (("rand_augment", 2, 31), "magnitude 31; a whole number from 0, up to 30"),
        (("rand_augment", 2, 9.0), "magnitude 9.0"),
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
        (
            ("random_resized_crop", 1),
            ("color_jitter", 3, 0, 0, 0.5),
            ("pad_crop", 0),
            ("random_erasing", 1, 1, 1),
            ("rand_augment", 1, 30),
        )
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
