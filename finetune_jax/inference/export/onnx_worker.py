"""Converts a model to ONNX; `onnx_model` runs it with the Python of another environment.

python -m finetune_jax.inference.export.onnx_worker HANDED FOLDER

HANDED has `config.json`, `spec.json` and `weights.safetensors`, in our own names.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from finetune_jax import config as configs
from finetune_jax.core.backend import traced_for
from finetune_jax.data.kind import kind_named
from finetune_jax.data.spec import DataSpec, spec_from_json
from finetune_jax.inference.export.exported_model import answer
from finetune_jax.models.peft.lora import LoRA
from finetune_jax.tasks import make_task

# Allowed difference of onnxruntime from jax, as a share of the largest output.
TOLERANCE = 1e-4
# A file of protocol buffers ends at 2 GB; beyond this, weights lie beside it.
LARGEST = 1.5e9


def read_model(
    handed: pathlib.Path,
) -> tuple[Callable, jax.ShapeDtypeStruct, DataSpec]:
    """Returns a function of inputs, the shape of one example, and the data's spec."""
    config = configs.from_json((handed / "config.json").read_text(), "config.json")
    # onnxruntime has no bfloat16 on CPU.
    config = dataclasses.replace(config, precision="float32")
    spec = spec_from_json(json.loads((handed / "spec.json").read_text()), config.data)
    task = make_task(config.task, config.model, config.precision, spec)
    module: Any = task.models[""]
    if isinstance(module, LoRA):
        models = dataclasses.replace(task.models, modules={"": module.module})
        task = dataclasses.replace(task, models=models)  # type: ignore
    leaves = load_file(handed / "weights.safetensors")
    wide = {name: leaf.astype(np.float32) for name, leaf in leaves.items()}
    variables = {"params": {}, "batch_stats": {}, **unflatten_dict(wide, sep="/")}

    def answered(inputs):
        # As on other backends, convolutions are written as such, not as products.
        with traced_for("gpu"):
            return answer(task, variables, inputs)

    return answered, task.batch_spec["inputs"], spec


def convert(answered: Callable, one: jax.ShapeDtypeStruct, path: pathlib.Path) -> None:
    """Writes a function of inputs as an ONNX model for any batch size."""
    import onnx  # type: ignore
    from jax2onnx import to_onnx  # type: ignore

    shape = jax.ShapeDtypeStruct((1, *one.shape), one.dtype)
    names = list(jax.eval_shape(answered, shape))
    symbolic: Any = jax.ShapeDtypeStruct(("batch", *one.shape), one.dtype)
    model: Any = to_onnx(
        lambda inputs: tuple(answered(inputs)[name] for name in names),
        inputs=[symbolic],
        input_names=["inputs"],
        output_names=names,
        model_name="finetune_jax",
        opset=21,
    )
    # Shapes between the layers are sometimes written wrongly, and nobody needs them.
    del model.graph.value_info[:]
    beside = model.ByteSize() > LARGEST
    onnx.save_model(
        model, path, save_as_external_data=beside, location=f"{path.name}.data"
    )
    onnx.checker.check_model(str(path))


def difference(
    answered: Callable, path: pathlib.Path, inputs_of: Callable[[int], np.ndarray]
) -> float:
    """Returns how far onnxruntime is from jax, of the largest output, at two sizes.

    Args:
        answered: Function of inputs.
        path: The ONNX model.
        inputs_of: Returns so many inputs.
    """
    import onnxruntime  # type: ignore

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in (1, 3):
        inputs = inputs_of(size)
        found = session.run(None, {"inputs": inputs})
        for ours, theirs in zip(jax.jit(answered)(inputs).values(), found):
            scale = np.abs(ours).max() or 1.0
            largest = max(largest, float(np.abs(ours - theirs).max() / scale))
    return largest


def main() -> None:
    """Converts, compares, and prints the difference as JSON."""
    handed, folder = map(pathlib.Path, sys.argv[1:])
    answered, one, spec = read_model(handed)
    inputs_of = functools.partial(kind_named(spec.kind).random_inputs, spec)
    path = folder / "model.onnx"
    convert(answered, one, path)
    found = difference(answered, path, inputs_of)
    if not found <= TOLERANCE:
        sys.exit(
            f"onnxruntime differs from jax by {found:.1e} of the largest output; at most "
            f"{TOLERANCE} is allowed"
        )
    print(json.dumps({"difference": found}))


if __name__ == "__main__":
    main()
