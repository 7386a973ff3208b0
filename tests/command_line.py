"""Command lines, and how they are refused."""

import pathlib

import pytest

from finetune_jax import main
from finetune_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]

IRIS = f"--config={ROOT / 'configs' / 'iris_mlp.py'}"


def refused(*arguments):
    """Returns the message with which a command line is refused."""
    with pytest.raises(UserError) as found:
        main.run(list(arguments))
    return str(found.value)
