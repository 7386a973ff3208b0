"""Exports give what predictions give, without this project."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from exports import assert_close, export, images, predicted

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.errors import UserError
from finetune_jax.inference.export.onnx_model import VARIABLE, onnx_python
from finetune_jax.inference.export.onnx_model import write as write_onnx
from finetune_jax.models.peft.lora import UPDATES
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.run import run
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights

# Runs `load.py` where nothing of this project, nor what it stands on, can be imported.
ALONE = """
import sys
for name in ("finetune_jax", "flax", "optax", "orbax", "ml_collections", "torch"):
    sys.modules[name] = None
import numpy as np
from load import load
model, inputs = load(), np.load(sys.argv[1])
found = {f"{n}/{k}": v for n in (1, len(inputs)) for k, v in model(inputs[:n]).items()}
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the workdir of a ResNet-8 with LoRA, whose averaged weights are best."""
    overrides = [
        ("evaluate.ema_decay", "0.5"),
        ("evaluate.best", "validation/ema_loss"),
        ("evaluate.every_steps", "1"),
        ("data.mean", "(0.3,)"),
        ("data.std", "(0.5,)"),
    ]
    rules = ((UPDATES, 1.0), ("head/.*", 1.0), (".*", 0.0))
    phase = Phase(name="top", steps=3, peak_lr=1e-2, rules=rules, batch_stats="hold")
    config = small.config(
        plan=(phase,),
        overrides=overrides,
        lora_rank=2,
        lora_targets=("stage3/block1/.*",),
    )
    workdir = tmp_path_factory.mktemp("export") / "run"
    run(config, workdir)
    return workdir


def loaded_alone(folder, inputs, tmp_path):
    """Returns what `load.py` gives in a process of its own, of one and of all inputs."""
    np.save(tmp_path / "inputs.npy", inputs)
    command = [sys.executable, "-c", ALONE, tmp_path / "inputs.npy", tmp_path / "o.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "o.npz") as file:
        return dict(file)


@pytest.mark.slow
def test_the_artifact_alone_gives_the_logits_of_predictions(finished, tmp_path):
    folder = export(finished, tmp_path / "out")
    found = loaded_alone(folder, images(), tmp_path)
    wanted = predicted(finished, images())["logits"]
    assert_close(found["5/logits"], wanted)
    assert_close(found["1/logits"], wanted[:1])
    # Of its own logits: probabilities differ by as many times as these are large.
    exact = np.exp(found["5/logits"].astype(np.float64))
    shares = exact / exact.sum(axis=-1, keepdims=True)
    assert_close(found["5/probabilities"], shares)
    assert len((folder / "load.py").read_text().splitlines()) <= 20


@pytest.mark.slow
def test_the_card_says_how_good_and_how_to_load(finished, tmp_path):
    folder = export(finished, tmp_path / "out")
    card = (folder / "README.md").read_text()
    result = json.loads((finished / "result.json").read_text())
    manifest = json.loads((finished / "manifest.json").read_text())
    step = result["best_step"]
    chosen = result["best"]
    assert f"step {step}" in card and manifest["data_fingerprint"] in card
    assert f"{chosen['test/ema_accuracy']:.4f}" in card
    assert "| top | 3 steps |" in card
    (code,) = [b.split("```")[0] for b in card.split("```python\n")[1:]]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((folder / "model.json").read_text())
    assert about["labels"] == list("0123456789")
    assert about["inputs"] == {"shape": [12, 12, 1], "dtype": "uint8"}
    assert about["outputs"]["logits"] == [None, 10]


@pytest.mark.slow
def test_what_is_there_is_not_overwritten(finished, tmp_path):
    folder = export(finished, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="out is not empty"):
        export(finished, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        export(finished, tmp_path / "file")
    with pytest.raises(UserError, match="no folder"):
        export(finished, tmp_path / "no" / "out")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_what_cannot_be_exported_is_told(finished, tmp_path):
    with pytest.raises(UserError) as error:
        export(finished, tmp_path / "out", formats="jacx,onyx")
    assert "no 'jacx'; did you mean 'jax'?" in str(error.value)
    assert "no 'onyx'" in str(error.value)
    with pytest.raises(UserError, match="--formats: only --mode=export"):
        program.run(["--mode=predict", f"--workdir={finished}", "--formats=jax"])
    with pytest.raises(UserError, match="--mode=export uses the config of the run"):
        export(finished, tmp_path / "out", "--config.data.mean=(0.9,)")
    with pytest.raises(UserError, match="holds no run"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, precision, tolerance",
    [("iris_mlp", "float32", 1e-6), ("diabetes_mlp", "float64", 1e-12),
     ("diabetes_mlp", "bfloat16", 1e-6)],
)  # fmt: skip
@pytest.mark.ci_runs("diabetes_mlp-bfloat16-1e-06")
def test_feature_vectors_and_precisions(name, precision, tolerance, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    given = configs.load(str(root / "configs" / f"{name}.py:tiny"))
    overrides = [("parallel.devices", "1"), ("precision", precision)]
    config, problems = configs.resolve(given, overrides)
    assert not problems
    with jax.enable_x64(precision == "float64"):
        run(config, tmp_path / "run")
        folder = export(tmp_path / "run", tmp_path / "out")
        shape = json.loads((folder / "model.json").read_text())["inputs"]["shape"]
        inputs = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
        outputs = predicted(tmp_path / "run", inputs)
    found = loaded_alone(folder, inputs, tmp_path)
    key, wanted = next(iter(outputs.items()))
    assert_close(found[f"4/{key}"], wanted.astype(found[f"4/{key}"].dtype), tolerance)


@pytest.mark.slow
@pytest.mark.skipif(onnx_python() is None, reason="no environment: make onnx")
def test_onnxruntime_gives_the_logits_of_predictions(finished, tmp_path):
    folder = export(finished, tmp_path / "out", formats="onnx")
    found = run_by_onnxruntime(folder, images(), tmp_path)
    wanted = predicted(finished, images())["logits"]
    assert_close(found["logits"], wanted, 1e-5)
    assert_close(found["probabilities"].sum(axis=-1), np.ones(5))


def run_by_onnxruntime(folder, inputs, tmp_path):
    """Returns what `model.onnx` gives, as its card says to run it."""
    card = (folder / "README.md").read_text()
    (code,) = [b.split("```")[0] for b in card.split("```python\n")[1:]]
    np.save(tmp_path / "inputs.npy", inputs)
    code += (
        f"\nnames = [output.name for output in session.get_outputs()]"
        f"\ninputs = np.load({str(tmp_path / 'inputs.npy')!r})"
        f"\nfound = session.run(names, {{'inputs': inputs}})"
        f"\nnp.savez({str(tmp_path / 'o.npz')!r}, **dict(zip(names, found)))"
    )
    command = [onnx_python(), "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "o.npz") as file:
        return dict(file)


def test_onnx_without_its_environment_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/nowhere/python")
    with pytest.raises(UserError, match="make onnx"):
        write_onnx(None, tmp_path)


@pytest.mark.slow
def test_a_format_that_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/nowhere/python")
    with pytest.raises(UserError, match="make onnx"):
        export(finished, tmp_path / "out", formats="jax,onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_from_nowhere_are_written_by_our_names(finished, tmp_path):
    folder = export(finished, tmp_path / "out", formats="safetensors")
    weights = read_weights(f"file:{folder / 'model.safetensors'}")
    task = small.task()
    start = random_state(task, 0)
    variables = {"params": start.params, "batch_stats": start.batch_stats}
    loaded = load_weights(variables, weights)
    assert not [name for name in weights.tensors if "lora" in name]
    outputs = task.outputs(
        loaded,
        {"inputs": (jnp.asarray(images()) / jnp.float32(255) - 0.3) / 0.5},
    )  # fmt: skip
    assert_close(np.asarray(outputs["logits"]), predicted(finished, images())["logits"])
    with pytest.raises(UserError, match="has no names in 'timm'; it has them in finet"):
        export(finished, tmp_path / "o", "--layout=timm", formats="safetensors")
