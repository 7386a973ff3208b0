"""`model.jax`: a program with its weights, which jax alone runs, for any batch size."""

import pathlib
from typing import Any

import jax
from jax import export

from finetune_jax.core.errors import UserError
from finetune_jax.data.kind import kind_named
from finetune_jax.inference.export.exported_model import Trained, for_any_platform

PLATFORMS = ("cpu", "cuda")
# Flatbuffers, in which it is written, ends there.
LARGEST = 2**31
LOADER = pathlib.Path(__file__).parent / "load.py.txt"


def write(trained: Trained, folder: pathlib.Path) -> None:
    """Writes `model.jax` and `load.py`, which loads it.

    Raises:
        UserError: The model is too large for such a file.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.variables))
    if size >= LARGEST:
        raise UserError(
            f"--formats=jax: the weights have {size:,} bytes; such a file has less than "
            f"{LARGEST:,}. Leave it out: --formats=safetensors"
        )
    inputs = trained.inputs
    shape = jax.ShapeDtypeStruct(_sizes(trained), inputs.dtype)
    program = jax.jit(for_any_platform(trained))
    exported = export.export(program, platforms=PLATFORMS)(shape)
    (folder / "model.jax").write_bytes(exported.serialize())
    text = LOADER.read_text()
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        text = text.replace(
            "\n\ndef ", '\njax.config.update("jax_enable_x64", True)\n\n\ndef ', 1
        )
    (folder / "load.py").write_text(text)


def _sizes(trained: Trained) -> tuple[Any, ...]:
    """Returns the shape of a batch of any size, and of any length where inputs have one."""
    sizes = kind_named(trained.spec.kind).serving_shape(trained.spec)
    limits = [
        f"{size} <= {most}"
        for size, most in zip(sizes, trained.inputs.shape)
        if isinstance(size, str)
    ]
    names = ", ".join(map(str, ("b", *sizes)))
    return tuple(export.symbolic_shape(names, constraints=limits))
