"""What decides the bits of a table of features besides its program and its variables."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
from typing import Any

import jax

import finetune_jax
from finetune_jax.core import machine
from finetune_jax.core.pytrees import digest
from finetune_jax.data.dataset import Dataset

# What has a part in how examples are read and programs compiled.
PACKAGES = (
    "finetune_jax", "jax", "jaxlib", "numpy", "pillow", "tensorflow-datasets",
    "array-record", "tokenizers",
)  # fmt: skip


def of_examples(dataset: Dataset) -> dict[str, Any]:
    """Returns what decides which examples a split has, and what is made of them."""
    source = dataset.source
    return {
        "data": source.fingerprint(),
        "splits": [[name, len(part)] for name, part in source.splits.items()],
        "examples": digest({"indices": dataset.indices}),
        "geometry": repr((dataset.geometry, dataset.shape)),
    }


@functools.cache
def of_machine() -> dict[str, Any]:
    """Returns what decides how inputs are made and how a program is computed."""
    device = jax.devices()[0]
    code = hashlib.sha256()
    folder = pathlib.Path(finetune_jax.__file__).parent / "data"
    for path in sorted(folder.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "data": code.hexdigest(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{device.platform} {device.device_kind}",
        "platform": device.client.platform_version,
        "cpu": machine.cpu(),
        "nproc": machine.threads(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
