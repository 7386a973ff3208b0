import json

import clicks
import numpy as np
import pytest
from sklearn import metrics as theirs
from small import Trainer

from finetune_jax import config as configs
from finetune_jax import main, metrics
from finetune_jax.data.dataset import make_data
from finetune_jax.errors import UserError
from finetune_jax.plan import Phase, as_config
from finetune_jax.run import run
from finetune_jax.setup import make_setup
from finetune_jax.tasks import make_task
from finetune_jax.trees import named


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def config_of(place, plan=(), overrides=(), **model):
    config = configs.default()
    config.task.name = "tabular"
    config.data.update(
        name="criteo", dir=str(place), validation="validation", test="test",
        batch_size=16, min_count=1,
    )  # fmt: skip
    config.model.name = "table_mlp"
    config.model.update(hidden=(4,), width=2)
    config.model.update(model)
    config.plan = as_config(plan or (Phase(name="all", steps=3, peak_lr=1e-2),))
    config.parallel.devices = 1
    resolved, problems = configs.resolve(config, overrides)
    assert not problems, problems
    return resolved


def small(folder):
    """Returns a file of few columns."""
    header = ["age", "city", "zip", "kind", "label"]
    lines = [
        [str(i % 7), "abc"[i % 3], f"0{i % 4}", "xy"[i % 2], "ny"[i % 2]]
        for i in range(40)
    ]
    return clicks.write(folder / "t.csv", lines, header, ",")


def trained(config, phase, updates=3):
    """Returns the parameters before and after some updates of a phase."""
    data = make_data(config.data, seed=0)
    trainer = Trainer(make_task(config, data.spec), phase)
    before = {k: np.asarray(v) for k, v in named(trainer.state.params).items()}
    for update in range(updates):
        rows = np.arange(16) + 16 * update
        batch = data.train.take(rows % len(data.train))
        batch["position"] = np.arange(16, dtype=np.int32)
        trainer.update({k: v[None] for k, v in batch.items()})
    after = {k: np.asarray(v) for k, v in named(trainer.state.params).items()}
    return before, after


def test_fields_are_frozen_by_rule(tmp_path):
    config = config_of(small(tmp_path), overrides=[("data.name", "csv")])
    rules = ((r"embeddings/(city|zip)/.*", 0.0), (".*", 1.0))
    before, after = trained(config, Phase(name="some", steps=3, rules=rules))
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same == {"embeddings/city/embedding", "embeddings/zip/embedding"}


def test_normalised_entropy_is_the_log_loss_over_that_of_the_shares():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(50, 2)), (rng.random(50) < 0.3).astype(int)
    p = metrics.probabilities(logits)
    share = np.full((50, 2), [1 - label.mean(), label.mean()])
    wanted = theirs.log_loss(label, p) / theirs.log_loss(label, share)
    assert metrics.normalised_entropy(logits, label) == pytest.approx(wanted, rel=1e-12)
    auc = metrics.metric("roc_auc")(logits, label)
    assert auc == pytest.approx(theirs.roc_auc_score(label, p[:, 1]), rel=1e-12)
    assert np.isnan(metrics.normalised_entropy(logits, np.zeros(50, int)))
    assert not metrics.higher_is_better("test/normalised_entropy")


def test_what_does_not_go_together_is_named(tmp_path):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(60))
    with pytest.raises(UserError, match="'mlp' takes no tables; table_mlp"):
        make_setup(config_of(path, overrides=[("model.name", "mlp")]))
    with pytest.raises(UserError, match="data is a table: use 'tabular'"):
        make_setup(config_of(path, overrides=[("task.name", "classify")]))
    with pytest.raises(UserError, match="data is no table"):
        config = [
            ("data.name", "digits"),
            ("data.dir", "None"),
            ("data.min_count", "2"),
        ]
        make_setup(config_of(path, overrides=config))


@pytest.mark.slow
def test_a_run_is_evaluated_predicted_and_taken_up_with_the_same_bits(tmp_path, capsys):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(60))
    config = config_of(path)
    result = run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "13 numbers and 26 categories" in said and "C26: category, 5 rows" in said
    assert main.run([f"--workdir={tmp_path}/run", "--mode=evaluate"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["test/loss"] == result["test/loss"]
    # Other rows than those that were trained on change nothing that was fitted.
    other = clicks.write(tmp_path / "new.txt", [row[1:] for row in clicks.rows(60)])
    command = [f"--workdir={tmp_path}/run", "--mode=predict", f"--inputs={other}"]
    assert main.run(command) == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 60 and first["file"] == f"{other}#1"
    assert main.run([f"--config={config_file(tmp_path)}", "--mode=plan"]) == 0
    assert "C26: category" in capsys.readouterr().out


def config_file(folder):
    """Returns a config file of the same table."""
    path = folder / "config.py"
    path.write_text(
        "from finetune_jax import config as configs\n"
        "from finetune_jax.plan import as_config\n"
        "from finetune_jax.strategies import head_only\n"
        "def get_config():\n"
        "    config = configs.default()\n"
        "    config.task.name, config.model.name = 'tabular', 'dlrm'\n"
        f"    config.data.update(name='criteo', dir='{folder}/t.txt')\n"
        "    config.plan = as_config(head_only(steps=2))\n"
        "    return config\n"
    )
    return path
