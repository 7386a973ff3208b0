"""Every config that ships runs, small, and reads every key that it has."""

import ast
import dataclasses
import functools
import json
import pathlib
import sys

import clicks
import idx_files
import pictures
import pytest
import questions
import scores
import texts
from recording import Recording

from finetune_jax import config as configs
from finetune_jax.config.parallel import LAUNCH
from finetune_jax.models import efficientnet_lite, resnet_cifar, vgg, vit
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = [
    "resnet_head.py:tiny",
    "head_population.py:tiny",
    "efficientnet_flowers.py:tiny",
    "adapt_digits.py:tiny",
    "bert_ner.py:tiny",
    "bert_qa.py:tiny",
    "bert_sst2.py:tiny",
    "distill_digits.py:tiny",
    "distill_digits.py:teacher,tiny",
    "mutual_digits.py:tiny",
    "joint_digits_fashion.py:tiny",
    "criteo.py:tiny",
    "diabetes_mlp.py:tiny",
    "fraud.py:tiny",
    "iris_mlp.py:tiny",
    "mnist_source.py:cnn,tiny",
    "mnist_source.py:mlp,tiny",
    "mnist_target.py:cnn,tiny",
    "mnist_target.py:mlp,tiny",
    "photos.py:finetune,tiny",
    "pneumonia.py:head,tiny",
    "pretrain_fashion_mnist.py:tiny",
    "segmentation.py:tiny",
    "table.py:tiny",
    "tabular_transfer.py:source,tiny",
    "tabular_transfer.py:target,tiny",
    "text.py:finetune,tiny",
    "vit_full.py:tiny",
    "vgg_partial.py:tiny",
]


# Widths and depths in which these are quick to compile.
SMALLER = {
    "vit_tiny_patch16": functools.partial(vit._vit, vit.Shape(16, 2, 2, 16), heads=2),
    "vgg11_bn": functools.partial(
        vgg._vgg, tuple((n, 4) for n in (1, 1, 2, 2, 2)), True
    ),
    "resnet20": functools.partial(resnet_cifar._resnet, 1),
    "efficientnet_lite0": functools.partial(
        efficientnet_lite._efficientnet_lite, 0.25, 0.1
    ),
}
AT_RANDOM = ("joint_digits_fashion.py:tiny", "pretrain_fashion_mnist.py:tiny")
QUICK = ("iris_mlp.py:tiny",)
# Others run the same keys; `tabular_transfer.py:target` begins with a run of the source.
REPEATED = (
    "distill_digits.py:teacher,tiny", "efficientnet_flowers.py:tiny",
    "mnist_source.py:mlp,tiny", "mnist_target.py:cnn,tiny",
    "pretrain_fashion_mnist.py:tiny",
    "tabular_transfer.py:source,tiny", "tabular_transfer.py:target,tiny",
    "vgg_partial.py:tiny",
)  # fmt: skip


TEXTS = {
    "classes": texts.write,
    "tags": functools.partial(texts.write_tagged, columns=("tokens", "ner_tags")),
    "answers": questions.write_squad,
}


def resolved(variant, tmp_path):
    """Returns a variant on one device, with data and weights that it can find."""
    overrides = [("parallel.devices", "1"), ("data.batch_size", "10")]
    config = configs.load(str(ROOT / "configs" / variant))
    domains = {dict(e).get("name"): i for i, e in enumerate(config.data.domains)}
    if config.data.name == "idx" or "idx" in domains:
        import numpy as np

        rng = np.random.default_rng(0)
        for prefix, size in (("train", 60), ("t10k", 20)):
            images = rng.integers(0, 256, (size, 28, 28), np.uint8)
            labels = (np.arange(size) % 10).astype(np.uint8)
            idx_files.write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images)
            idx_files.write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
        place = "data.dir"
        if "idx" in domains:
            place = f"data.domains[{domains['idx']}].dir"
        overrides.append((place, str(tmp_path)))
    if config.data.name == "folder":
        folder = pictures.make_folder(tmp_path / "photos")
        overrides += [("data.dir", str(folder)), ("data.image_size", "32")]
    if config.model.name == "efficientnet_lite0":  # Its weights are for all its blocks.
        overrides += [("init.pretrained", "None"), ("init.fresh", "()")]
    if config.data.text:  # A small model that knows few words.
        folder = TEXTS[config.data.labels](tmp_path / "texts")
        overrides += [("data.dir", str(folder)), ("init.pretrained", "None")]
        tokenizer = tmp_path / "texts" / "tokenizer.json"
        overrides += [("data.tokenizer", f"file:{tokenizer}"), ("init.fresh", "()")]
        if config.data.name == "tsv" and not config.data.header:
            overrides.append(("data.header", "('sentence', 'label')"))
        small = {"layers": "1", "width": "8", "heads": "2", "hidden": "8"}
        small |= {"vocabulary": "30", "positions": "384"}
        overrides += [(f"model.{key}", value) for key, value in small.items()]
    if config.data.name == "csv" and not config.data.text:
        rows = [[f"{n * 7 % 11}.5", f"{n / 60}", f"{n % 2}"] for n in range(60)]
        header = ["Amount", "V1", config.data.label]
        path = clicks.write(tmp_path / "rows.csv", rows, header, delimiter=",")
        overrides += [("data.dir", str(path)), ("model.hidden", "(4,)")]
    if config.data.name == "arrays":
        path = pictures.write_arrays(tmp_path / "pictures.npz")
        overrides.append(("data.dir", str(path)))
    if config.data.name == "criteo":
        folder = tmp_path / "days"
        folder.mkdir(exist_ok=True)
        for day in range(4):
            clicks.write(folder / f"day_{day}.txt", clicks.rows(60, seed=day))
        days = "day" in config.data.train
        overrides += [("data.dir", str(folder if days else folder / "day_0.txt"))]
        overrides += [("data.cache_dir", str(tmp_path / "cache")), ("model.width", "2")]
    if config.init.pretrained and config.init.pretrained.startswith("orbax:"):
        source = variant.replace("target", "source")
        workdir = tmp_path / "source"
        run(resolved(source, tmp_path), workdir)
        overrides.append(("init.pretrained", f"orbax:{workdir}"))
        if config.data.fitted:
            overrides.append(("data.fitted", str(workdir)))
    if members := config.model.get("members", ()):
        if members[0].get("pretrained"):  # A teacher.
            teacher = "zoo:resnet20_fashion_mnist"
            overrides.append(("model.members[0].pretrained", teacher))
    config, problems = configs.resolve(config, overrides)
    assert not problems
    return config


def test_every_config_has_a_variant_here():
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert files == {variant.partition(":")[0] for variant in VARIANTS}
    for path in (ROOT / "configs").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 60 and "Command:" in text


def tier(variant):
    if variant in REPEATED:
        return pytest.mark.exhaustive
    return () if variant in QUICK else pytest.mark.slow


# Keys of `config.parallel` that are read before a run begins.
JOINING = (*LAUNCH, "join_timeout_s", "hang_timeout_s", "work_timeout_s")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=tier(v)) for v in VARIANTS])
def test_a_config_runs_and_every_key_is_read(variant, tmp_path, monkeypatch, request):
    for name, make in SMALLER.items():
        if name == "resnet20" and variant not in AT_RANDOM:
            continue  # Its weights in the zoo are those of the whole model.
        family = sys.modules[make.func.__module__]
        monkeypatch.setitem(family.MODELS, name, make)
    if variant not in QUICK:
        request.getfixturevalue("no_pictures")
    config = resolved(variant, tmp_path)
    recorded = Recording(config)
    result = run(recorded, tmp_path / "run")
    assert result["steps"] == sum(phase.steps for phase in config.plan)
    scores.check_run(tmp_path / "run", result["best"])
    unread = set(configs.flat(config)) - recorded.read
    # Read before a run begins.
    unread -= {"report.group", "report.tags"}  # Of Weights & Biases.
    unread -= {"deterministic", "checkpoint.grace_s", "population"}
    unread -= {"parallel.device_memory_gb", "parallel.topology"}  # Of plans.
    unread -= {f"parallel.{key}" for key in JOINING}
    if config.data.text or config.task.name == "tabular":
        unread -= {"data.mean", "data.std", "data.interpolation", "data.decode"}
    if config.init.fisher is None:
        unread -= {"init.fisher_examples"}
    if config.init.pretrained is None:
        unread -= {"init.fresh", "init.input_channels", "init.accept"}
    if config.extend is None:
        unread -= {"extend_from"}
    if config.task.name == "mutual":  # What several models need is not kept.
        unread -= {"data.cache_dir", "data.cache_gb"}
    assert not unread
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == result
    for name in ("config.json", "manifest.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run" / "report").exists() == (variant in QUICK)


def test_a_key_that_nobody_reads_would_be_seen(tmp_path):
    recorded = Recording(resolved("iris_mlp.py:tiny", tmp_path))
    make_setup(recorded)
    assert "report.wandb" not in recorded.read
    assert {"data.train", "plan[0].peak_lr", "model.hidden"} <= recorded.read


def test_every_field_of_a_phase_is_used_outside_its_definition():
    used = set()
    for path in (ROOT / "finetune_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
    assert {field.name for field in dataclasses.fields(Phase)} <= used
