"""A kind of data is a folder: no other package branches on it, and a new one trains."""

import ast
import json
import pathlib
import sys
import textwrap

import numpy as np
import pytest
import small

from finetune_jax import data, tasks
from finetune_jax.data import sources
from finetune_jax.data.kind import Kind, kind_named, kind_names
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run

PACKAGE = pathlib.Path(data.__file__).parents[1]
# Attributes of a spec, or of `config.data`, that only some kinds of data have.
OF_A_KIND = {"text", "table", "pixel_classes", "targets", "pixels", "kind"}
SPECS = ("spec", "data", "of", "own")
# The one check of a task's data, and the manifest's names of labels.
ALLOWED = {"tasks/components/accepts.py", "weights/metadata/labels.py"}


def conditions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.BoolOp):
            yield node
        elif isinstance(node, ast.Match):
            yield node.subject


def branches(text):
    """Returns the conditions on the kind of data in a module, as source."""
    found = set()
    for condition in conditions(ast.parse(text)):
        for node in ast.walk(condition):
            if isinstance(node, ast.Attribute) and node.attr in OF_A_KIND:
                base = node.value
                name = getattr(base, "attr", getattr(base, "id", ""))
                if name in SPECS or name.endswith("_spec"):
                    found.add(ast.unparse(condition))
            if isinstance(node, ast.Name) and node.id in (
                "TextSpec", "TableSpec", "ArraySpec",
            ):  # fmt: skip
                found.add(ast.unparse(condition))
    return sorted(found)


def test_no_other_package_branches_on_the_kind_of_data():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("data/") and name not in ALLOWED:
            if lines := branches(path.read_text()):
                found[name] = lines
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "if spec.text is not None: pass",
        "x = 1 if setup.data.spec.table else 2",
        "if self.data.pixel_classes or 0: pass",
        "names = spec.class_names or spec.targets",
        "y = [d for d in z if d.spec.kind == 'text']",
        "assert config.data.text",
        "if isinstance(spec.inputs, TextSpec): pass",
    ],
)
def test_a_branch_on_the_kind_of_data_is_found(text):
    assert branches(text)


def test_the_shared_modules_of_data_name_no_kind_in_a_condition():
    names = {f'"{name}"' for name in kind_names()}
    wrong = []
    for path in sorted((PACKAGE / "data").glob("*.py")):
        for condition in conditions(ast.parse(path.read_text())):
            for node in ast.walk(condition):
                if isinstance(node, ast.Compare) and "kind" in ast.unparse(node.left):
                    if any(name.strip('"') in ast.unparse(node) for name in names):
                        wrong.append(f"{path.name}: {ast.unparse(condition)}")
    assert not wrong


def test_every_kind_is_found_by_its_folder():
    assert {"images", "tables", "text", "vectors"} <= set(kind_names())
    assert all(isinstance(kind_named(name), Kind) for name in kind_names())
    with pytest.raises(KeyError, match="no kind of data 'smells'"):
        kind_named("smells")


SOURCE = """
import numpy as np

KINDS = ("waves",)


def load_waves(directory):
    rng = np.random.default_rng(0)
    label = np.arange(60) % 2
    return [
        np.sin(np.arange(rng.integers(32, 64)) * (0.3 + kind)) + rng.normal(size=1)
        for kind in label
    ], label.astype(np.int32)
"""
KIND = """
import numpy as np

from finetune_jax.data import sources
from finetune_jax.data.dataset import unlabelled
from finetune_jax.data.kind import Kind, Opened, Prepared, suffix_rule
from finetune_jax.data.preprocessing import ArraySpec
from finetune_jax.data.source import ArrayExamples, Source


def spectrum(wave):
    return np.abs(np.fft.rfft(wave, 32))[:16].astype(np.float32)


class Reader:
    files = suffix_rule((".wave",), "waveforms")

    def __init__(self, spec):
        self.spec = spec

    def read(self, paths, errors):
        for path in paths:
            errors.append(None)
            wave = np.array([spectrum(np.loadtxt(path))])
            yield [str(path)], unlabelled(wave, self.spec)

    def convert(self, given):
        inputs = np.stack([spectrum(wave) for wave in given])
        return False, [(range(len(given)), unlabelled(inputs, self.spec))]


class Waves(Kind):
    def open(self, section, resources):
        from finetune_jax.data.sources import tones

        waves, label = tones.load_waves(section["dir"])
        values = np.stack([spectrum(wave) for wave in waves])
        source = Source(
            name="tones",
            splits={"all": ArrayExamples(values=values, label=label)},
            class_names=("low", "high"),
            fingerprint=lambda: "tones",
        )
        ready = Prepared(
            source=source, shape=(16,), train_shape=(16,), inputs=ArraySpec()
        )
        return Opened(kind="waves", source=source, prepare=lambda train: ready)

    def inputs_from_json(self, plain, section):
        return ArraySpec()

    def inputs_to_json(self, spec):
        return {}

    def reader(self, spec, section, workdir):
        return Reader(spec)

    def describe(self, spec):
        return "waveforms of any length"


KIND = Waves()
"""
TASK = """
from finetune_jax.tasks.classify import METRICS as METRICS
from finetune_jax.tasks.classify import make as make

ACCEPTS = (("waves", "classes"),)
"""


@pytest.fixture
def waves(tmp_path, monkeypatch):
    """Adds a kind of data, a source and a task that lie outside of the package."""
    content = {
        "data/waves/__init__.py": "", "data/waves/kind.py": KIND,
        "sources/tones.py": SOURCE, "tasks/hear.py": TASK,
    }  # fmt: skip
    for name, text in content.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    for package, name in ((data, "data"), (sources, "sources"), (tasks, "tasks")):
        path = str(tmp_path / "own" / name)
        monkeypatch.setattr(package, "__path__", [*package.__path__, path])
    yield
    # Later runs of this process would record modules from outside as theirs.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_new_kind_of_data_is_a_folder_and_trains(waves, tmp_path, capsys):
    config = small.config(
        model="mlp", hidden=(8,), plan=(Phase(name="all", steps=2, peak_lr=0.1),)
    )
    config = config.replaced(
        task={"name": "hear"}, data={"name": "tones", "image_size": None}
    )
    result = run(config, tmp_path / "run")
    assert result["steps"] == 2 and np.isfinite(result["final"]["test/loss"])
    assert "waveforms of any length" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["kind"] == "waves"
    predictor = open_predictor(config, tmp_path / "run")
    waves = [np.ones(40), np.sin(np.arange(50) * 1.3)]
    _, [(places, dataset)] = predictor.reader.convert(waves)
    assert len(predictor.records(dataset)) == len(places) == 2


def test_a_task_refuses_a_kind_of_data_that_it_does_not_take(waves, tmp_path):
    config = small.config(model="mlp", hidden=(8,))
    config = config.replaced(data={"name": "tones", "image_size": None})
    with pytest.raises(ValueError, match="waves with classes; such data is for 'hear'"):
        run(config, tmp_path / "run")
    config = config.replaced(data={"train_size": 9})
    with pytest.raises(
        ValueError, match="config.data.train_size: 9, but the data has no"
    ):
        run(config, tmp_path / "run")
