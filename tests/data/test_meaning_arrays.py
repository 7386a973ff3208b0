"""Image arrays mean the same whatever numbers, channels and axes they are saved with."""

import gzip
import pathlib
import struct
import types

import meaning
import numpy as np
import pytest
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, fit, read_image
from finetune_jax.data.images.pixels import Pixels, axes_problem, read_images
from finetune_jax.data.kind import kind_named
from finetune_jax.data.loading import load_source
from finetune_jax.data.preprocessing import ArraySpec
from finetune_jax.data.source import array_source
from finetune_jax.data.sources import tfds
from finetune_jax.data.spec import DataSpec, check_reads_alike, spec_from_json

COUNT, SIZE = 20, (6, 5)
LABELS = np.arange(COUNT) % 2


def colours(channels=3, seed=0):
    """Returns bytes [N, H, W, C] from 0 to 255."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (COUNT, *SIZE, channels), np.uint8)
    image[0, 0, 0], image[0, 0, 1] = 0, 255
    return image


RGB, GREY = colours(), colours(1)
OPAQUE = np.full_like(GREY, 255)


def with_alpha(image, alpha=OPAQUE):
    return np.concatenate([image, alpha], axis=-1)


def scaled(dataset):
    """Returns the inputs as a task sees them: bytes are scaled to [0, 1]."""
    inputs = dataset.take(np.argsort(dataset.indices))["inputs"]
    return inputs / np.float32(255) if inputs.dtype == np.uint8 else inputs


def data_of(path, **given):
    config = configs.default().data
    config.update(name="arrays", dir=str(path), train="all", validation=None, test=None)
    config.update(given)
    return make_data(config, seed=0)


def read(given):
    """Returns what training sees of arrays, and the warnings."""
    values, folder = given
    np.savez(folder / "a.npz", x=values, y=LABELS)
    data = data_of(folder / "a.npz")
    return [scaled(data.train)], data.warnings


def saved(values):
    return lambda folder: (values, folder)


def odd(name, values, **expected):
    return meaning.Odd(name=name, make=saved(values), **expected)


SAME = [
    odd("int64", RGB.astype(int), same=True, warns="int64 from 0 to 255: read as bytes"),
    odd("uint16 bytes", RGB.astype("u2"), same=True, warns="uint16 .*read as bytes"),
    odd("int16", RGB.astype("i2"), same=True, warns="int16 .*read as bytes"),
    odd("big endian", RGB.astype(">i4"), same=True, warns="read as bytes"),
    odd("float32", RGB.astype("f4"), same=True, warns="float32 from 0 to 255: read as"),
    odd("float16", RGB.astype("f2"), same=True, warns="float16 .*read as bytes"),
    odd("float64", RGB.astype("f8"), same=True, warns="float64 .*read as bytes"),
    odd("RGBA", with_alpha(RGB), same=True, warns="of 4 channels .* alpha .* on white"),
    odd("RGBA int64", with_alpha(RGB).astype(int), same=True, warns="alpha"),
    odd("RGBA float", with_alpha(RGB).astype("f4"), same=True, warns="alpha"),
    odd("16 bits", RGB.astype("u2") * 257, same=True, warns="upper 8 of 16 bits"),
    odd("16 bits int32", RGB.astype("i4") * 256, same=True, warns="upper 8 of 16 bits"),
    odd("fortran", np.asfortranarray(RGB), same=True),
]  # fmt: skip
HALVES = RGB.astype("f4") * 0.5 + 100.25
REFUSED = [
    odd("channels first", RGB.transpose(0, 3, 1, 2), refuses=r"transpose\(0, 2, 3, 1\)"),
    odd("grey first", GREY.transpose(0, 3, 1, 2), refuses=r"transpose\(0, 2, 3, 1\)"),
    odd("RGBA first", with_alpha(RGB).transpose(0, 3, 1, 2), refuses="come first"),
    odd("examples last", RGB.transpose(1, 2, 3, 0), refuses=r"transpose\(3, 0, 1, 2\)"),
    odd("five axes", RGB[:, None], refuses="needed are inputs"),
    odd("five channels", colours(5), refuses="5 channels; images have 1"),
    odd("12 bits", RGB.astype("u2") * 16, refuses="neither bytes nor the whole of 16"),
    odd("10 bits", RGB.astype("i4") * 4, refuses="WHITE is the value of white"),
    odd("32 bits", RGB.astype("i8") * 2**20, refuses="neither bytes"),
    odd("int8", (RGB.astype(int) - 128).astype("i1"), refuses="negative integers"),
    odd("floats to 16", RGB // 16 * 1.0, refuses="neither from 0 to 1 nor"),
    odd("floats to 65535", RGB * 257.0, refuses="neither from 0 to 1 nor"),
    odd("floats to 1.5", RGB / 170, refuses="neither from 0 to 1 nor"),
    odd("alpha to 1", with_alpha(RGB * 1.0, OPAQUE / 255), refuses="save both in one"),
    odd("alpha bit", with_alpha(RGB, OPAQUE // 255), refuses="alpha, is uint8 from 1 to 1"),
    odd("no alpha", with_alpha(RGB, OPAQUE * 0), refuses="leave alpha out"),
    odd("alpha of 8 in 16", with_alpha(RGB.astype("u2") * 257, OPAQUE.astype("u2")),
        refuses="save both in one range"),
    odd("standardised alpha", with_alpha(RGB / 50 - 2), refuses="standardised"),
]  # fmt: skip


@meaning.by_name(SAME + REFUSED)
def test_colours(odd, tmp_path):
    meaning.check(odd, read, [RGB / np.float32(255)], tmp_path)


GREYS = [
    odd("[N, H, W]", GREY[..., 0], same=True),
    odd("int64 [N, H, W]", GREY[..., 0].astype(int), same=True, warns="read as bytes"),
    odd("grey with alpha", with_alpha(GREY), same=True, warns="of 2 channels"),
    odd("big-endian floats", GREY.astype(">f4"), same=True, warns="read as bytes"),
]


@meaning.by_name(GREYS)
def test_greys(odd, tmp_path):
    meaning.check(odd, read, [GREY / np.float32(255)], tmp_path)


UNIT = RGB.astype("f4") / np.float32(255)
FLOATS = [
    odd("float64 in [0, 1]", UNIT.astype("f8"), same=True),
    odd("RGBA in [0, 1]", with_alpha(UNIT, OPAQUE / np.float32(255)), same=True,
        warns="alpha"),
]  # fmt: skip


@meaning.by_name(FLOATS)
def test_floats_up_to_one(odd, tmp_path):
    meaning.check(odd, read, [UNIT], tmp_path)


BITS = (RGB > 127).astype(np.float32)


@meaning.by_name([
    odd("bool", RGB > 127, same=True),
    odd("int64", (RGB > 127).astype(int), same=True, warns="0 is read as black"),
])  # fmt: skip
def test_black_and_white(odd, tmp_path):
    meaning.check(odd, read, [BITS], tmp_path)


@pytest.mark.parametrize(
    ("values", "seen", "warns"),
    [
        (HALVES, HALVES / 255, "divided by 255"),
        (UNIT * 4 - 2, UNIT * 4 - 2, "taken as they are, as if standardised"),
        (RGB // 16, RGB // 16 / np.float32(255), r"no value is above 15.*\(255 / 15\)"),
        (RGB // 255, RGB // 255 / np.float32(255), "no value is above 1"),
        ((RGB // 16).astype(int), RGB // 16 / np.float32(255), "no value is above 15"),
        (RGB * 0, RGB * np.float32(0), "all values are 0, which is black"),
        (UNIT / 255, UNIT / 255, r"no value is above 0.00392\d*, and 1 is white"),
        (UNIT / 9, UNIT / 9, r"save x \* \(1 / 0.111"),
        (UNIT * 0, UNIT * 0, "all values are 0"),
    ],
)
def test_what_is_assumed_is_told(values, seen, warns, tmp_path):
    numbers, warnings = read((values, tmp_path))
    np.testing.assert_allclose(numbers[0], seen, rtol=1e-6)
    assert len(warnings) == 1
    with pytest.raises(UserError, match=warns):
        raise UserError(warnings[0])


def test_alpha_is_laid_on_white_as_in_files(tmp_path):
    rgba = np.concatenate([RGB, colours(1, seed=3)], axis=-1)
    found = read_images({"all": rgba}).values["all"]
    for image, plain in zip(rgba, found):
        Image.fromarray(image).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), plain)
    floats = read_images({"all": rgba / 255}).values["all"]
    np.testing.assert_allclose(floats * 255, found, atol=1)
    grey = np.concatenate([GREY, colours(1, seed=4)], axis=-1)
    found = read_images({"all": grey}).values["all"]
    Image.fromarray(grey[2]).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[..., :1], found[2])


def test_fitting_an_image_with_alpha_keeps_its_colours():
    image = np.full((4, 4, 4), (10, 200, 30, 255), np.uint8)
    assert fit(image, Geometry(shape=(4, 4, 3)))[0, 0].tolist() == [10, 200, 30]
    assert fit(image[..., 2:], Geometry(shape=(4, 4, 1)))[0, 0].tolist() == [30]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (RGB, RGB.astype(int) * 257),
        (RGB, UNIT),
        (RGB * 1.0, UNIT),
        (HALVES, UNIT),
        (UNIT * 4 - 2, UNIT),
        (RGB.astype("u2") * 257, RGB),
        (RGB > 3, UNIT),
    ],
)
def test_splits_of_other_ranges_are_refused(train, test):
    with pytest.raises(UserError, match="splits differ|neither"):
        array_source("a", {"train": (train, LABELS), "test": (test, LABELS)})


def test_a_dark_split_is_read_as_the_others():
    dark = (RGB // 255).astype(int)
    found = array_source(
        "a", {"train": (RGB.astype(int), LABELS), "test": (dark, LABELS)}
    )
    np.testing.assert_array_equal(found.splits["test"].values, dark)
    assert found.splits["test"].dtype == "uint8"


def test_vectors_keep_their_numbers_and_splits_their_dtype():
    x = np.arange(40).reshape(COUNT, 2)
    found = array_source("a", {"all": (x, LABELS)})
    np.testing.assert_array_equal(found.splits["all"].values, x.astype("f4"))
    assert found.pixels is None and not found.warnings
    with pytest.raises(UserError, match="differ in the dtype of inputs"):
        array_source("a", {"train": (x.astype("u1"), LABELS), "test": (x, LABELS)})


def test_mean_and_deviation_in_bytes_are_refused(tmp_path):
    for values in (RGB, RGB * 1.0, UNIT):
        np.savez(tmp_path / "a.npz", x=values, y=LABELS)
        with pytest.raises(UserError) as told:
            data_of(tmp_path / "a.npz", mean=(123.7,), std=(58.4,))
        for key in ("mean", "std"):
            assert f"config.data.{key}: " in str(told.value)
        assert "divide it by 255" in str(told.value)
    np.savez(tmp_path / "a.npz", x=RGB * 1.0 - 120, y=LABELS)
    assert (
        data_of(tmp_path / "a.npz", std=(58.4,)).spec.inputs.pixels.scale
        == "as they are"
    )


def idx_file(path, values, code):
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_idx_files_of_other_numbers(tmp_path):
    for prefix in ("train", "t10k"):
        file = tmp_path / f"{prefix}-labels-idx1-ubyte.gz"
        idx_file(file, LABELS.astype("u1"), 0x08)
        file = tmp_path / f"{prefix}-images-idx3-ubyte.gz"
        idx_file(file, GREY[..., 0].astype(">i2"), 0x0B)
    found = load_source("idx", str(tmp_path))
    np.testing.assert_array_equal(found.splits["train"].values, GREY)
    assert "read as bytes" in found.warnings[0]
    idx_file(file, GREY[..., 0].astype(">f4") / 9, 0x0D)
    with pytest.raises(UserError, match="splits differ"):
        load_source("idx", str(tmp_path))


def prepared(values, names=("a", "b"), labels=LABELS, shape=None):
    """Returns what TFDS would give of arrays: examples by split, and the features."""
    records = [{"x": x, "y": y} for x, y in zip(values, labels)]
    feature = types.SimpleNamespace(
        shape=shape or values.shape[1:],
        np_dtype=values.dtype,
        decode_example_np=np.asarray,
    )
    part = tfds.TfdsExamples(records, ("x", "y"), feature, True)
    return {"all": part}, feature, types.SimpleNamespace(names=names, num_classes=2)


@pytest.mark.parametrize(
    ("values", "seen", "told"),
    [
        (RGB, RGB, ""),
        (GREY[..., 0], GREY, ""),
        (with_alpha(RGB), RGB, "alpha, is laid on white"),
        (RGB.astype(int), RGB, "read as bytes"),
        (RGB.astype("u2") * 257, RGB, "upper 8 of 16 bits"),
        (RGB * 1.0, RGB, "read as bytes"),
        (UNIT, UNIT, ""),
        (HALVES, HALVES / 255, "divided by 255"),
    ],
)
def test_prepared_data_sets_are_read_as_arrays(values, seen, told):
    examples, feature, _ = prepared(values)
    pixels, line = tfds._pixels("tfds:a", feature, examples)
    assert told in line and bool(told) == bool(line)
    part = examples["all"]
    assert part.shape == seen.shape[1:] and part.dtype == str(seen.dtype)
    assert (pixels is None) == (
        values.dtype.kind != "f" and told != "upper 8 of 16 bits"
    )
    for index in (0, 5):
        np.testing.assert_allclose(part.read(index), seen[index], rtol=1e-6)


def test_prepared_data_sets_that_do_not_fit_are_refused():
    for values, message in (
        (RGB.transpose(0, 3, 1, 2), "come first"),
        (RGB.astype("u2") * 16, "neither bytes"),
    ):
        examples, feature, _ = prepared(values)
        with pytest.raises(UserError, match=message):
            tfds._pixels("tfds:a", feature, examples)
    for names, message in ((("a",), "one class, 'a'"), (("a", "a "), "'a' twice")):
        examples, _, labels = prepared(RGB, names)
        with pytest.raises(UserError, match=message):
            tfds._class_names("tfds:a", labels, examples)
    examples, _, labels = prepared(RGB, (" a", "A"))
    names, warnings = tfds._class_names("tfds:a", labels, examples)
    assert names == ("a", "A") and "'a' (10 examples) and 'A' (10" in warnings[0]


def spec(pixels=None, dtype="uint8", shape=(*SIZE, 3)):
    return DataSpec(
        kind="images" if len(shape) == 3 else "vectors",
        inputs=ArraySpec(pixels=pixels),
        shape=shape,
        train_shape=shape,
        dtype=dtype,
        class_names=("0", "1"),
    )


def reader(spec):
    return kind_named(spec.kind).reader(spec, {}, pathlib.Path())


def checked(array, spec, name, alone=False):
    return reader(spec).check(array, name, alone)


def read_array(path, spec):
    return reader(spec).read_file(path)


def of_run(values):
    """Returns the spec of a run that was trained on arrays."""
    found = array_source("a", {"all": (values, LABELS)})
    part = found.splits["all"]
    return spec(found.pixels, part.dtype, part.shape)


FILES = spec()  # Photos in files, or bytes.
NO_LINES = "ignore:.*(alpha|no value is above|all values are 0)"


@pytest.mark.filterwarnings(NO_LINES)
@pytest.mark.parametrize(
    ("run", "values", "seen"),
    [
        (FILES, RGB[:2].astype(int), RGB[:2]),
        (FILES, RGB[:2].astype("u2"), RGB[:2]),
        (FILES, with_alpha(RGB)[:2], RGB[:2]),
        (FILES, GREY[:2, ..., 0], GREY[:2]),
        (of_run(RGB.astype(int)), RGB[:2] // 255, RGB[:2] // 255),
        (of_run(RGB * 1.0), RGB[:2] // 128 * 2.0, RGB[:2] // 128 * 2),
        (of_run(RGB * 1.0), RGB[:2] * 0.0, RGB[:2] * 0),
        (of_run(RGB * 1.0), RGB[:2], RGB[:2]),
        (of_run(HALVES), HALVES[:1] / 90, HALVES[:1] / 90 / 255),
        (of_run(UNIT), UNIT[:1].astype("f8") / 300, UNIT[:1] / 300),
        (of_run(UNIT), RGB[:1] > 9, (RGB[:1] > 9) * np.float32(1)),
        (
            of_run(RGB.astype("u2") * 257),
            RGB[:1].astype("i4") * 9,
            RGB[:1] * 9.0 // 256,
        ),
        (of_run(UNIT * 4 - 2), UNIT[:1] * 5 - 2, UNIT[:1] * 5 - 2),
        (spec(dtype="float32"), UNIT[:1].astype("f8") * 3, UNIT[:1] * 3),
    ],
)
def test_inputs_of_predictions_are_read_as_the_run_read_its_own(run, values, seen):
    found = checked(values, run, "x.npy")
    assert str(found.dtype) == run.dtype
    np.testing.assert_allclose(found, seen, rtol=1e-6)


@pytest.mark.parametrize(
    ("run", "values", "message"),
    [
        (FILES, RGB.astype("f4"), "float32, but the model takes uint8.*np.rint"),
        (FILES, UNIT, "float32, but the model takes uint8"),
        (FILES, RGB > 4, "bool, but the model takes uint8"),
        (FILES, (RGB > 4).astype(int), r"int64 from 0 to 1; if 1 is white, .*x \* 255"),
        (FILES, (RGB > 4).astype("u2"), "uint16 from 0 to 1; if 1 is white"),
        (FILES, (GREY > 4)[..., 0].astype("i1"), "int8 from 0 to 1; if 1 is white"),
        (of_run(RGB * 1.0), (RGB > 4).astype(int), "if 1 is white"),
        (FILES, RGB.astype("u2") * 16, "uint16 from 0 to 4080"),
        (FILES, RGB.astype(int) - 3, "int64 from -3 to 252"),
        (FILES, RGB.transpose(0, 3, 1, 2), r"x.transpose\(0, 2, 3, 1\)"),
        (FILES, colours(5), "5 channels"),
        (FILES, np.zeros((2, 7)), r"\(2, 7\), but the model takes \(6, 5, 3\)"),
        (FILES, UNIT, r"if 1 is white, save np.rint\(x \* 255\)"),
        (of_run(RGB * 1.0), HALVES, "save bytes from 0 to 255"),
        (of_run(RGB * 1.0), RGB // 255 * 1.0, "if 1 is white"),
        (of_run(HALVES), UNIT, "floats from 0 to 255"),
        (of_run(RGB.astype("u2") * 257), RGB.astype("u2"), "from 0 to 65535"),
        (FILES, RGB[0], r"\(6, 5, 3\): a single image .*x\[None\]"),
        (of_run(UNIT), RGB, "floats from 0 to 1; save them so"),
        (of_run(UNIT), RGB * 1.0, "floats from 0 to 1; save them so"),
        (of_run(UNIT), UNIT * 4 - 2, "floats from 0 to 1"),
        (of_run(HALVES), RGB, "floats from 0 to 255"),
        (of_run(RGB.astype("u2") * 257), RGB, "save 16 bits"),
        (of_run(UNIT * 4 - 2), RGB * 1.0, "were from -2 to 2"),
        (of_run(UNIT * 4 - 2), RGB, "were from -2 to 2"),
        (of_run(UNIT), np.full((1, 2, 2, 3), np.nan), "have NaN"),
        (spec(dtype="float32"), RGB, "uint8, but the model takes float32"),
        (spec(dtype="float32", shape=(4,)), np.full((1, 4), np.inf), "have NaN or inf"),
        (spec(dtype="float32", shape=(4,)), np.ones((2, 4), "u1"), "takes float32"),
        (spec(dtype="uint8", shape=(4,)), np.ones((2, 4), int), "takes uint8"),
    ],
)
def test_inputs_of_another_range_than_the_runs_are_refused(run, values, message):
    with pytest.raises(UserError, match=f"(?s)x.npy: .*{message}"):
        checked(values, run, "x.npy")


@pytest.mark.parametrize(
    ("run", "values", "told"),
    [
        (FILES, RGB // 255, r"uint8 from 0 to 1: no value is above 1, .*\(255 / 1\)"),
        (FILES, RGB // 16, "no value is above 15, and 255 is white"),
        (FILES, (RGB // 16).astype(int), "int64 from 0 to 15: no value is above 15"),
        (FILES, RGB * 0, "all values are 0, which is black"),
        (FILES, np.zeros((2, 6, 5), int), "all values are 0, which is black"),
        (of_run(RGB * 1.0), RGB // 16 * 1.0, "no value is above 15"),
        (of_run(HALVES), HALVES / 10, "no value is above 22.*255 is white"),
        (of_run(UNIT), UNIT / 255, "and 1 is white"),
        (of_run(RGB.astype("u2") * 257), RGB.astype("u2") * 16, r"65535 / 4080"),
    ],
)
def test_inputs_that_are_almost_black_are_told(run, values, told):
    with pytest.warns(UserWarning, match=f"x.npy: .*{told}"):
        checked(values, run, "x.npy")


HOUNSFIELD = UNIT * 2048 - 1024
OVERSHOOT = UNIT * np.float32(239.3) - np.float32(0.3)


@pytest.mark.parametrize("values", [HOUNSFIELD, OVERSHOOT, RGB - 127.5, UNIT * 32 - 1])
def test_negative_values_that_are_not_standardised_are_refused(values, tmp_path):
    np.savez(tmp_path / "a.npz", x=values, y=LABELS)
    with pytest.raises(
        UserError, match="config.data.mean and std: images from -.*give"
    ):
        data_of(tmp_path / "a.npz")
    middle, spread = float(values.mean()), float(values.std())
    data = data_of(tmp_path / "a.npz", mean=(middle,), std=(spread,))
    assert (
        data.spec.inputs.pixels.scale == "as they are"
        and "standardised" in data.warnings[0]
    )


def test_conversions_of_inputs_are_told(tmp_path):
    np.savez(tmp_path / "x.npz", x=with_alpha(RGB))
    with pytest.warns(UserWarning, match="x.npz: the last channel is read as alpha"):
        found = read_array(tmp_path / "x.npz", FILES)
    np.testing.assert_array_equal(found, RGB)
    with pytest.warns(
        UserWarning, match="nothing below 0; the run's images were from -2"
    ):
        checked(UNIT, of_run(UNIT * 4 - 2), "x")
    with pytest.raises(UserError, match=r"\(3, 6, 5\): .*x.transpose\(1, 2, 0\)"):
        checked(RGB[:1].transpose(0, 3, 1, 2), FILES, "x", alone=True)


def test_the_range_is_kept_with_the_run():
    run, data = of_run(UNIT), configs.default().data
    assert spec_from_json(run.to_json(), data).inputs.pixels == run.inputs.pixels
    assert run.inputs.pixels == Pixels(scale="unit", low=0, high=1)
    plain = of_run(RGB).to_json()
    assert "pixels" not in plain and spec_from_json(plain, data).inputs.pixels is None


@pytest.mark.parametrize(
    ("then", "now", "differs"),
    [
        (of_run(RGB), of_run(RGB), False),
        (of_run(UNIT), of_run(UNIT), False),
        (spec(dtype="float32"), of_run(UNIT), False),
        (spec(dtype="float32"), of_run(UNIT * 4 - 2), False),
        (spec(dtype="float32"), of_run(RGB.astype(int)), True),
        (spec(dtype="float32"), of_run(HALVES), True),
        (of_run(UNIT), of_run(UNIT * 4 - 2), True),
    ],
)
def test_a_run_is_evaluated_on_data_that_are_read_alike(then, now, differs):
    plain = then.to_json()
    for names, other in (
        (["0", "1"], False),
        (["1.0", "0"], True),
        (["0.0", " 1"], False),
    ):
        if differs or other:
            with pytest.raises(
                UserError, match="here: the data are not read as the run"
            ):
                check_reads_alike(now, {**plain, "class_names": names}, "here")
        else:
            check_reads_alike(now, {**plain, "class_names": names}, "here")
    check_reads_alike(now, {}, "here")


@pytest.mark.parametrize(
    ("shape", "is_right"),
    [
        ((9, 8, 8), True), ((9, 8, 8, 1), True), ((9, 8, 8, 4), True),
        ((9, 3, 32, 3), True), ((9, 1, 28, 28), False), ((9, 3, 8, 4), False),
        ((9, 8, 3), False), ((9, 8, 8, 8), False), ((9, 8, 8, 0), False),
        ((9, 1, 8, 8, 3), False),
    ],
)  # fmt: skip
def test_axes(shape, is_right):
    assert (axes_problem(shape) is None) is is_right


def test_files_that_are_no_data_set_say_what_to_save(tmp_path):
    ragged = np.empty(2, object)
    ragged[:] = [RGB[0], RGB[1, :3]]
    np.savez(tmp_path / "ragged.npz", x=ragged, y=LABELS[:2])
    np.save(tmp_path / "x.npy", RGB)
    np.save(tmp_path / "objects.npy", ragged)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    np.savez(tmp_path / "splits.npz", x_train=RGB, x_test=RGB)
    objects = "array of Python objects, .*y.astype"
    for name, message in (
        ("ragged.npz", f"ragged.npz: 'x': an {objects}"),
        ("x.npy", "config.data.dir: .*x.npy: one array without labels; .*np.savez"),
        ("objects.npy", objects),
        ("junk.npz", "junk.npz: not an .npz file of plain arrays"),
    ):
        with pytest.raises(UserError, match=message):
            data_of(tmp_path / name)
    for name, message in (
        ("ragged.npz", objects),
        ("objects.npy", objects),
        ("junk.npz", "not an .npz file"),
        ("splits.npz", "no array 'x' in it, but x_train, x_test; .*np.savez"),
    ):
        with pytest.raises(UserError, match=message):
            read_array(tmp_path / name, FILES)
    np.testing.assert_array_equal(read_array(tmp_path / "x.npy", FILES), RGB)
    np.savez(tmp_path / "labelled.npz", x=RGB, y=ragged)
    np.testing.assert_array_equal(read_array(tmp_path / "labelled.npz", FILES), RGB)
