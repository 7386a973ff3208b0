import gzip
import itertools

import numpy as np
import pytest
from idx_files import write_idx
from PIL import Image

from finetune_jax import config as configs
from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.data.batches import evaluation_batches, training_batches
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry, fit
from finetune_jax.data.loading import load_source
from finetune_jax.data.sources.idx import read_idx
from finetune_jax.data.splits import named_splits, per_class, select, stratified_order

SPLITS = {"train": np.arange(100), "test": np.arange(100, 150)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train", range(100)),
        ("train[:80%]", range(80)),
        ("train[80%:]", range(80, 100)),
        ("train[-10%:]", range(90, 100)),
        ("train[-0%:]", range(100)),
        ("train[10:20]", range(10, 20)),
        ("train[-5:]", range(95, 100)),
        ("test[:33%]", range(100, 116)),
        ("train[:2]+test[:1]", (0, 1, 100)),
        (" train [ :2 ] + test[ 49 : ]", (0, 1, 149)),
    ],
)
def test_split_strings_are_those_of_tfds(text, wanted):
    assert select(SPLITS, text, "data.train").tolist() == list(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tran", "did you mean 'train'"),
        ("train[5:5]", "is empty; the splits hold train 100, test 50"),
        ("train[:0%]", "is empty"),
        ("train[:120%]", "120%"),
        ("train[", "not a split"),
        ("train[1]", "not a split"),
        ("train[a:b]", "not a split"),
        ("", "not a split"),
        ("train+", "not a split"),
        ("train+train[:3]", "names 3 examples twice"),
    ],
)
def test_wrong_split_strings_are_refused(text, message):
    with pytest.raises(UserError, match="data.train|split") as found:
        select(SPLITS, text, "data.train")
    assert message in str(found.value)


def test_every_stretch_of_a_stratified_order_has_the_classes_in_proportion():
    label = np.repeat([0, 1, 2], [100, 50, 10])
    order = stratified_order(label, seed=1)
    assert sorted(order) == list(range(160))
    for start, stop in ((0, 32), (32, 64), (48, 160), (80, 96)):
        counts = np.bincount(label[order[start:stop]], minlength=3)
        share = np.array([100, 50, 10]) * (stop - start) / 160
        assert np.abs(counts - share).max() <= 1
    assert (order != stratified_order(label, seed=2)).any()
    assert (order == stratified_order(label, seed=1)).all()


def test_a_source_without_splits_is_cut_into_three_that_share_nothing():
    label = np.repeat(np.arange(10), 20)
    splits = named_splits({"all": label}, seed=0)
    assert [len(splits[n]) for n in ("all", "train", "validation", "test")] == [
        200, 120, 40, 40,
    ]  # fmt: skip
    together = np.concatenate([splits[n] for n in ("train", "validation", "test")])
    assert (together == splits["all"]).all()
    refit = select(splits, "train+validation", "data.train")
    assert (refit == select(splits, "all[:80%]", "data.train")).all()


def test_per_class_draws_by_seed_and_refuses_more_than_there_are():
    label = np.repeat(np.arange(3), [5, 6, 7])
    chosen = per_class(np.arange(18), label, 5, seed=0)
    assert np.bincount(label[chosen]).tolist() == [5, 5, 5]
    assert (chosen != per_class(np.arange(18), label, 5, seed=1)).any()
    with pytest.raises(UserError, match="class 0 has only 5"):
        per_class(np.arange(18), label, 6, seed=0)


def data_config(**values):
    config = configs.default().data
    config.update(validation="validation", test="test", **values)
    return config


def digits(**values):
    return make_data(data_config(name="digits", **values), seed=0)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, bunch = digits(), load_digits()
    taken = data.train.take(np.arange(5))
    assert taken["inputs"].dtype == np.uint8 and taken["inputs"].shape == (5, 8, 8, 1)
    rows = data.train.indices[:5]
    grey = taken["inputs"][..., 0] / 255 * 16
    np.testing.assert_allclose(grey, bunch.images[rows], atol=0.04)
    assert (taken["label"] == bunch.target[rows]).all()
    assert data.spec.class_names == tuple("0123456789")
    assert len(data.train) == 1078 and not data.warnings


def test_iris_is_that_of_scikit_learn():
    from sklearn.datasets import load_iris

    data = make_data(data_config(name="iris"), seed=0)
    rows = data.train.indices
    np.testing.assert_allclose(
        data.train.take(np.arange(90))["inputs"], load_iris().data[rows], rtol=1e-6
    )
    assert np.bincount(data.train.label).tolist() == [30, 30, 30]


def test_images_are_resized_as_pillow_does_and_change_channels():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    wanted = Image.fromarray(image).resize((14, 14), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        fit(image, Geometry(shape=(14, 14, 3))), np.asarray(wanted)
    )
    grey = np.asarray(Image.fromarray(image).convert("L"), np.int32)
    assert (
        np.abs(
            fit(image, Geometry(shape=(9, 7, 1)))[..., 0].astype(np.int32) - grey
        ).max()
        <= 1
    )
    assert (fit(image[..., :1], Geometry(shape=(9, 7, 3))) == image[..., :1]).all()


def test_the_order_is_a_function_of_seed_and_position():
    data = digits(image_size=10).train
    options = dict(batch_size=64, updates=range(40))

    def labels(**changed):
        arguments = {"seed": 3, "micro_batches": 1, **options, **changed}
        return [b["label"].reshape(-1) for b in training_batches(data, **arguments)]

    whole = np.concatenate(labels())
    np.testing.assert_array_equal(
        np.concatenate(labels(updates=range(17, 40))), whole[17 * 64 :]
    )
    np.testing.assert_array_equal(np.concatenate(labels(micro_batches=4)), whole)
    np.testing.assert_array_equal(
        np.concatenate(labels(batch_size=32, updates=range(80))), whole
    )
    assert (np.concatenate(labels(seed=4)) != whole).any()
    epoch = len(data)
    for start in (0, epoch):
        counts = np.bincount(whole[start : start + epoch])
        assert (counts == np.bincount(data.label)).all()
    assert (whole[:epoch] != whole[epoch : 2 * epoch]).any()


def test_batches_are_full_and_hold_the_images_of_their_labels():
    data = digits().train
    batch = next(training_batches(
        data, seed=0, batch_size=8, micro_batches=2, updates=range(5, 6)
    ))  # fmt: skip
    assert batch["inputs"].shape == (2, 4, 8, 8, 1)
    assert batch["position"].reshape(-1).tolist() == list(range(8))
    everything = data.take(np.arange(len(data)))
    for image, label in zip(batch["inputs"].reshape(8, -1), batch["label"].reshape(-1)):
        same = (everything["inputs"].reshape(len(data), -1) == image).all(axis=1)
        assert label in everything["label"][same]


def test_evaluation_counts_every_example_once():
    data = digits().held_out["test"]
    batches = list(evaluation_batches(data, batch_size=100))
    assert [int(b["weight"].sum()) for b in batches] == [100, 100, 100, 59]
    assert {len(b["label"]) for b in batches} == {100}
    labels = np.concatenate([b["label"] for b in batches])
    assert (labels[: len(data)] == data.label).all()


def test_overlapping_splits_are_told():
    data = digits(train="train", image_size=8)
    assert data.warnings == ()
    config = data_config(name="digits", train="all[:90%]")
    found = make_data(config, seed=0).warnings
    assert found[0].startswith("data.train and data.test share 179 examples")


def idx_folder(folder, packed=True):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, size in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (size, 6, 5), np.uint8)
        labels = (np.arange(size) % 4).astype(np.uint8)
        suffix = ".gz" if packed else ""
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        arrays[prefix] = images, labels
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read(tmp_path, packed):
    arrays = idx_folder(tmp_path, packed)
    config = configs.default().data
    config.update(name="idx", dir=str(tmp_path), train="train[:75%]", test="test")
    data = make_data(config, seed=0)
    taken = data.held_out["test"].take(np.arange(20))
    assert (taken["inputs"][..., 0] == arrays["t10k"][0]).all()
    assert (taken["label"] == arrays["t10k"][1]).all()
    assert len(data.train) == 30 and data.spec.shape == (6, 5, 1)


def test_broken_idx_files_are_refused_by_name(tmp_path):
    with pytest.raises(DataMissing) as found:
        load_source("idx", str(tmp_path))
    assert str(found.value).count("ubyte or ") == 4
    idx_folder(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], "1216 bytes, but it has 1215"),
        (whole[:9], "cut short in its header"),
        (b"PNG" + whole, "not an IDX file"),
        (b"", "not an IDX file"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_idx(path)
    packed = tmp_path / "cut.gz"
    packed.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(packed)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_arrays_with_and_without_splits(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), np.arange(50) % 5
    source = load_source("arrays", npz(tmp_path / "a.npz", x=x, y=y))
    assert list(source.splits) == ["all"] and len(source.class_names) == 5
    names = np.array(["cat", "dog"])
    source = load_source("arrays", npz(
        tmp_path / "b.npz", x_train=x, y_train=names[y % 2], x_test=x, y_test=names[y % 2]
    ))  # fmt: skip
    assert list(source.splits) == ["train", "test"]
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2))}, "inputs only"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4, int)}, "3 inputs, 4 labels"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2, bool)}, "labels are bool"),
        ({"x": np.array([["a"]]), "y": np.zeros(1, int)}, "not numbers"),
        ({"x": np.array([[1.0], [np.nan]]), "y": np.zeros(2, int)}, "number 1"),
        ({"x": np.array([[1.0], [1e39]]), "y": np.zeros(2, int)}, "number 1"),
        ({"x": np.zeros((3, 2)), "y": np.array(["a", "", " "])}, "2 labels are blank"),
        ({"z": np.zeros(3)}, "'z' is neither"),
        ({}, "no inputs"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError) as found:
        load_source("arrays", npz(tmp_path / "a.npz", **arrays))
    assert message in str(found.value)


def test_files_that_are_no_arrays_are_refused_and_nothing_in_them_runs(tmp_path):
    path = tmp_path / "a.npz"
    for data in (b"", b"hello", b"PK\x03\x04 cut"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not an .npz file"):
            load_source("arrays", str(path))
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1, int))
    with pytest.raises(UserError, match="'x': an array of Python objects"):
        load_source("arrays", str(path))
    with pytest.raises(DataMissing, match="no file"):
        load_source("arrays", str(tmp_path / "none.npz"))


def test_wrong_data_is_refused(tmp_path):
    x, y = np.zeros((40, 4, 4, 1), np.uint8), np.repeat([0, 1], 20)
    arrays = npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    base = dict(name="arrays", dir=arrays, validation=None, test=None)
    for changed, message in (
        (dict(train="train[:50%]"), "1 of 2 classes have no training example: 1"),
        (dict(mean=(0.1, 0.2)), "2 numbers, but inputs have 1 channels"),
        (dict(name="digitz"), "did you mean 'digits'"),
        (dict(name="iris", image_size=4), "no images"),
        (dict(name="iris", augment=(("flip",),)), "no images"),
        (dict(per_class=30), "has only 20"),
        (dict(name="tfds"), "needs a name"),
    ):
        config = configs.default().data
        config.update({**base, **changed})
        with pytest.raises(UserError, match=message):
            make_data(config, seed=0)


def test_augmentations_do_what_they_say():
    import jax

    from finetune_jax.data.augmentation.steps import make_augment

    image = np.arange(36, dtype=np.float32).reshape(6, 6, 1)
    keys = jax.random.split(jax.random.key(0), 64)
    images = np.repeat(image[None], 64, axis=0)
    flipped = np.asarray(make_augment((("flip",),))(images, keys))
    kinds = [(f == image).all() for f in flipped]
    assert all(k or (f == image[:, ::-1]).all() for k, f in zip(kinds, flipped))
    assert 15 < sum(kinds) < 49
    shifted = np.asarray(make_augment((("pad_crop", 1),))(images, keys))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = [
        padded[i : i + 6, j : j + 6] for i, j in itertools.product(range(3), repeat=2)
    ]
    found = [[(s == w).all() for w in windows].index(True) for s in shifted]
    assert set(found) == set(range(9))
    for steps in ((("flop",),), (("flip", 1),), (("pad_crop", -1),)):
        with pytest.raises(UserError):
            make_augment(steps)
