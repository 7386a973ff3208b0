"""`model.jax`: a program with its weights, which jax alone runs, for any batch size."""

import pathlib

import jax
from jax import export

from finetune_jax.errors import UserError
from finetune_jax.exports.trained import Trained, for_any_platform

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
    (batch,) = export.symbolic_shape("b")
    inputs = trained.inputs
    shape = jax.ShapeDtypeStruct((batch, *inputs.shape), inputs.dtype)
    program = jax.jit(for_any_platform(trained))
    exported = export.export(program, platforms=PLATFORMS)(shape)
    (folder / "model.jax").write_bytes(exported.serialize())
    text = LOADER.read_text()
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        text = text.replace(
            "\n\ndef ", '\njax.config.update("jax_enable_x64", True)\n\n\ndef ', 1
        )
    (folder / "load.py").write_text(text)
