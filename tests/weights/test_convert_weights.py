"""`scripts/convert_weights.py` changes names and lay-out, and not one number."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch_files
from weight_files import layout, published, shapes, values

from finetune_jax.core.pytrees import digest, named
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.labels import names_at

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Returns a file of torch with a ResNet-18 for seven classes."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    tensors = published("torchvision or timm", "resnet18", classes=7)
    path.write_bytes(torch_files.write_zip(tensors))
    return path


def convert(address, model, output, *flags):
    """Returns the finished process."""
    script = str(ROOT / "scripts" / "convert_weights.py")
    return subprocess.run(
        [sys.executable, script, address, f"--model={model}", f"--output={output}"]
        + list(flags),
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_converted_weights_are_those_of_the_file(weights, tmp_path):
    output = tmp_path / "converted"
    done = convert(f"file:{weights}", "resnet18", output)
    assert done.returncode == 0, done.stderr
    count = sum(value.size for value in values("resnet18").values())
    assert done.stdout == f"{count:,} values in {output}\n"
    converted = read_weights(f"orbax:{output}")
    # By our names, so that no table is needed to read them.
    assert digest(converted.tensors) == digest(values("resnet18"))
    ours, theirs = (
        load_weights(shapes("resnet18"), one)
        for one in (converted, read_weights(f"file:{weights}"))
    )
    assert digest(named(ours)) == digest(named(theirs))
    assert layout("finetune_jax").names(converted.tensors).keys() == named(ours).keys()


@pytest.mark.slow
def test_the_variant_that_a_file_beside_says_stays_with_the_weights(tmp_path):
    tensors = published("transformers", "resnet50", classes=2)
    (tmp_path / "weights.pth").write_bytes(torch_files.write_zip(tensors))
    about = {"model_type": "resnet", "downsample_in_bottleneck": True}
    about["id2label"] = {"0": "ant", "1": "bee"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    output = tmp_path / "converted"
    done = convert(f"file:{tmp_path / 'weights.pth'}", "resnet50", output)
    assert done.returncode == 0, done.stderr
    assert "stride_in='1x1', as config.json says" in done.stderr
    found, _ = architecture.variant({"name": "resnet50"}, f"orbax:{output}")
    assert found == {"stride_in": "1x1"}
    assert names_at(f"orbax:{output}") == ("ant", "bee")
    about["layer_type"] = "basic"
    (tmp_path / "config.json").write_text(json.dumps(about))
    done = convert(f"file:{tmp_path / 'weights.pth'}", "resnet50", tmp_path / "other")
    assert done.returncode == 2 and "layer_type='basic'" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_weights_of_another_model_are_refused_and_nothing_is_written(weights, tmp_path):
    for model, message in (
        ("resnet34", "not in the weights"),
        ("resnet19", "did you mean 'resnet18'?"),
    ):
        done = convert(f"file:{weights}", model, tmp_path / "converted")
        assert done.returncode == 2
        assert "error: " in done.stderr and message in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_output_that_exists_is_refused_and_stays(weights, tmp_path):
    output = tmp_path / "converted"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    done = convert(f"file:{weights}", "resnet18", output)
    assert done.returncode == 2
    assert done.stderr == f"error: --output: {output} exists already\n"
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_weights_that_are_not_there_are_refused(tmp_path):
    done = convert(f"file:{tmp_path}/none.pth", "resnet18", tmp_path / "converted")
    assert done.returncode == 2 and "no file" in done.stderr
    assert not list(tmp_path.iterdir())
