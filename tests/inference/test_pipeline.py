"""A notebook's pipeline says what `--mode=predict` writes."""

import json
import pathlib
import shutil

import numpy as np
import pictures
import pytest
from PIL import Image
from predictions import predict, trained

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.core.errors import UserError
from finetune_jax.pipeline import pipeline
from finetune_jax.training.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the workdir of a run whose data is gone."""
    folder = tmp_path_factory.mktemp("pipeline")
    photos = pictures.make_folder(folder / "photos")
    data = {"image_size": 12, "resize": 14}
    workdir = trained(folder / "run", photos, model="mlp", steps=2, **data)
    shutil.rmtree(photos)
    return workdir


def assert_same(found, wanted):
    assert [set(record) for record in found] == [set(record) for record in wanted]
    for one, other in zip(found, wanted):
        assert one["class"] == other["class"]
        for ours, theirs in zip(one["top"], other["top"]):
            assert ours["class"] == theirs["class"]
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-6)


def test_records_are_those_that_predict_writes(finished, tmp_path):
    new = pictures.make_folder(tmp_path / "new", examples=3, suffix=".jpg")
    records = predict(finished, new)
    files = [record.pop("file") for record in records]
    classify = pipeline(finished, devices=1)
    assert_same(classify(files), records)
    assert_same([classify(files[0])], records[:1])
    assert_same([classify(Image.open(files[1]))], records[1:2])
    opened = [np.asarray(Image.open(file)) for file in files]
    assert_same(classify([*opened[:2], files[2], Image.open(files[3])]), records[:4])
    assert json.dumps(classify(opened[0]))


def test_arrays_give_what_predict_writes_of_them(finished, tmp_path):
    images = np.stack([pictures.image((200, 50, 40), n, (12, 12)) for n in range(3)])
    np.save(tmp_path / "x.npy", images)
    records = predict(finished, tmp_path / "x.npy")
    for record in records:
        del record["file"]
    classify = pipeline(finished, devices=1, top_k=3)
    assert_same(classify(images), records)
    assert_same([classify(images[1])], records[1:2])


def test_images_of_more_bits_than_they_need(finished, tmp_path):
    classify = pipeline(finished, devices=1)
    grey = pictures.image((200, 50, 40), 1, (12, 12))[..., 0]
    wanted = classify(Image.fromarray(grey))
    wide = [
        Image.fromarray(grey.astype(np.uint16)),
        Image.fromarray(grey.astype(np.int32)),
    ]
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a.png")
    wide.append(Image.open(tmp_path / "a.png"))
    for image in wide:
        with pytest.raises(UserError, match=r"input 1: mode I.*astype\('uint8'\)"):
            classify([Image.fromarray(grey), image])
        assert classify(Image.fromarray(np.asarray(image).astype("uint8"))) == wanted
    for kind in (np.uint16, np.int32):
        image = Image.fromarray(grey.astype(kind) * 16)
        with pytest.warns(UserWarning, match="inputs: 1 image of 16 bits.*12 bits"):
            classify(image)
        bright = Image.fromarray(grey.astype(kind) * 257 | 2**15)
        assert classify([bright])[0]["top"]
    with pytest.warns(UserWarning, match="8 bits"):
        classify(tmp_path / "a.png")
    with pytest.raises(UserError, match="int64, but the model takes uint8.*1 is white"):
        classify((grey > 99).astype(int)[..., None].repeat(3, 2))


@pytest.mark.slow
def test_pipelines_of_other_precisions_do_not_disturb_one_another(tmp_path):
    for precision in ("float32", "float64"):
        arguments = (f"--workdir={tmp_path / precision}", "--config.parallel.devices=1")
        config = (
            f"--config={pathlib.Path(__file__).parents[2]}/configs/iris_mlp.py:tiny"
        )
        main.run([config, *arguments, f"--config.precision={precision}"])
    flower = np.array([5.1, 3.5, 1.4, 0.2], np.float32)
    alone = pipeline(tmp_path / "float32", devices=1)
    wanted, two = alone(flower), alone(np.stack([flower, flower]))
    single, double = (pipeline(tmp_path / p, devices=1) for p in ("float32", "float64"))
    assert single(flower) == wanted
    probability = double(flower)["top"][0]["probability"]
    assert float(np.float32(probability)) != probability
    assert single(np.stack([flower, flower])) == two


def test_what_it_does_not_take_is_named(finished, tmp_path):
    classify = pipeline(finished, devices=1)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        classify([tmp_path / "bad.png", tmp_path / "gone.png"])
    assert "bad.png: not an image" in str(error.value) and "gone.png" in str(
        error.value
    )
    with pytest.raises(UserError, match="input 1: 3 .int."):
        classify([tmp_path / "bad.png", 3])
    with pytest.raises(UserError, match="float32, but the model takes uint8"):
        classify(np.zeros((12, 12, 3), np.float32))
    with pytest.raises(UserError, match="pipeline: no topk"):
        pipeline(finished, topk=2)
    with pytest.raises(UserError, match="holds no run"):
        pipeline(tmp_path)


@pytest.mark.slow
def test_feature_vectors(tmp_path):
    given = configs.load("configs/iris_mlp.py:tiny")
    config, problems = configs.resolve(given, [("parallel.devices", "1")])
    assert not problems
    run(config, tmp_path / "run")
    classify = pipeline(tmp_path / "run")
    together = classify(np.ones((5, 4), np.float32))
    assert len(together) == 5
    assert_same([classify(np.ones(4))], together[:1])
    with pytest.raises(UserError, match="takes arrays"):
        classify("photo.jpg")
