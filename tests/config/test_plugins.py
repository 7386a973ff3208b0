"""Plug-ins add choices, are checked, and are found by every mode that opens the workdir."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_elsewhere import family_in

from finetune_jax import config as configs
from finetune_jax.config import plugins
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.optim.algorithms import OPTIMIZERS

ROOT = pathlib.Path(__file__).parents[2]
SIGNS = """
import jax
import jax.numpy as jnp
import optax

from finetune_jax.optim.algorithms import OPTIMIZERS, Algorithm


def _signs(decay, rate):
    def signed(updates, params):
        return jax.tree.map(jnp.sign, updates)

    return optax.chain(optax.stateless(signed), decay, rate)


OPTIMIZERS["signs"] = Algorithm(make=_signs)
"""
CONFIG = """
from finetune_jax import config as configs
from finetune_jax.plans import Phase, as_config


def get_config():
    config = configs.default()
    config.data.update(name="iris", train="train[:60%]", validation="train[60%:]")
    config.model.update(name="MODEL", classes=3)
    config.plan = as_config((Phase(name="all", steps=2, optimizer="signs"),))
    config.parallel.devices = 1
    config.plugins = PLUGINS
    return config
"""


def config_text(model="mlp", names=()):
    return CONFIG.replace("MODEL", model).replace("PLUGINS", repr(tuple(names)))


@pytest.fixture
def undone(monkeypatch):
    """Forgets the plug-ins and the entries of a test when it ends."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_originals", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("config_", "signs", "other")):
            del sys.modules[name]
    for name in ("signs", "more"):
        OPTIMIZERS.pop(name, None)


def loaded(path):
    given = configs.load(str(path))
    config, problems = configs.resolve(given)
    assert not problems
    plugins.ready(config.plugins)
    return config


def test_a_file_beside_the_config_is_a_plugin(tmp_path, undone):
    (tmp_path / "signs.py").write_text(SIGNS)
    (tmp_path / "iris.py").write_text(config_text(names=["signs.py"]))
    config = loaded(tmp_path / "iris.py")
    assert config.plugins == (str(tmp_path / "signs.py"),)
    assert registry.added_by("signs") == ["optimizer 'signs'"]


def test_a_config_file_that_adds_an_entry_is_a_plugin(tmp_path, undone):
    (tmp_path / "iris.py").write_text(SIGNS + config_text())
    assert loaded(tmp_path / "iris.py").plugins == ("config_iris",)
    (tmp_path / "other.py").write_text(config_text().replace("signs", "adam"))
    assert loaded(tmp_path / "other.py").plugins == ()


def test_a_config_file_is_a_plugin_where_only_the_workdir_is_left(tmp_path, undone):
    helper = 'from signs import SIGNED\n\nOPTIMIZERS["more"] = SIGNED\n'
    (tmp_path / "signs.py").write_text(SIGNS + '\nSIGNED = OPTIMIZERS["signs"]\n')
    text = "from finetune_jax.optim.algorithms import OPTIMIZERS\n" + helper
    (tmp_path / "iris.py").write_text(text + config_text())
    sys.path.insert(0, str(tmp_path))
    names = loaded(tmp_path / "iris.py").plugins
    plugins.record(names, tmp_path / "run")
    for name in ("iris", "signs"):
        (tmp_path / f"{name}.py").unlink()
    for name in ("config_iris", "signs"):
        del sys.modules[name]
    plugins._loaded.clear()
    del OPTIMIZERS["signs"], OPTIMIZERS["more"]
    sys.path.remove(str(tmp_path))
    assert plugins.ready(names, tmp_path / "run") == []
    added = ["optimizer 'signs'", "optimizer 'more'"]
    assert registry.added_by("config_iris") == added


def test_an_entry_in_get_config_is_refused(tmp_path, undone):
    inside = "\n".join(f"    {line}" for line in SIGNS.splitlines())
    (tmp_path / "iris.py").write_text(f"def get_config():\n{inside}\n    return None\n")
    with pytest.raises(UserError, match="returned a"):
        configs.load(str(tmp_path / "iris.py"))
    text = (
        inside + "\n    from finetune_jax import config as c\n    return c.default()\n"
    )
    (tmp_path / "iris.py").write_text(f"def get_config():\n{text}")
    with pytest.raises(UserError, match="adds the optimizer 'signs'.*top level"):
        configs.load(str(tmp_path / "iris.py"))


@pytest.mark.parametrize("builtin", [True, False])
def test_a_plugin_cannot_replace_an_entry(builtin, tmp_path, undone):
    (tmp_path / "signs.py").write_text(SIGNS)
    name = "adam" if builtin else "signs"
    text = SIGNS.replace('["signs"]', f'["{name}"]') + "\n"
    (tmp_path / "others.py").write_text(text)
    names = [str(tmp_path / "signs.py"), str(tmp_path / "others.py")]
    owner = "finetune_jax" if builtin else "signs"
    before = OPTIMIZERS["adam"]
    with pytest.raises(
        UserError, match=f"others: the optimizer '{name}' is .* {owner}"
    ):
        plugins.ready(names)
    assert OPTIMIZERS["adam"] is before


def test_all_problems_of_plugins_are_told_at_once(tmp_path, undone):
    (tmp_path / "others.py").write_text("1 / 0\n")
    names = [str(tmp_path / "signs.py"), "no_such_module", str(tmp_path / "others.py")]
    with pytest.raises(UserError) as found:
        plugins.ready(names)
    lines = str(found.value).splitlines()
    assert "is not there" in lines[0] and "ZeroDivisionError" in lines[2]
    assert "no_such_module" in lines[1] and "path of its file" in lines[1]
    with pytest.raises(UserError, match="neither a module") as found:
        plugins.ready(["a b", 3, "x/m.py", "y/m.py"])
    assert len(str(found.value).splitlines()) == 3


def test_the_copy_is_used_once_the_file_has_changed(tmp_path, undone):
    file, workdir = tmp_path / "signs.py", tmp_path / "run"
    file.write_text(SIGNS)
    plugins.ready([str(file)])
    plugins.record([str(file)], workdir)
    first = OPTIMIZERS["signs"]
    file.write_text(SIGNS.replace("_signs", "_changed"))
    plugins.ready([str(file)])
    assert "_changed" in str(OPTIMIZERS["signs"].make)
    [line] = plugins.ready([str(file)], workdir)
    assert "has changed since the run began" in line
    assert "_signs" in str(first.make) and "_signs" in str(OPTIMIZERS["signs"].make)
    with pytest.raises(UserError, match="also has signs"):
        plugins.ready([], workdir)
    (workdir / "plugins" / "signs.py").write_text("")
    with pytest.raises(UserError, match=r"signs.py: damaged"):
        plugins.ready([str(file)], workdir)


def run_main(*arguments, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "finetune_jax.main", *arguments], cwd=folder,
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_every_mode_finds_the_plugins_of_a_workdir_alone(tmp_path):
    """The optimizer is in a package, the model in a folder on the module path."""
    mine = tmp_path / "mine"
    family_in(mine)
    (mine / "methods").mkdir()
    (mine / "methods" / "__init__.py").write_text("")
    (mine / "methods" / "named.py").write_text('NAME = "signs"\n')
    text = SIGNS.replace('["signs"]', "[NAME]")
    (mine / "methods" / "optimizers.py").write_text("from .named import NAME\n" + text)
    names = ["methods.optimizers"]
    (tmp_path / "iris.py").write_text(config_text(model="waves", names=names))
    workdir = f"--workdir={tmp_path / 'run'}"
    path = os.pathsep.join([str(ROOT), str(mine)])
    arguments = [f"--config={tmp_path}/iris.py", workdir]
    run_main(*arguments, folder=tmp_path, PYTHONPATH=path)
    mine.rename(tmp_path / "gone")
    (tmp_path / "iris.py").unlink()
    there = tmp_path / "run" / "plugins"
    found = {str(p.relative_to(there)) for p in there.rglob("*.py")}
    methods = {f"methods/{name}.py" for name in ("__init__", "named", "optimizers")}
    assert found == methods | {"finetune_jax/models/waves.py"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_main("--mode=evaluate", workdir, folder=elsewhere)
    told = run_main("--mode=reproduce", workdir, folder=elsewhere)
    assert "same bits" in told
    verdict = json.loads((tmp_path / "run/reproduce/verdict.json").read_text())
    assert verdict["environment"] == {}
