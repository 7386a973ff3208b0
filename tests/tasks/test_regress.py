"""Regression from the file to the prediction."""

import json
import pathlib

import jax
import numpy as np
import pytest
import small
from sklearn.linear_model import LinearRegression

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import make_data
from finetune_jax.data.loading import load_source
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

ROOT = pathlib.Path(__file__).parents[2]


def config(tmp_path, *overrides, targets=2, count=60):
    """Returns a config for a linear model on arrays with targets of their own units."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, targets))
    y = x @ kernel + 5.0 + rng.normal(size=(count, targets))
    np.savez(tmp_path / "a.npz", x=x, y=y[:, 0] if targets == 1 else y)
    given = configs.default()
    given.task.name = "regress"
    given.data.update(name="arrays", dir=str(tmp_path / "a.npz"), validation="test")
    given.data.batch_size = 36
    given.model.name, given.model.hidden = "mlp", ()
    phase = Phase(
        name="all", steps=300, optimizer="sgd", peak_lr=0.3, schedule="constant"
    )
    given.plan = as_config((phase,))
    given.parallel.devices = 1
    resolved, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return resolved


def test_labels_that_are_numbers_are_targets_and_are_cut_at_random(tmp_path):
    data = make_data(config(tmp_path).data, seed=0)
    assert data.spec.targets == ("target1", "target2") and not data.spec.class_names
    assert data.spec.train_examples == len(data.train) == 36
    file = np.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(
        data.train.label, file["y"][data.train.indices].astype("f4")
    )
    assert data.train.label.dtype == np.float32
    assert not (np.diff(data.train.indices) > 0).all()
    one = make_data(config(tmp_path, targets=1).data, seed=0)
    assert one.spec.targets == ("target",) and one.train.label.shape == (36, 1)


def test_diabetes_is_scikit_learns():
    from sklearn import datasets

    source = load_source("diabetes", None)
    assert source.targets == ("progression",)
    found, wanted = source.splits["all"], datasets.load_diabetes()
    np.testing.assert_array_equal(found.label[:, 0], wanted.target)
    np.testing.assert_array_equal(found.values, wanted.data.astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.array([0.0, np.nan])}, "1 examples have labels that are NaN"),
        ({"y": np.array([0.0, 1e300])}, "the first is number 1"),
        ({"y": np.zeros((2, 2, 2))}, "or numbers [N, T]"),
        ({"y": np.zeros(2), "class_names": np.array(["a"])}, "integers are classes"),
        (
            {"y": np.zeros(2), "target_names": np.array(["a", "b"])},
            "2 names of targets",
        ),
        ({"y": np.zeros(2, int), "target_names": np.array(["a"])}, "names of targets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)), **arrays)
    with pytest.raises(UserError) as refused:
        load_source("arrays", str(tmp_path / "a.npz"))
    assert message in str(refused.value)


def test_splits_with_classes_and_with_numbers_are_refused(tmp_path):
    x, y = np.zeros((2, 2)), np.zeros(2)
    np.savez(tmp_path / "a.npz", x_a=x, y_a=y, x_b=x, y_b=np.array(["u", "v"]))
    with pytest.raises(UserError, match="differ in what labels are"):
        load_source("arrays", str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", x_a=x, y_a=y, x_b=x, y_b=np.zeros((2, 2)))
    with pytest.raises(UserError, match="differ in the shape of labels"):
        load_source("arrays", str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.per_class", "3", "config.data.per_class: 3 needs classes"),
        ("data.sampling", "balanced", "config.data.sampling: 'balanced' needs classes"),
        ("data.mix", "(('mixup', 0.2),)", "config.data.mix: .* needs classes"),
        ("task.class_weights", "balanced", "class_weights: 'balanced', but"),
        ("task.name", "classify", "vectors with numbers; such data is for 'regress'"),
        ("task.loss", "focal", "regression has mse, mae, huber"),
        ("task.loss_args", "{'delta': 1.0}", "loss_args.delta: unknown"),
        ("task.metrics", "('accuracy',)", "'accuracy', a metric of classification"),
        ("task.metrics", "('mze',)", "no 'mze'; did you mean 'mse'"),
        ("model.classes", "3", "the data has 2 targets"),
        ("evaluate.best", "validation/accuracy", "cannot choose"),
        ("data.validation", "test[:1]", "'r2' needs targets that differ"),
    ],
)
def test_what_numbers_cannot_have_is_refused(tmp_path, key, text, message):
    with pytest.raises(UserError, match=message):
        make_setup(config(tmp_path, (key, text)))


def test_classes_are_no_targets():
    with pytest.raises(
        UserError, match="'regress' takes.*data is images with classes; .*'classify'"
    ):
        small.task_of(small.config(overrides=[("task.name", "regress")]), small.spec())


@pytest.mark.parametrize("targets", [1, 2])
def test_a_linear_head_ends_at_scikit_learns_solution(tmp_path, targets):
    task = config(tmp_path, targets=targets, count=60)
    setup = make_setup(task)
    x, y = (setup.data.train.take(np.arange(36))[k] for k in ("inputs", "label"))
    trainer = small.Trainer(setup.task, setup.plan[0])
    batch = {
        "inputs": x, "label": y, "weight": np.ones(36, np.float32),
        "position": np.arange(36, dtype=np.int32),
    }  # fmt: skip
    batch = {name: array[None] for name, array in batch.items()}
    for _ in range(300):
        metrics = trainer.update(batch, 0.3)
    oracle = LinearRegression().fit(x.astype(np.float64), y)
    head = jax.device_get(trainer.state.params)["head"]["logits"]
    np.testing.assert_allclose(head["kernel"].T, oracle.coef_, rtol=1e-4)
    np.testing.assert_allclose(head["bias"], oracle.intercept_, rtol=1e-4)
    loss = np.mean((oracle.predict(x) - y) ** 2)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)


def test_the_measured_loss_is_that_of_the_loss_with_its_arguments(tmp_path):
    huber = [("task.loss", "huber"), ("task.loss_args", "{'delta': 0.5}")]
    setup = make_setup(config(tmp_path, *huber))
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 2)).astype(np.float32)
    found = setup.task.metrics({"prediction": one}, {"label": other})
    error = np.abs(one - other).astype(np.float64)
    wanted = np.where(error < 0.5, error**2 / 2, 0.5 * (error - 0.25)).mean()
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    assert list(found) == ["mse", "mae", "r2", "loss"]


@pytest.mark.slow
def test_a_run_of_diabetes_is_measured_again_and_predicts(tmp_path):
    given = configs.load(str(ROOT / "configs" / "diabetes_mlp.py:tiny"))
    resolved, problems = configs.resolve(given, [("parallel.devices", "1")])
    assert not problems
    workdir = tmp_path / "run"
    result = run(resolved, workdir)
    names = {f"test/{name}" for name in ("mse", "mae", "r2", "loss")}
    assert names <= set(result["best"]) and result["best_step"] is not None
    assert (workdir / "report" / "predicted.png").stat().st_size > 5_000
    assert not (workdir / "report" / "confusion_matrix.png").exists()
    page = (workdir / "report" / "index.html").read_text()
    assert "lowest validation MSE" in page and "Confusion" not in page
    assert program.run(["--mode=evaluate", f"--workdir={workdir}"]) == 0
    measured = json.loads((workdir / "evaluation.json").read_text())
    assert {n: measured[n] for n in names} == {n: result["best"][n] for n in names}
    data = make_data(resolved.data, seed=0).held_out["test"]
    taken = data.take(np.arange(len(data)))
    np.save(tmp_path / "x.npy", taken["inputs"])
    flags = [f"--workdir={workdir}", "--inputs", str(tmp_path / "x.npy")]
    assert program.run(["--mode=predict", *flags]) == 0
    lines = (workdir / "predictions.jsonl").read_text().splitlines()
    predicted = [json.loads(line)["prediction"]["progression"] for line in lines]
    error = np.mean((np.array(predicted) - taken["label"][:, 0]) ** 2)
    assert error == pytest.approx(measured["test/mse"], rel=1e-6)
