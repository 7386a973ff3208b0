"""Checks of the scores of single examples."""

import numpy as np
import pytest

from finetune_jax.evaluation import per_example


def check_means(arrays, metrics):
    """Checks that scores are as many as examples, and that their means are metrics.

    Args:
        arrays: Content of `predictions.npz`.
        metrics: Metrics of the same state.
    """
    names = [name for name in arrays if name.split("/")[-1] not in ("id", "predicted")]
    names = [name for name in names if not name.endswith("ema_predicted")]
    assert names
    for name in names:
        ids, scores = per_example.scores_of(arrays, name)
        assert len(ids) == len(scores) == len(np.unique(ids))
        assert scores.mean() == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name
    return set(names)


def check_run(workdir, metrics):
    """Checks the scores in a workdir."""
    arrays = per_example.read(workdir)
    assert arrays is not None
    return check_means(arrays, metrics)
