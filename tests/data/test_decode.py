"""Training photos decoded at reduced scale: close to the whole ones, and only they."""

import io
import pathlib
import random

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, read_image

# Grey levels, mean over the image. What differs is the filter: the decoder's averages
# blocks of pixels, that of resizing is a triangle twice as wide. 1.3 to 4.3 were measured
# on the photos below; a place that is wrong by one pixel makes more than twice as much.
CLOSE = 5.0


def both(file, **geometry):
    """Returns the image decoded exactly and fast, int64 [H, W, C]."""
    return [
        read_image(file, Geometry(decode=decode, **geometry)).astype(int)
        for decode in ("exact", "fast")
    ]


def jpeg(values, mode="RGB", orientation=1, **options):
    """Returns the bytes of a JPEG of an array [H, W, 3]."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image = Image.fromarray(values).convert(mode)
    image.save(file, "JPEG", quality=95, exif=exif, **options)
    return file.getvalue()


@pytest.fixture
def decoded(monkeypatch):
    """Returns a list that gets the size of every image that is resized."""
    sizes, resize = [], Image.Image.resize

    def record(self, *arguments):
        sizes.append(self.size)
        return resize(self, *arguments)

    monkeypatch.setattr(Image.Image, "resize", record)
    return sizes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize(
    "resize, size, scale", [(53, 48, 8), (106, 96, 4), (213, 192, 2), (214, 192, 1)]
)
def test_photos_at_reduced_scale_are_close(
    decoded, photo, interpolation, resize, size, scale
):
    geometry = dict(shape=(size, size, 3), resize=resize, interpolation=interpolation)
    exact, fast = both(jpeg(load_sample_image(photo)), **geometry)
    assert decoded == [(640, 427), (-(-640 // scale), -(-427 // scale))]
    off = np.abs(fast - exact).mean()
    moved = np.abs(exact[:, 1:] - exact[:, :-1]).mean()
    assert off < min(CLOSE, moved / 2)
    # Only what is cut out is resized, from places that are rounded to float32.
    assert (off > 0.1) == (scale > 1) and (scale > 1 or np.abs(fast - exact).max() <= 1)


def test_real_photos_at_reduced_scale_are_close(testdata):
    paths = sorted(pathlib.Path(testdata, "flowers").glob("*/*.jpg"))
    for size in (32, 64):
        for path in random.Random(0).sample(paths, 60):
            exact, fast = both(path, shape=(size, size, 3))
            assert 0 < np.abs(fast - exact).mean() < CLOSE


@pytest.mark.parametrize("shape, resize", [((40, 40, 3), 50), ((30, 48, 3), None)])
@pytest.mark.parametrize("width, height", [(413, 205), (205, 413), (398, 401)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_right(decoded, orientation, width, height, shape, resize):
    """Slopes tell places apart by a fraction of a pixel, at edges cut off by blocks too."""
    down, right = np.mgrid[:height, :width]
    values = np.stack([down / height, right / width, (down + right) % 64 / 128], -1)
    file = jpeg((255 * values).astype(np.uint8), orientation=orientation)
    exact, fast = both(file, shape=shape, resize=resize)
    least = max(shape[:2]) if resize is None else resize
    assert least <= min(decoded[1]) and max(decoded[1]) < max(width, height) / 2
    assert np.abs(fast - exact)[..., :2].max() <= 2


def test_what_is_decoded_is_never_smaller_than_what_is_wanted(decoded):
    draw = random.Random(0)
    for _ in range(60):
        width, height = draw.randint(8, 300), draw.randint(8, 300)
        resize = draw.randint(8, 100)
        file = jpeg(np.zeros((height, width, 3), np.uint8))
        fast = Geometry(shape=(8, 8, 3), resize=resize, decode="fast")
        read_image(file, fast)
        wanted, found = fast.size_of(width, height), decoded.pop()
        for whole, least, is_now in zip((width, height), wanted, found):
            assert is_now == whole or is_now >= least
        factors = [whole // least for whole, least in zip((width, height), wanted)]
        assert (found == (width, height)) == (min(factors) < 2)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_kinds_of_jpeg_keep_their_colours(mode, progressive, channels):
    file = jpeg(load_sample_image("china.jpg"), mode, progressive=progressive)
    exact, fast = both(file, shape=(96, 96, channels), resize=100)
    assert exact.shape == fast.shape == (96, 96, channels)
    assert 0 < np.abs(fast - exact).mean() < CLOSE
    assert mode == "CMYK" or channels == 1 or (np.ptp(fast, axis=-1) == 0).all()


def test_a_file_that_is_cut_short_is_refused_at_any_scale():
    whole = jpeg(load_sample_image("china.jpg"))
    for decode in ("exact", "fast"):
        geometry = Geometry(shape=(32, 32, 3), decode=decode)
        with pytest.raises(UserError, match="number 3: cannot be read"):
            read_image(whole[: len(whole) // 2], geometry, name="number 3")


def photos(root):
    """Returns a config of a folder of two classes of large photos."""
    for name in ("china", "flower"):
        values = load_sample_image(f"{name}.jpg")
        (root / name).mkdir()
        for number in range(6):
            part = values[number * 4 :, number * 8 :]
            (root / name / f"{number}.jpg").write_bytes(jpeg(part))
    config = configs.default().data
    config.update(name="folder", dir=str(root), image_size=48, resize=64)
    config.update(validation="validation", test="test")
    return config


def test_only_training_photos_are_decoded_at_reduced_scale(tmp_path, decoded):
    config, taken = photos(tmp_path), {}
    assert config.decode == "fast"
    for config.decode in ("fast", "exact"):
        data = make_data(config, seed=0)
        for name, part in {"train": data.train, **data.held_out}.items():
            decoded.clear()
            taken[config.decode, name] = part.take(np.arange(len(part)))["inputs"]
            is_reduced = (config.decode, name) == ("fast", "train")
            assert all((size[0] < 640 / 2) == is_reduced for size in decoded)
            for place, values in enumerate(taken[config.decode, name]):
                image = Image.open(part.name(place))
                long = int(64 * image.width / image.height)
                wanted = image.resize((long, 64), Image.Resampling.BILINEAR)
                left = round((long - 48) / 2)
                wanted = np.asarray(wanted.crop((left, 8, left + 48, 56)), int)
                off = np.abs(values - wanted).mean()
                assert 0 < off < CLOSE if is_reduced else off == 0


def test_tables_of_photos_decoded_otherwise_are_others(tmp_path):
    config, found = photos(tmp_path), {}
    for config.decode in ("fast", "exact"):
        data = make_data(config, seed=0)
        found[config.decode] = (
            data.train.about,
            data.held_out["test"].about,
        )
    assert found["fast"][0] != found["exact"][0]
    assert found["fast"][1] == found["exact"][1]


def test_a_way_to_decode_that_there_is_not_is_refused():
    _, problems = configs.resolve(configs.default(), [("data.decode", "fasst")])
    assert list(map(str, problems)) == [
        "config.data.decode: 'fasst' is not one of ('fast', 'exact'); did you mean 'fast'?"
    ]
