"""docs/models.md lists the models that exist, with their sizes."""

import re
import runpy

import pages
import pytest

from finetune_jax.models import constructors

PAGE = (pages.ROOT / "docs" / "models.md").read_text()
# A model of each family that has weights; the others are counted when the page is written.
COUNTED = (
    "resnet18", "efficientnet_lite0", "vgg11", "vit_tiny_patch16", "convnext_tiny",
    "resnet8", "distilbert_base",
)  # fmt: skip


def test_every_model_is_listed_and_no_other():
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.M)
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(set(names)) == sorted({*constructors()})


@pytest.mark.slow
def test_the_rows_are_those_of_the_registry():
    row = runpy.run_path(str(pages.ROOT / "scripts" / "models_page.py"))["row"]
    for name in COUNTED:
        assert row(name) in PAGE.splitlines(), (
            ".venv/bin/python scripts/models_page.py writes them"
        )
