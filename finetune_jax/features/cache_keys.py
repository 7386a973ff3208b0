"""Cache key of a feature table: code, package versions and hardware."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
from typing import Any

import jax

from finetune_jax import data
from finetune_jax.config import plugins
from finetune_jax.core import machine
from finetune_jax.data import sources

# Packages that read examples or compile programs.
PACKAGES = (
    "finetune_jax", "jax", "jaxlib", "numpy", "pillow", "tensorflow-datasets",
    "array-record", "tokenizers",
)  # fmt: skip


@functools.cache
def of_machine() -> dict[str, Any]:
    """Returns code, package versions and hardware that features depend on."""
    device = jax.devices()[0]
    code = hashlib.sha256()
    folders = {*data.__path__, *sources.__path__}  # Some may be added elsewhere.
    for path in sorted(
        {path for f in folders for path in pathlib.Path(f).rglob("*.py")}
    ):
        code.update(path.read_bytes())
    extended = {"plugins": found} if (found := plugins.digests()) else {}
    return extended | {
        "data": code.hexdigest(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{device.platform} {device.device_kind}",
        "platform": device.client.platform_version,
        "cpu": machine.cpu(),
        "nproc": machine.threads(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
