"""Every key of the config as text: `--help=config` and `--mode=config`."""

import ast

import pytest
from command_line import IRIS, ROOT, refused

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.config.document import assignments, described


def resolved(name, overrides=()):
    config, problems = configs.resolve(
        configs.load(f"{ROOT}/configs/{name}"), overrides
    )
    assert not problems
    return config


def values_in(lines):
    nodes = ast.parse("\n".join(lines)).body
    return {
        ast.unparse(node.targets[0]).removeprefix("config."): ast.literal_eval(
            node.value
        )
        for node in nodes
        if isinstance(node, ast.Assign)
    }


@pytest.mark.parametrize(
    "name", ["adapt_digits.py", "mutual_digits.py", "criteo.py", "head_population.py"]
)
def test_the_printed_lines_are_python_with_every_value(name):
    config = resolved(name, [("seed.order", "3")])
    printed = values_in(assignments(config))
    expected = configs.flat(config)  # It leaves out empty tables and dicts.
    assert {key: printed[key] for key in expected} == expected
    assert all(printed[key] in ((), {}) for key in printed.keys() - expected.keys())


def test_a_value_that_differs_from_its_default_is_marked_and_no_other():
    lines = list(assignments(resolved("iris_mlp.py", [("data.batch_size", "7")])))
    assert "config.data.batch_size = 7  # default: 64" in lines
    assert "config.data.test = 'test'  # default: None" in lines
    assert "config.data.dir = None" in lines
    assert "config.model.hidden = (16,)  # an argument of this model" in lines


def test_the_command_line_prints_a_config_without_a_workdir(capsys, tmp_path):
    assert main.run([IRIS, "--mode=config", "--config.precision=float64"]) == 0
    printed = capsys.readouterr().out
    assert "config.precision = 'float64'  # default: 'float32'" in printed
    assert values_in([printed])["plan[0].epochs"] == 40.0


def test_help_explains_a_key_a_section_or_everything(capsys):
    assert main.run(["--help=config.plan[0].peak_lr"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("config.plan[i].peak_lr = 0.001  (number; at least 0")
    assert "Highest learning rate" in printed
    assert "config.data.decode = 'fast'  (string; 'fast', 'exact')" in described(
        "config"
    )
    assert "config.seed.order" in described("config.seed")
    assert "config.plan" not in described("config.data")


def test_help_on_a_key_that_does_not_exist_names_a_similar_one():
    assert "did you mean 'config.data.batch_size'" in refused(
        "--help=config.data.batch_sise"
    )
