import pathlib

import ml_collections
import pytest

from finetune_jax import config as configs
from finetune_jax.config.document import document
from finetune_jax.config.fields import keys_of
from finetune_jax.config.schema import Config, Seeds
from finetune_jax.core.errors import UserError
from finetune_jax.plans.phase import Phase, as_config


def given(**sections):
    config = configs.default()
    config.plan = as_config((Phase(steps=3),))
    with config.unlocked():
        for name, values in sections.items():
            config[name].update(values)
    return config


def test_a_resolved_config_survives_json():
    config, problems = configs.resolve(
        given(model={"widths": (1, 2)}, data={"augment": (("flip",),)}),
        [("init.fresh", "('head/.*', 'a')"), ("plan[0].clip_norm", "0.5")],
    )
    assert not problems
    again = configs.from_json(configs.to_json(config), "here")
    assert again == config and not configs.differences(config, again)
    assert again.plan[0].clip_norm == 0.5 and again.model.widths == (1, 2)


def test_all_that_is_wrong_is_told_at_once_with_close_matches():
    config = {"seed": 1, "data": {"batch_sise": 3, "image_size": "x"}, "modle": {}}
    config["plan"] = [{"steps": 1, "peek_lr": 1.0}, {"steps": 1.5}]
    _, problems = configs.resolve(config, [("data.test.x", "1"), ("nothing", "1")])
    assert [*map(str, problems)] == [
        "config.data.batch_sise: unknown; did you mean 'batch_size'?",
        "config.data.image_size: 'x' is not an integer",
        "config.modle: unknown; did you mean 'model'?",
        "config.plan[0].peek_lr: unknown; did you mean 'peak_lr'?",
        "config.plan[1].steps: 1.5 is not an integer",
        "--config.data.test.x: unknown",
        "--config.nothing: unknown",
    ]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("data.dir", "/some where", "/some where"),
        ("data.dir", "None", None),
        ("data.per_class", "10", 10),
        ("data.per_class", "None", None),
        ("data.mean", "0.5", (0.5,)),
        ("data.mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("init.fresh", "('head/.*',)", ("head/.*",)),
        ("plan[0].epochs", "2", 2.0),
        ("plan[0].steps", "None", None),
        ("plan[0].peak_lr", "1", 1.0),
        ("plan[0].rules", "(('a', 1), ('.*', 0))", (("a", 1), (".*", 0))),
        ("plan[0].optimizer_args.b1", "0.8", 0.8),
        ("model.hidden", "(8, 8)", (8, 8)),
        ("model.head.dropout", "0.5", 0.5),
    ],
)
def test_the_command_line_sets(key, text, value):
    config, problems = configs.resolve(given(), [(key, text)])
    assert not problems
    assert configs.flat(config)[key] == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("seed", "None", "not an integer"),
        ("seed", "1.5", "not an integer"),
        ("seed", "True", "not an integer"),
        ("seed", "-1", "0 to 4294967295"),
        ("precision", "float16", "did you mean"),
        ("data.batch_size", "0", "more than 0"),
        ("data.std", "0", "more than 0"),
        ("data.mean", "()", "numbers"),
        ("data.channels", "2", "not one of"),
        ("init.fresh", "('(',)", "not a regular"),
        ("plan[1].steps", "1", "plan has 1 entries"),
        ("plan", "()", "a section"),
        ("data", "3", "a section"),
        ("data.dri", "x", "did you mean 'dir'"),
        ("evaluate.ema_decay", "1.0", "less than 1"),
        ("data.memory_gb", "-1", "at least 0"),
        ("evaluate.every_steps", "1", "not both"),
    ],
)
def test_the_command_line_refuses(key, text, message):
    config = given(evaluate={"every_epochs": 1.0})
    _, problems = configs.resolve(config, [(key, text)])
    assert len(problems) == 1 and message in str(problems[0])


def test_an_override_leaves_the_given_config_alone():
    config = given()
    configs.resolve(config, [("plan[0].steps", "9"), ("seed", "9")])
    assert config.plan[0].steps == 3 and config.seed == 0


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "plan",
            (5,),
            "config.plan[0]: a int, not a ConfigDict; plans.as_config makes",
        ),
        ("plan", ({"optimizer_args": 5},), "plan[0].optimizer_args: 5 is not a dict"),
        ("plan", ({"schedule_args": (1,)},), "schedule_args: (1,) is not a dict"),
    ],
)
def test_an_entry_that_is_none_is_told(section, value, message):
    config = ml_collections.ConfigDict({section: value})
    assert any(message in str(text) for text in configs.resolve(config)[1])


def test_what_changes_no_result_is_no_difference():
    one, _ = configs.resolve(given())
    other, _ = configs.resolve(
        given(), [("report.every_steps", "3"), ("checkpoint.keep", "5"), ("seed", "1")]
    )
    assert configs.differences(one, other) == ["config.seed: 0 here, 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        ("def get_config(:", "SyntaxError"),
        ("import nothing_there", "ModuleNotFoundError"),
        ("def get_config(): return 3", "returned"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "AttributeError"),
    ],
)
def test_a_file_that_gives_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "some.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        configs.load(str(path))


def test_the_page_of_keys_is_that_of_the_schema():
    page = pathlib.Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == document() + "\n", (
        "docs/config.md is stale: python -m finetune_jax.config.document > docs/config.md"
    )


def test_every_key_has_a_meaning():
    def lacking(of):
        for name, key in keys_of(of).items():
            inside = key.section or key.entry
            yield from lacking(inside) if inside else ()
            if key.section is None and not key.meaning:
                yield f"{of.__name__}.{name}"

    assert not [*lacking(Config), *lacking(Seeds)]
