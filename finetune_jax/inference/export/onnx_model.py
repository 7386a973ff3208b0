"""`model.onnx`: written by jax2onnx, in an environment of its own.

Its pins clash with ours (it wants an older orbax), so a process of that environment makes
the model from files, converts it, and compares onnxruntime's outputs with jax's.
"""

import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np
from safetensors.numpy import save_file

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json
from finetune_jax.core.pytrees import named
from finetune_jax.inference.export.exported_model import Trained

ROOT = pathlib.Path(__file__).parents[3]
# Names the Python of an environment with jax2onnx and onnxruntime.
VARIABLE = "FINETUNE_JAX_ONNX_PYTHON"


def onnx_python() -> pathlib.Path | None:
    """Returns the Python that converts, None where there is none."""
    given = os.environ.get(VARIABLE)
    python = pathlib.Path(given or ROOT / ".venv-onnx" / "bin" / "python")
    return python if python.is_file() else None


def write(trained: Trained, folder: pathlib.Path) -> None:
    """Writes `model.onnx`.

    Raises:
        UserError: There is no such environment, or the model cannot be converted.
    """
    python = onnx_python()
    if python is None:
        raise UserError(
            "--formats=onnx: the converter needs an environment of its own. `make onnx` "
            f"makes it as .venv-onnx; {VARIABLE} may name the Python of another one."
        )
    with tempfile.TemporaryDirectory() as name:
        handed = pathlib.Path(name)
        leaves = named(trained.variables)
        # Strided arrays would be written wrongly.
        tensors = {key: np.array(leaf, order="C") for key, leaf in leaves.items()}
        save_file(tensors, handed / "weights.safetensors")
        (handed / "config.json").write_text(trained.config)
        write_json(handed / "spec.json", trained.spec.to_json())
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment |= {"JAX_PLATFORMS": "cpu"}
        command = [
            python,
            "-m",
            "finetune_jax.inference.export.onnx_worker",
            handed,
            folder,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise UserError(
                "--formats=onnx: the model cannot be converted:\n  "
                + "\n  ".join(lines[-12:])
            )
        found = json.loads(done.stdout.splitlines()[-1])
    print(f"onnxruntime differs from jax by {found['difference']:.1e} of the largest")
