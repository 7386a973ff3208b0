"""Predictions on files: the preprocessing of the run, and what becomes of bad files."""

import json
import os
import pathlib
import shutil

import numpy as np
import oracles
import pictures
import pytest
from PIL import Image
from predictions import predict, trained

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.errors import UserError
from finetune_jax.data import array_inputs
from finetune_jax.training.run import run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the workdir of a run whose data is gone."""
    folder = tmp_path_factory.mktemp("predict")
    photos = pictures.make_folder(folder / "photos")
    workdir = trained(folder / "run", photos, image_size=12, resize=14, steps=150)
    shutil.rmtree(photos)
    return workdir


@pytest.mark.slow
def test_every_photo_gets_a_line_and_the_colours_are_told_apart(finished, tmp_path):
    new = pictures.make_folder(tmp_path / "new", examples=4, suffix=".jpg")
    records = predict(finished, new, output=tmp_path / "out.jsonl")
    files = [record["file"] for record in records]
    assert files == sorted(str(path) for path in new.rglob("*.jpg"))
    assert {record["class"] for record in records} <= set(pictures.COLOURS)
    for record in records:
        shares = [entry["probability"] for entry in record["top"]]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)
        assert record["top"][0]["class"] == record["class"]
        assert abs(sum(shares) - 1) < 1e-6
    right = [pathlib.Path(r["file"]).parent.name == r["class"] for r in records]
    assert np.mean(right) > 0.6


def test_a_prediction_does_not_depend_on_what_else_is_predicted(finished, tmp_path):
    new = pictures.make_folder(tmp_path / "new", examples=9)
    together = predict(finished, new)
    alone = predict(finished, new / "red" / "3.png")
    same = next(r for r in together if r["file"] == alone[0]["file"])
    assert [e["class"] for e in same["top"]] == [e["class"] for e in alone[0]["top"]]
    for one, other in zip(same["top"], alone[0]["top"]):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_bad_files_are_named_and_the_others_predicted(finished, tmp_path):
    new = pictures.make_folder(tmp_path / "new", examples=3, suffix=".jpg")
    (new / "red" / "0.jpg").write_bytes(b"")
    whole = (new / "blue" / "1.jpg").read_bytes()
    (new / "blue" / "1.jpg").write_bytes(whole[:-200])
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError) as error:
        predict(finished, new, output=output)
    text = str(error.value)
    assert "red/0.jpg: an empty file" in text and "blue/1.jpg: cannot be read" in text
    assert f"The other 7 are in {output}" in text
    assert len(output.read_text().splitlines()) == 7


def test_inputs_that_are_not_there_are_all_named(finished, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError) as error:
        predict(finished, tmp_path / "nothing", tmp_path / "gone.png")
    assert "no images in" in str(error.value) and "gone.png" in str(error.value)
    with pytest.raises(UserError, match="a.txt: no image"):
        predict(finished, tmp_path / "a.txt")
    with pytest.raises(UserError, match="needs --inputs"):
        program.run(["--mode=predict", f"--workdir={finished}"])
    with pytest.raises(UserError, match="no folder"):
        output = tmp_path / "no" / "out.jsonl"
        predict(finished, pictures.make_folder(tmp_path / "new"), output=output)


def test_files_that_are_not_used_are_told_and_odd_names_predicted(
    finished, tmp_path, capsys
):
    new = pictures.make_folder(tmp_path / "new", examples=1)
    odd = new / os.fsdecode(b"caf\xe9 \xe2\x82\xac")
    Image.fromarray(pictures.image((200, 50, 40))).save(odd, "JPEG")
    (new / "red" / os.fsdecode(b"a.caf\xe9")).write_text("x")
    (new / "notes.txt").write_text("x")
    (new / "THUMBS.DB").write_text("x")
    records = predict(finished, new, output=tmp_path / os.fsdecode(b"\xe9.jsonl"))
    assert os.fsencode(odd) in [os.fsencode(record["file"]) for record in records]
    told = capsys.readouterr().out
    assert len(records) == 4 and "4 predictions in" in told
    assert "2 files not used" in told and "1 .txt" in told and "'THUMBS.DB'" in told
    told.encode("utf-8")


def test_inputs_and_output_may_name_variables(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEW", "new")
    pictures.make_folder(tmp_path / "new", examples=1)
    output = tmp_path / "out.jsonl"
    flags = ["--config.parallel.devices=1", "--output=~/out.jsonl", "--inputs"]
    program.run(["--mode=predict", f"--workdir={finished}", *flags, "~/$NEW"])
    assert len(output.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="--inputs: .*'NOPE' is not set"):
        program.run(["--mode=predict", f"--workdir={finished}", "--inputs", "$NOPE/a"])


def test_arrays_are_predicted_too(finished, tmp_path):
    values = np.stack(
        [pictures.image((200, 50, 40), seed, (12, 12)) for seed in (1, 2)]
    )
    np.save(tmp_path / "x.npy", values)
    records = predict(finished, tmp_path / "x.npy")
    assert [r["file"] for r in records] == [
        f"{tmp_path}/x.npy#0",
        f"{tmp_path}/x.npy#1",
    ]
    np.save(tmp_path / "x.npy", values.astype(np.float32))
    with pytest.raises(UserError, match="x.npy: float32, but the model takes uint8"):
        predict(finished, tmp_path / "x.npy")


def test_chunks_and_arrays_of_any_length_share_a_program(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(array_inputs, "CHUNK", 5)
    new = pictures.make_folder(tmp_path / "new", examples=6)
    assert len(predict(finished, new)) == 18
    for rows in (20, 3):
        values = [pictures.image((90, 9, 9), row, (12, 12)) for row in range(rows)]
        np.save(tmp_path / f"x{rows}.npy", np.stack(values))
    assert len(predict(finished, tmp_path / "x20.npy", tmp_path / "x3.npy")) == 23


def test_an_output_that_is_no_plain_file_is_refused(finished, tmp_path):
    new = pictures.make_folder(tmp_path / "new", examples=1)
    with pytest.raises(UserError, match="not a plain file"):
        predict(finished, new, output=tmp_path)
    target = tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(target)
    assert len(predict(finished, new, output=tmp_path / "link.jsonl")) == 3
    assert (tmp_path / "link.jsonl").is_symlink() and target.is_file()


def test_predicting_leaves_an_unfinished_save_alone(finished, tmp_path):
    unfinished = finished / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    predict(finished, pictures.make_folder(tmp_path / "new", examples=1))
    assert unfinished.is_dir()
    unfinished.rmdir()


def test_flags_that_the_mode_does_not_read_are_refused(finished):
    flags = ["--mode=predict", f"--workdir={finished}", "--inputs", "x"]
    with pytest.raises(UserError, match="--mode=predict uses the config of the run"):
        program.run([*flags, "--config.data.mean=(0.9,)"])
    with pytest.raises(UserError, match="reads the config of the workdir"):
        program.run([*flags, "--config=configs/resnet_head.py"])
    with pytest.raises(UserError, match="--output: only --mode=predict"):
        program.run(["--mode=plan", "--output=x", "--config=configs/resnet_head.py"])


def test_a_damaged_manifest_is_told(finished):
    path = finished / "manifest.json"
    whole = json.loads(path.read_text())
    for key, value in (("shape", "abc"), ("dtype", "uint77"), ("class_names", None)):
        path.write_text(json.dumps({**whole, "data": {**whole["data"], key: value}}))
        with pytest.raises(UserError, match="manifest.json does not describe"):
            predict(finished, finished)
    path.write_text(json.dumps(whole))


@pytest.mark.slow
def test_a_run_of_feature_vectors_predicts_arrays(tmp_path):
    config, problems = configs.resolve(
        configs.load(str(ROOT / "configs" / "iris_mlp.py:tiny")),
        [("parallel.devices", "1")],
    )
    assert not problems
    run(config, tmp_path / "run")
    np.savez(tmp_path / "x.npz", x=np.ones((5, 4)))
    assert len(predict(tmp_path / "run", tmp_path / "x.npz")) == 5
    Image.fromarray(pictures.image((1, 2, 3))).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png: no array"):
        predict(tmp_path / "run", tmp_path / "x.png")


@pytest.mark.slow
def test_probabilities_on_photos_are_those_of_torchs_pipeline(testdata, tmp_path):
    torchvision = oracles.import_torchvision()
    import torch
    from oracle_models import randomised

    network = randomised(torchvision.models.resnet18(num_classes=5))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    photos = tmp_path / "photos"
    for folder in sorted((pathlib.Path(testdata) / "flowers").iterdir()):
        (photos / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:12]:
            shutil.copy(path, photos / folder.name)
    workdir = trained(
        tmp_path / "run", photos, model="resnet18", steps=1, image_size=96,
        pretrained=f"file:{tmp_path / 'weights.pth'}", resize=112,
        interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    records = predict(workdir, photos)
    assert len(records) == 60
    transforms = torchvision.transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    pipeline = transforms.Compose(
        [
            transforms.Resize(112, bicubic, antialias=True),
            transforms.CenterCrop(96),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    names = sorted(path.name for path in photos.iterdir())
    for record in records:
        image = pipeline(Image.open(record["file"]).convert("RGB"))
        with torch.no_grad():
            wanted = torch.softmax(network(image[None]), dim=-1)[0].numpy()
        found = {e["class"]: e["probability"] for e in record["top"]}
        ours = np.array([found[name] for name in names])
        assert np.abs(ours - wanted).max() <= 1e-3
