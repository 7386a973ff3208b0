"""The page of a run says that its model was fitted to the validation split."""

import pytest
import small

from finetune_jax.plans import linear_probe
from finetune_jax.training.run import run


@pytest.mark.slow
def test_the_page_says_which_validation_results_are_of_an_unseen_split(tmp_path):
    overrides = [("evaluate.best", "validation/accuracy"), ("data.test", "None")]
    plan = linear_probe(penalties=(1e-1, 1e-2))
    found = run(small.config(plan=plan, overrides=overrides), tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert found["fitted_to"] == ["train", "validation"]
    assert "Validation metrics are from before the last fit" in page
    assert "to which the model was fitted, too" in page
