"""Segmentation from masks in files to masks that are predicted."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.data.augmentation.masks import IGNORED, make_mask_augment
from finetune_jax.data.augmentation.steps import make_augment, random_box
from finetune_jax.data.dataset import make_data
from finetune_jax.data.images.decoding import Geometry
from finetune_jax.data.images.mask_files import fit_mask, unfitted
from finetune_jax.data.loading import load_source
from finetune_jax.data.preprocessing import array_spec
from finetune_jax.data.spec import DataSpec
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.models.fully_convolutional import as_maps, enlarged
from finetune_jax.models.modes import EVALUATION
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.tasks.task import StepContext
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

CLASSES = ("field", "road", "house")


def task(*overrides, model="cnn", size=8, channels=1, classes=CLASSES, **arguments):
    """Returns the task of a small model, or of another one."""
    given = configs.default()
    given.task.name = "segmentation"
    given.model.name = model
    if model == "cnn":
        arguments = {"convolutions": (4,), "dense": (), **arguments}
    for name, value in arguments.items():
        given.model[name] = value
    resolved, problems = configs.resolve(given, overrides)
    assert not problems, problems
    shape = size, size, channels
    spec = DataSpec(
        kind="images", shape=shape, train_shape=shape, dtype="uint8",
        inputs=array_spec(resolved.data), pixel_classes=classes,
        train_counts=(9,), augment=resolved.data.augment,
    )  # fmt: skip
    return small.task_of(resolved, spec)


def batch(examples=4, size=8, classes=3, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, classes, (examples, size, size), np.uint8)
    mask[rng.random(mask.shape) < 0.2] = IGNORED
    return {
        "inputs": rng.integers(0, 256, (examples, size, size, channels), np.uint8),
        "mask": mask,
        "label": np.zeros(examples, np.int32),
        "weight": np.ones(examples, np.float32),
        "position": np.arange(examples, dtype=np.int32),
    }


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0)])
def test_the_loss_and_its_gradient_are_torchs(weights):
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        found = task(("task.class_weights", str(weights)), ("precision", "float64"))
        given, rng = batch(), np.random.default_rng(1)
        logits = rng.normal(size=(*given["mask"].shape, 3))

        def loss(logits):
            batch = {name: jnp.asarray(array) for name, array in given.items()}
            loss = found.target.loss(logits, batch)
            return loss.total / loss.weight

        value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    wanted = torch.tensor(logits, requires_grad=True)
    oracle = torch.nn.functional.cross_entropy(
        wanted.permute(0, 3, 1, 2),
        torch.tensor(given["mask"].astype(np.int64)),
        weight=torch.tensor(weights, dtype=torch.float64) if weights else None,
        ignore_index=IGNORED,
    )
    oracle.backward()
    assert float(value) == pytest.approx(oracle.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, wanted.grad, rtol=1e-10, atol=1e-15)


@pytest.mark.slow
def test_metrics_are_scikit_learns_over_all_pixels_of_uneven_batches():
    found, whole = task(), batch(7)
    whole["mask"][whole["mask"] == 2] = 0  # One class does not occur.
    params, stats = jax.jit(found.init)(jax.random.key(3))
    parts = []
    for rows in (slice(0, 5), slice(5, 7)):
        part = {name: array[rows] for name, array in whole.items()}
        step = functools.partial(eval_step, task=found)
        parts.append(jax.jit(step)(params, stats, part))
    outputs = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    measured = found.metrics(outputs, {})
    counted = whole["mask"] != IGNORED
    true, predicted = whole["mask"][counted], outputs["prediction"][counted]
    iou = jaccard_score(true, predicted, labels=[0, 1, 2], average=None)
    assert [measured[f"iou_{name}"] for name in CLASSES[:2]] == pytest.approx(iou[:2])
    assert measured["mean_iou"] == pytest.approx(
        jaccard_score(true, predicted, average="macro")
    )
    matrix = confusion_matrix(true, predicted)
    assert measured["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert set(measured) == {
        "mean_iou", "pixel_accuracy", "loss", *(f"iou_{name}" for name in CLASSES)
    }  # fmt: skip

    @jax.jit
    def trained():
        prepared = found.prepare(whole, jax.random.key(0), EVALUATION)
        context = StepContext(mode=EVALUATION)
        return found.loss(small.variables(params, stats), prepared, context)

    loss = trained()
    wanted = float(loss.total / loss.weight)
    assert measured["loss"] == pytest.approx(wanted, rel=1e-6)


def test_an_update_of_ignored_pixels_changes_nothing():
    found = task()
    trainer = small.Trainer(found, Phase(name="all", steps=1, optimizer="sgd"))
    given = {name: array[None] for name, array in batch().items()}
    given["mask"][:] = IGNORED
    before = jax.device_get(trainer.state.params)
    metrics = trainer.update(given)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    for name, leaf in named(trainer.state.params).items():
        np.testing.assert_array_equal(leaf, named(before)[name])


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_scores_are_enlarged_as_by_torch(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size, mode="bilinear"
    )
    found = enlarged(jnp.asarray(x), size)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_tokens_become_maps_with_a_class_token_or_without():
    maps = np.arange(2 * 6 * 3).reshape(2, 2, 3, 3)
    tokens = maps.reshape(2, 6, 3)
    np.testing.assert_array_equal(as_maps(tokens, (8, 12)), maps)
    with_token = np.concatenate([np.zeros_like(tokens[:, :1]), tokens], axis=1)
    np.testing.assert_array_equal(as_maps(with_token, (8, 12)), maps)
    with pytest.raises(UserError, match="a token for each patch of the image .8x12"):
        as_maps(tokens[:, :4], (8, 12))


@pytest.mark.parametrize(
    "steps", [("flip",), (("pad_crop", 3),), ("random_crop", "flip")]
)
def test_a_mask_moves_as_its_image_does(steps):
    size, keys = (8, 8), jax.random.split(jax.random.key(0), 16)
    mask = np.random.default_rng(0).integers(1, 4, (16, 11, 11), np.uint8)
    if steps[0] != "random_crop":
        mask = mask[:, :8, :8]
    image = mask[..., None].astype(np.float32)
    moved = np.asarray(make_augment(steps, size)(image, keys))[..., 0]
    found = np.asarray(make_mask_augment(steps, size)(mask, keys))
    assert found.dtype == np.uint8 and (found != mask[:, :8, :8]).any()
    # Black comes in where nothing is known of the class.
    np.testing.assert_array_equal(np.where(found == IGNORED, 0, found), moved)


@pytest.mark.slow
def test_a_mask_is_cropped_and_resized_as_its_image_by_nearest_neighbours():
    steps, size = (("random_resized_crop", 0.3),), (8, 4)
    mask = np.random.default_rng(0).integers(0, 250, (8, 13, 11), np.uint8)
    keys = jax.random.split(jax.random.key(0), len(mask))
    found = np.asarray(make_mask_augment(steps, size)(mask, keys))
    boxes = jax.vmap(lambda key: random_box(jax.random.fold_in(key, 0), (13, 11), 0.3))
    for row, (corner, sides) in enumerate(zip(*map(np.asarray, boxes(keys)))):
        (top, left), (height, width) = corner.tolist(), sides.tolist()
        part = Image.fromarray(mask[row]).crop((left, top, left + width, top + height))
        wanted = part.resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(found[row], np.asarray(wanted))


def test_masks_are_fitted_as_torchvision_does_and_back():
    oracles.import_torchvision()
    from torchvision.transforms import functional

    mask = np.random.default_rng(0).integers(0, 5, (20, 33), np.uint8)
    image, mode = Image.fromarray(mask), functional.InterpolationMode.NEAREST
    cut = functional.center_crop(functional.resize(image, [12], mode), [8, 10])
    geometry = Geometry(shape=(8, 10, 1), resize=12)
    fitted = fit_mask(mask, geometry)
    np.testing.assert_array_equal(fitted, np.asarray(cut))
    back = unfitted(fitted, geometry, (33, 20))
    assert back.shape == mask.shape and (back[:, 0] == IGNORED).all()
    np.testing.assert_array_equal(fit_mask(back, geometry), fitted)
    stretched = Geometry(shape=(40, 66, 1))
    back = unfitted(fit_mask(mask, stretched), stretched, (33, 20))
    np.testing.assert_array_equal(back, mask)


def write_pair(root, name, size=(12, 10), *, mask_size=None, kind="L", value=None):
    """Writes an image and its mask, and returns the mask."""
    rng = np.random.default_rng(len(name))
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    mask = rng.integers(0, 3, (mask_size or size)[::-1], np.uint8)
    mask[0, 0] = IGNORED
    if value is not None:
        mask[:] = value
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = [(0, 0, 0), (128, 64, 128), (70, 70, 70)]
    colours[IGNORED] = 255
    image = Image.fromarray(colours[mask] if kind == "RGB" else mask)
    if kind == "P":
        image.putpalette(colours.tobytes())
    image.save(root / "masks" / f"{name}.png")
    return mask


def write_folder(root, examples=12, **kinds):
    """Writes a folder of images and masks that fit."""
    rows = ["field,0,0,0", "road,128,64,128", "house,70,70,70", "ignored,255,255,255"]
    for index in range(examples):
        write_pair(root, "x" * (index + 1), **kinds)
    (root / "classes.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("kind", ["L", "P", "RGB"])
def test_a_mask_is_read_whatever_its_png_is_like(tmp_path, kind):
    mask = write_pair(tmp_path, "a", kind=kind)
    (tmp_path / "classes.csv").write_text(
        "field,0,0,0\nroad,128,64,128\nhouse,70,70,70\nignored,255,255,255\n"
    )
    source = load_source("masks", str(tmp_path))
    assert source.pixel_classes == CLASSES
    found = source.splits["all"].read(0)
    np.testing.assert_array_equal(found[..., 3], mask)
    np.testing.assert_array_equal(
        found[..., :3], np.asarray(Image.open(tmp_path / "images" / "a.png"))
    )


def data_config(folder, *overrides):
    given = configs.default()
    given.task.name = "segmentation"
    given.data.update(name="masks", dir=str(folder), image_size=8, batch_size=4)
    given.data.update(validation="validation", test="test")
    given.model.update(name="cnn")
    given.model.convolutions, given.model.dense = (4, 4), ()
    given.plan = as_config((Phase(name="all", steps=6, peak_lr=1e-2),))
    given.evaluate.update(every_steps=3, batch_size=2)
    resolved, problems = configs.resolve(given, [("parallel.devices", "1"), *overrides])
    assert not problems, problems
    return resolved


def test_splits_have_masks_and_are_the_same_decoded_before_or_when_taken(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split, 3)
    write_folder(tmp_path, 0)
    config = data_config(tmp_path, ("data.test", "None"))
    data = make_data(config.data, seed=0)
    assert data.spec.pixel_classes == CLASSES and data.spec.train_examples == 3
    lazy = data.train.take(np.array([2, 0]))
    assert lazy["inputs"].shape == (2, 8, 8, 3) and lazy["mask"].shape == (2, 8, 8)
    kept = data.in_memory(1e9).train.take(np.array([2, 0]))
    assert set(lazy) == set(kept) == {"inputs", "mask", "label", "weight"}
    for name in lazy:
        np.testing.assert_array_equal(lazy[name], kept[name])


def test_files_that_do_not_match_are_named_all_at_once(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "images" / "x.png").unlink()
    (tmp_path / "masks" / "xx.png").unlink()
    (tmp_path / "masks" / "note.txt").touch()
    (tmp_path / "classes.csv").write_text("road,1,2\nroad\n")
    with pytest.raises(UserError) as refused:
        load_source("masks", str(tmp_path))
    for message in (
        "masks/x.png: no image", "images/xx.png: no mask", "1 file not used: 1 .txt",
        "line 1: ['road', '1', '2']; a name and three bytes", "line 2: 'road' twice",
        "no image that has a mask",
    ):  # fmt: skip
        assert message in str(refused.value)
    (tmp_path / "classes.csv").unlink()
    with pytest.raises(UserError, match="it names the classes, a row each"):
        load_source("masks", str(tmp_path))


def test_masks_that_cannot_be_used_are_named_all_at_once(tmp_path):
    write_folder(tmp_path, 1)
    write_pair(tmp_path, "small", mask_size=(11, 10))
    write_pair(tmp_path, "beyond", value=7)
    write_pair(tmp_path, "nothing", value=IGNORED)
    write_pair(tmp_path, "text")
    (tmp_path / "masks" / "text.png").write_text("text")
    write_pair(tmp_path, "other", value=0, kind="RGB")
    Image.new("RGB", (12, 10), (1, 2, 3)).save(tmp_path / "masks" / "other.png")
    write_pair(tmp_path, "photo")
    Image.new("L", (12, 10)).save(tmp_path / "masks" / "photo.png", format="jpeg")
    config = data_config(tmp_path, ("data.train", "all"), ("data.validation", "None"))
    data = make_data({**config.data, "test": None}, seed=0)
    with pytest.raises(UserError) as refused:
        data.in_memory(1e9)
    for message in (
        "6 of 7 examples", "small.png: 11x10 pixels, but its image", "has 12x10",
        "beyond.png: indices 7, but there are 3 classes", "all pixels are ignored",
        "text.png: cannot be read", "colours that no class has: (1, 2, 3)",
        "photo.png: a mask in the format JPEG",
    ):  # fmt: skip
        assert message in str(refused.value)


def test_scenes_have_the_objects_of_their_split_and_their_masks():
    source, digits = load_source("scenes:digits", None), load_source("digits", None)
    sizes = {split: len(part) for split, part in source.splits.items()}
    assert sizes == {"train": 1078, "validation": 360, "test": 359}
    assert source.pixel_classes == ("background", *digits.class_names)
    train, test = source.splits["train"], source.splits["test"]
    assert train.shape == (24, 24, 1)
    shared = {o.tobytes() for o in train.objects} & {o.tobytes() for o in test.objects}
    assert not shared
    image, mask = np.split(train.read(5), [1], axis=-1)
    again = load_source("scenes:digits", None).splits["train"].read(5)
    np.testing.assert_array_equal(again, np.concatenate([image, mask], axis=-1))
    is_object = (mask > 0) & (mask != IGNORED)
    assert is_object.any() and (image[is_object] >= 128).all()
    assert (image[mask == 0] < 64).all()
    large = train.read(5, Geometry(shape=(48, 48, 1)))
    np.testing.assert_array_equal(large[::2, ::2, 1], mask[..., 0])


def test_scenes_of_what_has_no_classes_are_refused():
    with pytest.raises(UserError, match="no arrays of images with classes"):
        load_source("scenes:iris", None)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("task.loss", "mse", "a loss of regression"),
        ("task.metrics", "('accuracy',)", "'accuracy', a metric of classification"),
        ("task.class_weights", "(1.0,)", "1 numbers, but the data has 3 classes"),
        ("task.label_smoothing", "1.0", "0 to 1"),
        ("data.augment", "('rand_augment',)", "is not there for masks"),
        ("model.taps", "('stage7',)", "config.model.taps: no 'stage7'"),
        ("model.classes", "2", "the data has 3 classes of pixels"),
        ("model.name", "mlp", "config.model.(convolutions|dense): unknown"),
    ],
)
def test_what_segmentation_does_not_know_is_refused(key, text, message):
    with pytest.raises(UserError, match=message):
        task((key, text))


def test_a_model_without_maps_and_data_without_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"needs maps \[B, H, W, C\]"):
        jax.eval_shape(task(model="mlp").init, jax.random.key(0))
    with pytest.raises(
        UserError, match="takes images with masks, but the data is images with classes"
    ):
        small.task_of(
            small.config(overrides=[("task.name", "segmentation")]), small.spec()
        )
    write_folder(tmp_path, 5)
    for key, text, message in (
        ("task.name", "classify", "images with masks; such data is for 'segmentation'"),
        ("data.mix", "(('mixup', 0.2),)", "are masks"),
    ):
        with pytest.raises(UserError, match=message):
            make_setup(data_config(tmp_path, (key, text)))


@pytest.mark.slow
def test_a_frozen_prefix_gives_the_head_what_the_whole_model_does():
    overrides = ("model.lora_rank", "2"), ("model.lora_targets", "('stage1/.*',)")
    found = task(*overrides, convolutions=(4, 4), taps=("stage1",))
    params, stats = jax.jit(found.init)(jax.random.key(0))
    assert found.models.stages == ("stage1", "stage2", "head")
    assert "lora_a" in params["stage1"]["conv"]

    @jax.jit
    def computed():
        prepared = found.prepare(batch(), jax.random.key(0), EVALUATION)
        variables, models = small.variables(params, stats), found.models
        cut = models.with_features(variables, prepared, first="head")
        one = found.outputs(variables, prepared)
        return cut, one, found.outputs(variables, models.unpacked(cut), first="head")

    cut, one, other = computed()
    assert set(cut["features"]["features"]) == {"last", "stage1"}
    assert "mask" not in cut and "inputs" not in cut
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def test_a_classifiers_weights_are_those_of_the_stages():
    from finetune_jax.weights.addresses import Weights
    from finetune_jax.weights.merge import load_weights

    found = task(model="resnet20", taps=("stage1",))
    classifier = small.task("resnet20", shape=(8, 8, 1))

    def filled(of, value):
        shapes = jax.eval_shape(of.init, jax.random.key(0))
        trees = dict(zip(("params", "batch_stats"), shapes))
        return jax.tree.map(lambda x: np.full(x.shape, value, np.float32), trees)

    zeros, saved = filled(found, 0.0), filled(classifier, 1.0)
    weights = Weights(address="file:x", tensors=named(saved), sha256={})
    merged = load_weights(
        zeros, weights, fresh=("head/.*",), left_out=found.models.unused()
    )
    for name, leaf in named(merged).items():
        assert (leaf == (0 if name.startswith("params/head/") else 1)).all()
    assert set(found.models.unused()) == {
        "params/head/logits/kernel",
        "params/head/logits/bias",
    }


@pytest.mark.slow
def test_a_run_measures_again_and_predicts_masks_as_large_as_its_images(tmp_path):
    folder, workdir = write_folder(tmp_path / "data", 15), tmp_path / "run"
    result = run(data_config(folder, ("data.augment", "('flip',)")), workdir)
    assert 0 <= result["test/mean_iou"] <= 1 and "test/iou_road" in result
    assert (workdir / "report" / "segments.png").stat().st_size > 5_000
    assert "predicted masks" in (workdir / "report" / "index.html").read_text()
    assert program.run(["--mode=evaluate", f"--workdir={workdir}"]) == 0
    measured = json.loads((workdir / "evaluation.json").read_text())
    assert measured["test/loss"] == result["test/loss"]
    flags = [f"--workdir={workdir}", "--inputs", str(folder / "images")]
    assert program.run(["--mode=predict", *flags]) == 0
    lines = (workdir / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 15
    record = json.loads(lines[0])
    mask = Image.open(record["mask"])
    assert record["mask"] == str(workdir / "predictions_masks" / "x.png")
    assert mask.size == (12, 10) and mask.mode == "P" and np.asarray(mask).max() < 3
    assert sum(record["share"].values()) == pytest.approx(1)


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.ci_runs("True")
def test_a_run_killed_or_scanned_or_cached_ends_in_the_same_bits(
    tmp_path, monkeypatch, frozen
):
    folder = write_folder(tmp_path / "data", 15)
    views = (("data.augment", "('flip', ('pad_crop', 2))"), ("data.cache_views", "2"))
    taps = ("model.taps", "('stage1',)")

    def config(*overrides):
        resolved = data_config(folder, *views, taps, *overrides)
        if frozen:
            phase = dataclasses.replace(resolved.plan[0], rules=small.HEAD)
            resolved = dataclasses.replace(resolved, plan=(phase,))
        return resolved

    results = {
        name: run(config(*overrides), tmp_path / name)
        for name, overrides in {
            "scanned": (),
            "stepwise": (("parallel.steps_per_call", "1"),),
            "from files": (("data.memory_gb", "0.0"),),
            "not cached": (("data.cache", "off"),),
            "micro-batches of evaluation": (("evaluate.batch_size", "3"),),
        }.items()
    }
    with monkeypatch.context() as patch:
        small.die_before(patch, 4)
        with pytest.raises(small.Killed):
            run(config(), tmp_path / "killed")
    results["killed"] = run(config(), tmp_path / "killed")
    wanted = results["scanned"]
    for name, result in results.items():
        assert result["params_sha256"] == wanted["params_sha256"], name
        assert result["test/mean_iou"] == wanted["test/mean_iou"], name
    assert any("iou_road" in key for key in small.lines(tmp_path / "killed")[0])
