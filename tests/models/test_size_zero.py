"""Tables without categories, or without numbers: parts of a batch that have size 0."""

import json

import clicks
import jax
import numpy as np
import pytest
import small

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.core.array_store import Tables
from finetune_jax.data.dataset import make_data
from finetune_jax.features.frozen_prefix import in_chunks
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.training.run import run

pytestmark = pytest.mark.usefixtures("no_pictures")
MODELS = {
    "table_mlp": {"width": 8, "hidden": (4,)},
    "dcn_v2": {"width": 8, "layers": 1},
    "ft_transformer": {"width": 8, "layers": 1, "heads": 2},
    "dlrm": {"width": 8},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def table(folder, has):
    """Returns a file that has two columns, of 'numbers' or of 'categories'."""
    rows = [
        [str(i * 7 % 17), str(i * 5 % 13)]
        if has == "numbers"
        else ["abc"[i % 3], "xyz"[i * i % 3]]
        for i in range(90)
    ]
    lines = [[*row, "ny"[i * 7 % 17 > 8]] for i, row in enumerate(rows)]
    return clicks.write(folder / "t.csv", lines, ["a", "b", "label"], ",")


def config(path, model="table_mlp", **data):
    given = configs.default()
    given.task.name, given.model.name = "tabular", model
    given.model.update(MODELS[model])
    given.data.update(name="csv", dir=str(path), validation="validation", test="test")
    given.data.update(batch_size=16, **data)
    rules = (("head/.*", 1.0), (".*", 0.0))
    phases = (
        Phase(name="head", steps=4, peak_lr=1e-2, rules=rules),
        Phase(name="all", steps=4, peak_lr=1e-2),
    )
    given.plan = as_config(phases)
    given.parallel.devices = 1
    resolved, problems = configs.resolve(given, ())
    assert not problems, problems
    return resolved


@pytest.mark.parametrize("has", ["numbers", "categories"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_tables_of_one_kind_of_column(has, model, tmp_path):
    if (has, model) == ("numbers", "dlrm"):
        pytest.skip("dlrm refuses tables without categories")
    given = config(table(tmp_path, has), model)
    data = make_data(given.data, seed=0)
    task = small.task_of(given, data.spec)
    batch = data.train.take(np.arange(4))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))

    def logits(params, batch):
        x = task.prepare(batch, jax.random.key(0), "evaluation")["inputs"]
        return task.models[""].apply({"params": params}, x, train=False)

    assert jax.eval_shape(logits, params, batch).shape[0] == 4


def test_parts_of_a_batch_may_have_size_0():
    batch = {"label": np.arange(6), "inputs": np.zeros((6, 0, 3), np.float32)}
    made = in_chunks(lambda part: part["inputs"] + 1, batch, 2)
    assert made.shape == (6, 0, 3)


@pytest.mark.parametrize("memory", [0, 10**6])
def test_tables_of_features_may_have_arrays_of_size_0(memory, tmp_path):
    tables = Tables(folder=tmp_path, limit=10**6, memory=memory, say=lambda _: None)
    arrays = [np.ones((5, 2), np.float32), np.ones((5, 0, 3), np.float32)]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    made = tables.make("a" * 32, {}, shapes, iter([arrays]), "features")
    found = tables.find("a" * 32, shapes)
    for leaves in (made, found):
        for leaf, array in zip(leaves, arrays, strict=True):
            np.testing.assert_array_equal(leaf, array)


@pytest.mark.slow
def test_a_table_of_numbers_is_learned_with_and_without_cache(tmp_path):
    path = table(tmp_path, "numbers")
    digests = {
        run(config(path, **given), tmp_path / name)["params_sha256"]
        for name, given in (
            ("kept", {}),
            ("mapped", {"memory_gb": 0.0}),
            ("off", {"cache": "off"}),
        )
    }
    assert len(digests) == 1
    workdir = f"--workdir={tmp_path}/kept"
    assert main.run([workdir, "--mode=evaluate"]) == 0
    assert main.run([workdir, "--mode=predict", f"--inputs={path}"]) == 0
    written = (tmp_path / "kept/predictions.jsonl").read_text().split("\n")
    assert len(written) == 91 and json.loads(written[0])["class"] in "ny"
    assert main.run([workdir, "--mode=export"]) == 0
