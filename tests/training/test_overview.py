"""The first lines of a run: data, weights and plan."""

import dataclasses

import numpy as np
import pytest
import small

from finetune_jax import main
from finetune_jax.core.files import write_text
from finetune_jax.data.dataset import Data, no_data
from finetune_jax.data.text.tokens import TextOptions, TextSpec
from finetune_jax.plans import linear_probe
from finetune_jax.plans.phase import Phase
from finetune_jax.report.workdir import read_json
from finetune_jax.training.initial.starting_state import Loaded
from finetune_jax.training.overview import data_lines, overview, plan_warnings
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

NOTHING = Loaded(sha256={}, layouts={})
SHORT = (Phase(name="all", steps=1, optimizer="sgd", peak_lr=0.1),)


def overview_of(plan=SHORT, loaded=NOTHING, notes=(), **fields):
    setup = make_setup(small.config(model="mlp", plan=plan, hidden=(4,)))
    data = Data(**{**vars(setup.data), **fields})
    return overview(type(setup)(**{**vars_of(setup), "data": data}), loaded, notes)


def vars_of(setup):
    return {name: getattr(setup, name) for name in type(setup).__dataclass_fields__}


def test_data_weights_and_plan_are_told_with_classes_and_their_counts():
    lines = overview_of(not_used=("3 files in photos: 2 .txt, 1 .json",))
    assert lines[0].startswith("data     digits: 1,078 train, 360 validation, 359 test")
    assert lines[1].strip().startswith("10 classes: 0 (107), 1 (109)")
    assert "3 files in photos" in lines[2]
    assert lines[3] == "weights  none: all parameters start at random"
    assert lines[4].startswith("plan     all: 1 update of")


def test_a_phase_of_few_updates_is_warned_of_but_not_a_probe():
    few = Phase(name="few", epochs=1, warmup_share=0.5)
    enough = Phase(name="enough", steps=10)
    config = small.config(plan=(*linear_probe(), few, enough))
    setup = make_setup(config.replaced(data={"batch_size": 512}))
    assert plan_warnings(setup) == [
        "config.plan[1], phase 'few': 3 updates of 512 of 1,078 examples; more epochs or "
        "a smaller config.data.batch_size train longer"
    ]
    assert setup.plan[1].warmup_steps == 2


def test_at_most_ten_lines_are_told_and_none_is_lost():
    plan = tuple(Phase(name=f"p{n}", steps=1) for n in range(7))
    loaded = Loaded(sha256={}, layouts={}, lines=tuple(f"note{n}" for n in range(9)))
    left = tuple(f"left{n}" for n in range(5))
    lines = overview_of(plan, loaded, ("key",), not_used=left)
    assert len(lines) <= 10
    text = "\n".join(lines)
    wanted = [f"p{n}:" for n in range(7)] + [f"note{n}" for n in range(9)]
    assert [word for word in (*wanted, *left, "key") if word not in text] == []


def test_many_classes_are_told_in_short():
    spec = small.spec(classes=1000)
    spec = type(spec)(**{**vars(spec), "train_counts": (*range(1, 1000), 5000)})
    setup = make_setup(
        small.config(model="mlp", plan=SHORT, hidden=(4,)), no_data(spec)
    )
    line = overview(setup, NOTHING)[1]
    assert "1000 classes: 0 (1)" in line and "988 more" in line
    assert "1 to 5,000 examples each" in line and len(line) < 200


def test_the_report_and_the_manifest_have_the_same_lines(tmp_path, capsys):
    config = small.config(model="mlp", plan=SHORT, hidden=(4,))
    run(config, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    kept = (read_json(tmp_path / "manifest.json") or {})["overview"]
    assert printed[: len(kept)] == kept
    page = (tmp_path / "report" / "index.html").read_text()
    assert all(line.strip() in page for line in kept)


@pytest.mark.parametrize(
    "arguments",
    [
        ("configs/resnet_head.py", "--config.evaluate.cka=1"),
        ("configs/resnet_head.py", "--config.evaluate.also=(({'label': 'x'}),)"),
        (
            "configs/adapt_digits.py",
            "--config.data.batch_size=6",
            "--config.plan[0].accumulate_steps=2",
        ),
    ],
)
def test_the_plan_is_refused_where_training_is(arguments, monkeypatch, tmp_path):
    name, *overrides = arguments
    messages = []
    for mode in ("plan", "train"):
        with pytest.raises(main.UserError) as error:
            main.run([f"--config={name}", f"--mode={mode}", *overrides,
                      f"--workdir={tmp_path}"])  # fmt: skip
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_files_with_names_that_are_not_utf8_can_be_written_about(tmp_path):
    write_text(tmp_path / "card.md", "class caf\udce9, \N{SNOWMAN}\n")
    assert (tmp_path / "card.md").read_bytes() == b"class caf\\udce9, \xe2\x98\x83\n"


def test_an_unwritable_file_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="card.md") as error:
        write_text(tmp_path / "card.md", "text")
    assert error.value.errno == 28


def test_tags_are_told_with_the_words_that_have_them():
    text = TextSpec(options=TextOptions(labels="tags"), vocabulary=9)
    spec = dataclasses.replace(
        small.spec(shape=(2, 3), classes=2), kind="text", inputs=text
    )
    spec = dataclasses.replace(spec, class_names=("O", "B-LOC"), train_counts=(2,))
    data = no_data(spec)
    label = np.array([[0, 1, -1], [0, 0, -1]], np.int32)
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, label=label))
    assert data_lines(small.config(), data)[1] == "2 classes: O (3), B-LOC (1)"


def test_a_line_break_in_a_name_does_not_break_a_line():
    line = "10 classes: a\nb, caf\udce9, caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    lines = overview_of(not_used=(line,))
    assert not any("\n" in one or "\udce9" in one for one in lines)
    assert "a\\nb, caf\\udce9, caf\N{LATIN SMALL LETTER E WITH ACUTE}" in "".join(lines)
