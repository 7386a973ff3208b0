import json
import struct

import clicks
import numpy as np
import pytest
from sklearn import metrics as theirs
from small import Trainer, lines, same_result, stop_at_once, task_of

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.core.errors import UserError
from finetune_jax.core.metric_names import higher_is_better
from finetune_jax.core.pytrees import named
from finetune_jax.data.dataset import make_data
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.tasks.objectives import metrics
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")


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
    trainer = Trainer(task_of(config, data.spec), phase)
    before = {k: np.asarray(v) for k, v in named(trainer.state.params).items()}
    for update in range(updates):
        rows = np.arange(16) + 16 * update
        batch = data.train.take(rows % len(data.train))
        batch["position"] = np.arange(16, dtype=np.int32)
        trainer.update({k: v[None] for k, v in batch.items()})
    after = {k: np.asarray(v) for k, v in named(trainer.state.params).items()}
    return before, after


@pytest.mark.slow
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
    assert not higher_is_better("test/normalised_entropy")


def test_what_does_not_go_together_is_named(tmp_path):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(60))
    with pytest.raises(UserError, match="'mlp' takes no tables; table_mlp"):
        make_setup(config_of(path, overrides=[("model.name", "mlp")]))
    with pytest.raises(
        UserError, match="data is tables with classes; such data is for 'tabular'"
    ):
        make_setup(config_of(path, overrides=[("task.name", "classify")]))
    with pytest.raises(
        UserError, match="'tabular' takes tables with classes.*data is images"
    ):
        config = [
            ("data.name", "digits"),
            ("data.dir", "None"),
            ("data.min_count", "2"),
        ]
        make_setup(config_of(path, overrides=config))


@pytest.mark.slow
def test_a_run_is_evaluated_and_predicts_with_what_was_fitted(tmp_path, capsys):
    path = clicks.write(tmp_path / "t.txt", clicks.rows(60))
    config = config_of(path)
    result = run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "13 number columns: I1" in said and "26 category columns: C1" in said
    assert main.run([f"--workdir={tmp_path}/run", "--mode=evaluate"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["test/loss"] == result["test/loss"]
    # Other rows than those that were trained on change nothing that was fitted.
    other = clicks.write(tmp_path / "new.txt", [row[1:] for row in clicks.rows(60)])
    command = [f"--workdir={tmp_path}/run", "--mode=predict", f"--inputs={other}"]
    assert main.run(command) == 0
    written = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(written[0])
    assert len(written) == 60 and first["file"] == f"{other}#1"
    planned = f"--config={config_file(tmp_path)}", "--config.parallel.devices=1"
    assert main.run([*planned, "--mode=plan"]) == 0
    assert "C26: category, 5 known values" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_stopped_after_every_update_ends_in_the_same_bits(tmp_path):
    config = config_of(clicks.write(tmp_path / "t.txt", clicks.rows(60)))
    whole = run(config, tmp_path / "whole")
    stops = 0
    while True:
        try:
            result = run(config, tmp_path / "stopped", stop_at_once())
            break
        except Preempted:
            stops += 1
    assert stops == whole["steps"] and same_result(result, whole)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def config_file(folder):
    """Returns a config file of the same table."""
    path = folder / "config.py"
    path.write_text(
        "from finetune_jax import config as configs\n"
        "from finetune_jax.plans.phase import as_config\n"
        "from finetune_jax.plans.strategies import head_only\n"
        "def get_config():\n"
        "    config = configs.default()\n"
        "    config.task.name, config.model.name = 'tabular', 'dlrm'\n"
        f"    config.data.update(name='criteo', dir='{folder}/t.txt')\n"
        "    config.plan = as_config(head_only(steps=2))\n"
        "    return config\n"
    )
    return path


def vectors_in(folder, kind, width=2):
    """Returns a file of word vectors of some cities, and the vectors."""
    words = {"a": [1.5, -2.0], "c": [0.25, 3.0], "New York": [9.0, 9.0]}
    words = words if kind == "glove" else {"a": words["a"], "c": words["c"]}
    path, head = folder / f"vectors.{kind}", f"{len(words)} {width}\n"
    lines = [f"{w} {' '.join(map(str, v[:width]))}\n" for w, v in words.items()]
    if kind == "bin":
        body = [
            f"{w} ".encode() + struct.pack("<2f", *v) + b"\n" for w, v in words.items()
        ]
        path.write_bytes(head.encode() + b"".join(body))
    else:
        path.write_text("".join(lines if kind == "glove" else [head, *lines]))
    return path, words


def started(config):
    """Returns the state before the first update, its weights, and the data."""
    setup = make_setup(config)
    return *setup.start(), setup.data


@pytest.mark.parametrize("kind", ["glove", "word2vec", "bin"])
@pytest.mark.fast_runs("glove")
def test_word_vectors_become_rows_of_the_words_that_there_are(kind, tmp_path):
    path, words = vectors_in(tmp_path, kind)
    given = [("data.name", "csv"), ("init.embeddings", f"(('city', 'file:{path}'),)")]
    plain, _, data = started(config_of(small(tmp_path), overrides=given[:1]))
    state, weights, _ = started(config_of(small(tmp_path), overrides=given))
    before = np.asarray(plain.params["embeddings"]["city"]["embedding"])
    after = np.asarray(state.params["embeddings"]["city"]["embedding"])
    for row, value in enumerate(data.fitted.known["city"].to_pylist(), start=2):
        wanted = words.get(value, before[row])
        np.testing.assert_array_equal(after[row], np.float32(wanted))
    np.testing.assert_array_equal(after[:2], before[:2])
    assert list(weights.sha256) == [str(path)]


def test_word_vectors_that_do_not_fit_are_named(tmp_path):
    path, _ = vectors_in(tmp_path, "glove", width=1)
    (tmp_path / "none.txt").write_text("b 1 2\nb 1\n")
    entries = (
        ("city", f"file:{path}"), ("town", f"file:{path}"), ("kind", f"file:{path}"),
        ("city", f"file:{tmp_path}/none.txt"), ("city", f"file:{tmp_path}/gone"),
    )  # fmt: skip
    given = [("data.name", "csv"), ("init.embeddings", repr(entries))]
    with pytest.raises(UserError) as error:
        started(config_of(small(tmp_path), overrides=given))
    for text in (
        "vectors of 1, the model of 2; config.model.width=1", "'town' matches no category",
        "knows no value of 'kind'", "is not a word and 2 numbers", "no such file",
    ):  # fmt: skip
        assert text in str(error.value)


@pytest.mark.slow
def test_embeddings_of_a_former_run_go_to_the_values_that_they_are_of(tmp_path):
    path = small(tmp_path)
    config = config_of(path, overrides=[("data.name", "csv")])
    run(config, tmp_path / "run")
    former, _, before = started(
        config_of(
            path,
            overrides=[
                ("data.name", "csv"),
                ("init.pretrained", f"orbax:{tmp_path}/run"),
            ],
        )
    )
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([lines[0], *(line.replace(",b,", ",new,") for line in lines[:0:-1])])
    )
    given = [("data.name", "csv"), ("init.pretrained", f"orbax:{tmp_path}/run")]
    own, _, _ = started(config_of(path, overrides=given[:1]))
    state, _, data = started(config_of(path, overrides=given))
    after, theirs, fresh = (
        np.asarray(found.params["embeddings"]["city"]["embedding"])
        for found in (state, former, own)
    )
    known = before.fitted.known["city"].to_pylist()
    values = data.fitted.known["city"].to_pylist()
    assert known == ["a", "b", "c"] and values != known and "new" in values
    for row, value in enumerate(values, start=2):
        wanted = fresh[row] if value == "new" else theirs[2 + known.index(value)]
        np.testing.assert_array_equal(after[row], wanted)
    np.testing.assert_array_equal(after[:2], theirs[:2])
    np.testing.assert_array_equal(
        state.params["head"]["logits"]["kernel"],
        former.params["head"]["logits"]["kernel"],
    )
    (tmp_path / "run" / "vocabulary.arrow").unlink()
    with pytest.raises(UserError, match="not the values of their rows"):
        started(config_of(path, overrides=given))
