"""The notebook works from its first cell to its last, and is stored without outputs.

Its cells are Python; they are run here without Jupyter, which would be a heavy dependency.
"""

import json
import os

import jax
import matplotlib
import matplotlib.pyplot as plt
import pages
import pytest

NOTEBOOK = json.loads((pages.ROOT / "docs" / "first_hour.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    assert NOTEBOOK["nbformat"] == 4
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] for cell in CELLS)
    assert all(cell["execution_count"] is None for cell in CELLS)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path, monkeypatch, capsys, no_pictures
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(pages.ROOT / "configs")
    monkeypatch.chdir(tmp_path / "docs")  # As Jupyter starts it.
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    matplotlib.use("agg")
    names = {}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
    plt.close("all")
    assert os.getcwd() == str(tmp_path)
    printed = capsys.readouterr().out
    assert "0 -> 0 " in printed and "4 -> 4 " in printed
    assert names["result"]["best"]["test/accuracy"] > 0.9
