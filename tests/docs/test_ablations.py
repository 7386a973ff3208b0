"""The sweep of docs/ablations.md, shortened to two updates a run."""

import json
import os
import re

import pages
import pytest

from finetune_jax import sweep as program
from finetune_jax.core.errors import UserError
from finetune_jax.sweeps.schedule import check

PAGE = pages.ROOT / "docs" / "ablations.md"
BLOCKS = [b for b in pages.blocks(PAGE) if b.language == "python"]


def written(folder, block, replaced=()):
    text = block.text
    for pattern, other in replaced:
        text, count = re.subn(pattern, other, text)
        assert count, pattern
    path = folder / (block.file or "search.py")
    path.write_text(text)
    return path


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(pages.ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", str(len(os.sched_getaffinity(0))))
    return tmp_path


def test_all_sweeps_of_the_page_resolve(in_folder):
    for block in BLOCKS:
        sweep, _ = program.load(str(written(in_folder, block)))
        assert check(sweep)


@pytest.mark.slow
def test_the_commands_of_the_page_lead_to_a_table(in_folder, capsys):
    # The eight devices of the tests do not divide the batch, and ResNet-20 compiles for
    # minutes.
    keys = (
        '"parallel.devices": 1, "model.name": "resnet8", "init.pretrained": None, '
        '"init.fresh": (), '
    )
    short = [
        (r'"steps": 60', '"steps": 2'), ("steps=30", "steps=2"), ("seeds=3", "seeds=2"),
        (r"\(1e-3, 1e-2\)", "(1e-2,)"), (r'"((noisy )?digits)": \{', rf'"\1": {{{keys}'),
        ("baseline=", "pages=False, keep='none', threads=1, baseline="),
    ]  # fmt: skip
    written(in_folder, BLOCKS[0], short)
    commands = [b.text for b in pages.blocks(PAGE) if "--sweep=ablation.py" in b.text]
    assert len(commands) == 2
    for command in commands:
        words = [w for w in command.split()[3:] if w != "--jobs=2"]
        assert program.run(words) == 0
        said = capsys.readouterr().out
    for arm in ("head", "norms", "last stage", "head, then all", "all"):
        assert re.search(rf"\b{arm}\b", said)
    index = json.loads((in_folder / "runs/ablation/sweep.json").read_text())
    assert len(index["members"]) == 20
    assert (in_folder / "runs/ablation/report/index.html").is_file()
    two = [f"runs/ablation/by_arm/digits/{arm}/seed0" for arm in ("head", "all")]
    assert program.run(["compare", *two]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    with pytest.raises(UserError):
        program.run(["compare", two[0], "nothing"])
