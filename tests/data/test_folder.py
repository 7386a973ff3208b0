"""Photos in folders: which are found, how they are read, and what is refused."""

import numpy as np
import oracles
import pictures
import pytest
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, fit, read_image
from finetune_jax.data.loading import load_source


def data(root, **changes):
    config = configs.default().data
    config.update(name="folder", dir=str(root), image_size=16, **changes)
    return make_data(config, seed=0)


def test_classes_are_the_folders_and_splits_are_cut_by_class(tmp_path):
    pictures.make_folder(tmp_path, examples=10)
    (tmp_path / "red" / "more").mkdir()
    Image.fromarray(pictures.image((1, 2, 3))).save(tmp_path / "red" / "more" / "x.JPG")
    (tmp_path / "red" / ".hidden.txt").write_text("litter")
    (tmp_path / ".DS_Store").write_text("litter")
    found = data(tmp_path, validation="validation", test="test")
    assert found.spec.class_names == ("blue", "green", "red")
    assert found.spec.shape == (16, 16, 3)
    sizes = [len(found.train), *(len(part) for part in found.held_out.values())]
    assert sizes == [19, 6, 6]
    assert found.spec.train_counts in ((6, 6, 7), (6, 7, 6), (7, 6, 6))
    names = {found.train.name(place) for place in range(19)}
    assert len(names) == 19 and all(name.startswith(str(tmp_path)) for name in names)


@pytest.mark.parametrize("folders", [("train", "test"), ("train", "val", "test")])
def test_split_folders_are_splits(tmp_path, folders):
    pictures.make_folder(tmp_path, examples=2, splits=folders)
    source = load_source("folder", str(tmp_path))
    wanted = ["validation" if name == "val" else name for name in folders]
    assert sorted(source.splits) == sorted(wanted)
    found = data(tmp_path, test="test")
    assert len(found.train) == len(found.held_out["test"]) == 6


def test_the_inputs_are_the_images_with_their_labels(tmp_path):
    pictures.make_folder(tmp_path, examples=3)
    found = data(tmp_path, train="all")
    batch = found.train.take(np.arange(9))
    names = np.array(found.spec.class_names)[batch["label"]]
    for place, (values, name) in enumerate(zip(batch["inputs"], names)):
        assert f"/{name}/" in found.train.name(place)
        mean = values.reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(mean, pictures.COLOURS[name], atol=12)


def test_examples_in_memory_are_those_on_disk(tmp_path):
    found = data(pictures.make_folder(tmp_path), test="test")
    bytes_each = 16 * 16 * 3
    assert found.train.nbytes == len(found.train) * bytes_each
    kept = found.in_memory(24 * bytes_each)
    assert kept.train.decoded is not None and kept.train.nbytes == 0
    assert found.in_memory(24 * bytes_each - 1).train.decoded is None
    places = np.array([3, 1, 1, 7])
    for name, array in found.train.take(places).items():
        np.testing.assert_array_equal(kept.train.take(places)[name], array)


def test_the_fingerprint_changes_with_a_byte_and_with_a_name(tmp_path):
    pictures.make_folder(tmp_path, examples=2)
    before = data(tmp_path).fingerprint()
    path = tmp_path / "red" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    assert data(tmp_path).fingerprint() != before
    path.write_bytes(whole)
    assert data(tmp_path).fingerprint() == before
    path.rename(path.with_name("00.png"))
    assert data(tmp_path).fingerprint() != before


def test_everything_wrong_with_a_folder_is_named_at_once(tmp_path):
    pictures.make_folder(tmp_path, examples=2)
    (tmp_path / "stray.png").write_bytes(b"")
    (tmp_path / "red" / "notes.txt").write_text("hm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        data(tmp_path)
    for part in ("stray.png", "1 file not used: 1 .txt", "empty: no images"):
        assert part in str(error.value)


@pytest.mark.parametrize("classes", [(), ("red",)])
def test_a_folder_without_two_classes_is_refused(tmp_path, classes):
    pictures.make_folder(tmp_path, classes=classes)
    with pytest.raises(UserError, match="no folders with images|one class, 'red'"):
        data(tmp_path)


def test_a_folder_that_is_not_there_is_missing_data(tmp_path):
    for place in (None, str(tmp_path / "nowhere")):
        with pytest.raises(DataMissing, match="config.data.dir"):
            load_source("folder", place)


def test_a_folder_beside_the_splits_is_refused(tmp_path):
    pictures.make_folder(tmp_path, examples=2, splits=("train", "test", "extra"))
    with pytest.raises(UserError, match="extra: neither a split nor in one"):
        data(tmp_path)


def test_a_stretch_of_a_split_folder_has_all_classes(tmp_path):
    pictures.make_folder(tmp_path, examples=10, splits=("train", "test"))
    found = data(tmp_path, train="train[:80%]", validation="train[80%:]", test="test")
    assert found.spec.train_counts == (8, 8, 8)
    np.testing.assert_array_equal(np.bincount(found.held_out["validation"].label), 2)
    with pytest.raises(UserError, match=r"no split 'validation'.*train\[:80%\]"):
        data(tmp_path, validation="validation")


def test_splits_are_known_with_capitals_and_not_without_train(tmp_path):
    pictures.make_folder(tmp_path / "a", examples=2, splits=("Train", "Test"))
    assert set(load_source("folder", str(tmp_path / "a")).splits) == {"train", "test"}
    pictures.make_folder(tmp_path / "b", examples=2, splits=("val", "test"))
    with pytest.raises(UserError, match="none is train"):
        data(tmp_path / "b")


def test_an_image_too_thin_to_be_cut_is_named(tmp_path):
    pictures.make_folder(tmp_path, examples=2)
    thin = np.zeros((1, 5000, 3), np.uint8)
    Image.fromarray(thin).save(tmp_path / "red" / "thin.png")
    with pytest.raises(UserError, match="thin.png: 5000x1 pixels; too thin"):
        data(tmp_path, train="all", resize=16).in_memory(1e9)


def test_arrays_are_resized_and_cut_as_photos_are(tmp_path):
    values = np.stack(
        [pictures.image((90, 120, 30), seed, (16, 16)) for seed in (0, 1)]
    )
    np.savez(tmp_path / "x.npz", x=np.repeat(values, 8, 0), y=np.arange(16) % 2)
    config = configs.default().data
    config.update(name="arrays", dir=str(tmp_path / "x.npz"), train="all")
    config.update(image_size=16, resize=24)
    train = make_data(config, seed=0).train
    wanted = fit(values[0], Geometry(shape=(16, 16, 3), resize=24))
    found = train.take(np.flatnonzero(train.indices < 8)[:1])["inputs"][0]
    np.testing.assert_array_equal(found, wanted)


def test_links_in_circles_end(tmp_path):
    pictures.make_folder(tmp_path, examples=2)
    (tmp_path / "red" / "loop").symlink_to(tmp_path / "red")
    assert len(data(tmp_path, train="all").train) == 6


def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path):
    pictures.make_folder(tmp_path, examples=4, suffix=".jpg")
    whole = (tmp_path / "red" / "0.jpg").read_bytes()
    (tmp_path / "red" / "0.jpg").write_bytes(b"")
    (tmp_path / "red" / "1.jpg").write_bytes(b"no image at all")
    (tmp_path / "blue" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    found = data(tmp_path, train="all")
    with pytest.raises(UserError) as error:
        found.in_memory(1e9)
    text = str(error.value)
    assert "3 of 12 examples cannot be read" in text
    for part in ("red/0.jpg: an empty file", "red/1.jpg: not an image", "blue/2.jpg"):
        assert part in text


# --- One image ---


def saved(path, values, mode=None, **options):
    picture = Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def test_an_image_on_its_side_is_turned(tmp_path):
    values = pictures.image((90, 120, 30), size=(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    path = saved(tmp_path / "a.png", values, exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(values, k=-1))


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.arange(0, 65536, 17, np.uint16)[: 60 * 60].reshape(60, 60)
    path = saved(tmp_path / "a.png", values)
    np.testing.assert_array_equal(read_image(path)[..., 0], values >> 8)


def test_of_an_animation_the_first_image_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(read_image(path)[0, 0], (255, 0, 0))


def test_what_is_transparent_lies_on_white(tmp_path):
    values = np.zeros((4, 6, 4), np.uint8)
    values[:, :3] = (200, 10, 30, 255)
    values[:, 3:] = (1, 2, 3, 0)
    found = read_image(saved(tmp_path / "a.png", values))
    assert (found[:, :3] == (200, 10, 30)).all() and (found[:, 3:] == 255).all()


@pytest.mark.parametrize(
    "mode, suffix", [("P", ".png"), ("CMYK", ".jpg"), ("L", ".png")]
)
def test_other_modes_become_rgb_or_grey(tmp_path, mode, suffix):
    values = np.full((8, 9, 3), (204, 102, 51), np.uint8)
    found = read_image(saved(tmp_path / f"a{suffix}", values, mode, quality=95))
    assert found.shape == ((8, 9, 1) if mode == "L" else (8, 9, 3))
    wanted = 127 if mode == "L" else (204, 102, 51)  # 0.299 R + 0.587 G + 0.114 B.
    assert np.abs(found.astype(int) - wanted).max() <= (3 if mode == "CMYK" else 1)


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", np.ones((4, 4), np.float32))
    with pytest.raises(UserError, match="a.tif: floating-point pixels"):
        read_image(path)


def test_grey_levels_of_32_bits_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", np.full((4, 4), 60_000, np.int32))
    with pytest.raises(UserError, match="a.tif: grey levels of 32 bits"):
        read_image(path)


SIZES = [(40, 60), (61, 37), (33, 33), (24, 90)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize, size", [(32, 28), (28, 28), (70, 64)])
def test_resize_and_centre_crop_are_torchvisions(tmp_path, interpolation, resize, size):
    transforms = oracles.import_torchvision().transforms
    pipeline = transforms.Compose(
        [
            transforms.Resize(
                resize, transforms.InterpolationMode(interpolation), antialias=True
            ),
            transforms.CenterCrop(size),
        ]
    )
    geometry = Geometry(
        shape=(size, size, 3), resize=resize, interpolation=interpolation
    )
    for seed, shape in enumerate(SIZES):
        values = pictures.image((120, 90, 60), seed, shape)
        wanted = np.asarray(pipeline(Image.fromarray(values)))
        np.testing.assert_array_equal(fit(values, geometry), wanted)
        path = saved(tmp_path / "a.png", values)
        np.testing.assert_array_equal(read_image(path, geometry), wanted)
