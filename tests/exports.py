"""Exports of runs, and the outputs of predictions to compare them with."""

import numpy as np

from finetune_jax import main as program
from finetune_jax.data.dataset import unlabelled
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.modes.startup import resolved_config


def export(workdir, output, *flags, formats="jax"):
    flags = [f"--output={output}", f"--formats={formats}", *flags]
    run_flags = ["--mode=export", f"--workdir={workdir}", "--config.parallel.devices=1"]
    assert program.run([*run_flags, *flags]) == 0
    return output


def predicted(workdir, inputs):
    """Returns the outputs of predictions, before they become records."""
    config = resolved_config("", workdir, [("parallel.devices", "1")])
    predictor = open_predictor(config, workdir)
    return predictor.state.outputs(unlabelled(inputs, predictor.spec))


def assert_close(found, wanted, tolerance=1e-6):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def images(examples=5, size=12, channels=1):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (examples, size, size, channels), np.uint8)
