"""What was fine-tuned here goes back to torchvision, timm and transformers."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import oracles
import pictures
import pytest
import small
from exports import assert_close, export, images, predicted

from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.weights.addresses import read_weights

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
TOP = ((r"(stage4/block2/conv2|head)/.*", 1.0), (".*", 0.0))


def network(library, classes=10):
    """Returns a ResNet-18 of a library, with random weights and statistics."""
    import torch

    if library == "transformers":
        transformers = oracles.import_transformers()
        config = transformers.ResNetConfig(
            depths=[2, 2, 2, 2],
            layer_type="basic",
            hidden_sizes=[64, 128, 256, 512],
            num_labels=classes,
        )
        made = transformers.ResNetForImageClassification(config)
    elif library == "timm":
        made = oracles.import_timm().create_model("resnet18", num_classes=classes)
    else:
        made = oracles.import_torchvision().models.resnet18(num_classes=classes)
    rng = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):  # timm begins some with zeros.
            weight.data.uniform_(0.5, 1.5, generator=rng)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2, generator=rng)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=rng)
        else:
            buffer.fill_(7)
    return made.eval()


def saved(library, folder):
    """Returns the address of a file as a library writes it, and its tensors."""
    import torch

    module = network(library)
    if library == "transformers":
        module.save_pretrained(folder)
        address = f"file:{folder / 'model.safetensors'}"
    else:
        torch.save(module.state_dict(), folder / "weights.pth")
        address = f"file:{folder / 'weights.pth'}"
    return address, read_weights(address).tensors


def fine_tuned(workdir, address, rules, rate):
    phase = Phase(name="top", steps=2, peak_lr=rate, rules=rules, batch_stats="hold")
    overrides = [
        ("data.channels", "3"),
        ("data.image_size", "32"),
        ("data.mean", "(0.5, 0.4, 0.3)"),
        ("data.std", "(0.2, 0.3, 0.4)"),
        ("init.pretrained", address),
    ]
    run(small.config(model="resnet18", plan=(phase,), overrides=overrides), workdir)
    return workdir


def loaded_back(library, folder):
    """Returns the network that a library makes of an export."""
    if library == "transformers":
        kind = oracles.import_transformers().ResNetForImageClassification
        made, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not [value for value in info.values() if value]
        return made.eval()
    if library == "timm":
        create = oracles.import_timm().create_model
        return create(f"local-dir:{folder}", pretrained=True).eval()
    from safetensors.torch import load_file

    made = oracles.import_torchvision().models.resnet18(num_classes=10)
    made.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return made.eval()


def logits_of(module, inputs):
    import torch

    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    x = ((inputs / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x).permute(0, 3, 1, 2))
    return getattr(found, "logits", found).numpy()


@pytest.mark.parametrize("library", ("torchvision", "timm", "transformers"))
@pytest.mark.exhaustive
def test_the_library_gives_our_logits_after_fine_tuning(library, tmp_path):
    pytest.importorskip("torch")
    address, before = saved(library, tmp_path)
    workdir = fine_tuned(tmp_path / "run", address, TOP, 1e-3)
    folder = export(workdir, tmp_path / "out", formats="safetensors")
    after = read_weights(f"file:{folder / 'model.safetensors'}").tensors
    assert set(after) == set(before)
    changed = [name for name in after if (after[name] != before[name]).any()]
    assert len(changed) == 3  # A convolution, and kernel and bias of the head.
    x = images(3, 32, 3)
    found = logits_of(loaded_back(library, folder), x)
    assert_close(found, predicted(workdir, x)["logits"], 1e-4)
    # The same run in the layout of another library.
    other = "transformers" if library != "transformers" else "torchvision"
    folder = export(
        workdir, tmp_path / other, f"--layout={other}", formats="safetensors"
    )
    assert_close(logits_of(loaded_back(other, folder), x), found, 1e-5)


@pytest.mark.exhaustive
def test_an_export_without_training_is_the_file_again(tmp_path):
    pytest.importorskip("torch")
    address, before = saved("torchvision", tmp_path)
    # A rate so small that no weight moves.
    head = (("head/.*", 1.0), (".*", 0.0))
    workdir = fine_tuned(tmp_path / "run", address, head, 1e-30)
    folder = export(workdir, tmp_path / "out", formats="safetensors")
    after = read_weights(f"file:{folder / 'model.safetensors'}").tensors
    assert set(after) == set(before)
    for name in before:
        assert after[name].dtype == before[name].dtype, name
        assert after[name].shape == before[name].shape, name
        assert after[name].tobytes() == before[name].tobytes(), name


def blocks(page):
    """Returns commands and Python of a page, in their order."""
    found = re.findall(r"^    (\.venv/[^\n]*)$|^```python\n(.*?)```", page, re.M | re.S)
    return [(command, code) for command, code in found]


def test_the_page_on_weights_leads_back_into_transformers(tmp_path, monkeypatch):
    oracles.import_timm(), oracles.import_transformers()
    import torch

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pictures.make_folder(tmp_path / "photos", suffix=".jpg")
    pictures.make_folder(tmp_path / "new_photos", examples=1, suffix=".jpg")
    torch.save(network("torchvision", 1000).state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "load", raising=False)
    found = blocks((ROOT / "docs" / "weights.md").read_text())
    assert [bool(command) for command, _ in found] == [1, 0, 1, 0, 0, 1, 0, 0]
    names = {}
    for command, code in found:
        if code:
            exec(code, names)
            continue
        words = command.replace(".venv/bin/python", sys.executable).split()
        if "--mode=export" not in words:
            words += ["--config.plan[0].epochs=2", "--config.data.cache_views=1"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    theirs = torch.softmax(names["logits"], -1)[0].numpy()
    id2label = names["network"].config.id2label
    (record,) = names["classify"](["new_photos/red/0.jpg"])
    ours = {entry["class"]: entry["probability"] for entry in record["top"]}
    for number, share in enumerate(theirs):
        assert abs(ours[id2label[number]] - share) < 0.02
    about = json.loads((tmp_path / "runs/photos/export/model.json").read_text())
    assert about["labels"] == sorted(pictures.COLOURS)
