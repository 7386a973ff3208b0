"""`configs/resnet_head.py:stanford_dogs`, on photos prepared by TFDS as the dogs are."""

import hashlib
import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from weight_files import REPOSITORY, empty_hub, published, renamed, shapes, write

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.pytrees import named
from finetune_jax.data.dataset import make_data
from finetune_jax.data.loading import load_source
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
ADDRESS = str(ROOT / "configs" / "resnet_head.py:stanford_dogs")
CLASSES = 120
TRAIN, TEST = 3 * CLASSES, CLASSES
LAYOUT = "torchvision or timm"


def photo(number):
    """Returns a small JPEG; sizes differ, as those of the dogs do."""
    rng = np.random.default_rng(number)
    size = (40 + number % 9, 50 - number % 7, 3)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def dogs(tmp_path_factory):
    """Returns a folder in which TFDS has prepared its data set, with other photos.

    Its own mock of data needs TensorFlow, to encode images, and knows no splits.
    """
    import tensorflow_datasets as tfds

    class Dogs(tfds.builder_cls("stanford_dogs"), skip_registration=True):
        def _split_generators(self, dl_manager):
            breeds = [f"n{2_085_620 + index:08}-breed" for index in range(CLASSES)]
            self.info.features["label"].names = breeds
            return {
                "train": self._photos(range(TRAIN)),
                "test": self._photos(range(TRAIN, TRAIN + TEST)),
            }

        def _photos(self, numbers):
            box = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=1.0)
            for number in numbers:
                yield (
                    f"{number}.jpg",
                    {
                        "image": io.BytesIO(photo(number)),
                        "image/filename": f"{number}.jpg",
                        "label": number % CLASSES,
                        "objects": [{"bbox": box}] * (number % 3),
                    },
                )

    Dogs.name = "stanford_dogs"
    folder = tmp_path_factory.mktemp("dogs")
    Dogs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def config(**overrides):
    found, problems = configs.resolve(configs.load(ADDRESS), list(overrides.items()))
    assert not problems
    return found


def plan(folder, capsys, *flags):
    """Returns what `--mode=plan` prints."""
    where = f"--config.data.dir={folder}"
    assert program.run(["--mode=plan", f"--config={ADDRESS}", where, *flags]) == 0
    return capsys.readouterr().out


def test_a_plan_needs_neither_photos_nor_weights(tmp_path, capsys, monkeypatch):
    empty_hub(tmp_path / "hub", monkeypatch)
    found = plan(tmp_path / "nothing", capsys)
    assert found.startswith("resnet50: 23,753,912 parameters in 7 stages")
    assert "input 224x224x3, 120 classes" in found
    # 2048 features and a bias for each class; nothing else learns.
    assert "245,880" in found and "50 epochs" in found and "hold" in found
    assert not list(tmp_path.iterdir())


def test_with_photos_a_plan_counts_updates(dogs, tmp_path, capsys, monkeypatch):
    empty_hub(tmp_path / "hub", monkeypatch)
    flags = ("--config.data.batch_size=4", "--config.parallel.devices=1")
    found = plan(dogs, capsys, *flags)
    # Nine tenths are for training: 324 photos, 81 updates an epoch.
    assert f"{50 * 81:,}" in found and "input 224x224x3, 120 classes" in found


def test_photos_become_what_the_weights_expect(dogs):
    found = config().replaced(data={"dir": str(dogs)})
    data = make_data(found.data, seed=0)
    assert data.spec.shape == data.spec.train_shape == (224, 224, 3)
    assert data.spec.dtype == "uint8" and len(data.spec.class_names) == CLASSES
    assert data.spec.class_names[0] == "n02085620-breed"
    sizes = {name: len(part) for name, part in data.held_out.items()}
    assert (len(data.train), sizes) == (324, {"validation": 36, "test": TEST})
    assert data.warnings == ()
    for part in (data.train, *data.held_out.values()):
        taken = part.take(np.arange(3))
        assert taken["inputs"].shape == (3, 224, 224, 3)
        # Read by many threads, and one by one.
        for row in range(3):
            one = part.take(np.array([row]))
            np.testing.assert_array_equal(one["inputs"][0], taken["inputs"][row])
            assert one["label"][0] == taken["label"][row]


def test_every_photo_arrives_once_with_its_label(dogs):
    source = load_source("tfds:stanford_dogs", str(dogs))
    for split, numbers in (
        ("train", range(TRAIN)),
        ("test", range(TRAIN, TRAIN + TEST)),
    ):
        part = source.splits[split]
        assert part.shape is None and len(part) == len(numbers)
        found = sorted(
            (_digest(part.read(index)), int(part.label[index]))
            for index in range(len(part))
        )
        wanted = sorted(
            (_digest(np.asarray(Image.open(io.BytesIO(photo(n))))), n % CLASSES)
            for n in numbers
        )
        assert found == wanted


def _digest(image):
    assert image.dtype == np.uint8 and image.shape[2] == 3
    content = f"{image.shape}".encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()


def test_weights_of_a_thousand_classes_get_a_head_of_120(tmp_path, monkeypatch):
    tensors = published(LAYOUT, "resnet50", classes=1000)
    assert tensors["fc.weight"].shape == (1000, 2048)
    snapshot = empty_hub(tmp_path, monkeypatch)()
    write(snapshot / "model.safetensors", tensors)
    init = config().init
    assert init.pretrained == f"hf:{REPOSITORY}"
    start = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 7, leaf.dtype), shapes("resnet50", CLASSES)
    )
    loaded = load_weights(start, read_weights(init.pretrained), fresh=init.fresh)
    by_name = named(loaded)
    head = {name for name in by_name if (by_name[name] == 7).all()}
    assert head == {"params/head/logits/kernel", "params/head/logits/bias"}
    assert by_name["params/head/logits/kernel"].shape == (2048, CLASSES)
    conv = tensors["layer3.5.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(by_name["params/stage3/block6/conv2/kernel"], conv)


def harmless(shape, name):
    """Returns a leaf with which features stay of one size through fifty layers."""
    if name.endswith(("scale", "var")):
        return np.ones(shape, np.float32)
    if not name.endswith("kernel"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng(len(name))
    scale = np.sqrt(2 / np.prod(shape[:-1]), dtype=np.float32)
    return rng.standard_normal(shape, np.float32) * scale


@pytest.mark.slow
def test_a_head_is_trained_on_photos_from_tfds_with_weights_from_the_hub(
    dogs, tmp_path, monkeypatch
):
    leaves = {
        name: harmless(leaf.shape, name)
        for name, leaf in named(shapes("resnet50", 1000)).items()
    }
    snapshot = empty_hub(tmp_path / "hub", monkeypatch)()
    write(snapshot / "model.safetensors", renamed(LAYOUT, leaves))
    workdir = tmp_path / "run"
    small = {
        "data.dir": dogs, "data.image_size": 32, "data.resize": 36,
        "data.batch_size": 4, "plan[0].epochs": None, "plan[0].steps": 2,
        "evaluate.every_epochs": None, "parallel.devices": 1, "report.every_steps": 1,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    assert program.run([f"--config={ADDRESS}", f"--workdir={workdir}", *flags]) == 0
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    for step in (0, 2):
        found = {key for line in lines if line["step"] == step for key in line}
        assert {"validation/accuracy", "test/accuracy"} <= found
    trained = read_weights(f"orbax:{workdir}").tensors
    assert trained.keys() == leaves.keys()
    moved = {n for n, value in trained.items() if not np.array_equal(value, leaves[n])}
    assert moved == {"params/head/logits/kernel", "params/head/logits/bias"}
    assert trained["params/head/logits/kernel"].shape == (2048, CLASSES)
    assert np.isfinite(trained["params/head/logits/kernel"]).all()
