"""`manifest.json`: data, weights, versions and devices of a run, for reruns."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

from finetune_jax.core import machine
from finetune_jax.parallel import processes

PACKAGES = (
    "finetune_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
    "ml_collections", "tensorflow-datasets", "safetensors", "scikit-learn", "numpy",
    "pillow",
)  # fmt: skip


def make_manifest(
    *,
    config: dict,
    data: dict,
    data_fingerprint: str,
    also_fingerprint: dict[str, str],
    weights_sha256: dict[str, str],
    weights_layout: str | None,
) -> dict:
    """Returns what identifies a run: time, command, versions, commit, devices, inputs.

    Args:
        config: Resolved, as plain values.
        data: Description of the data, which predictions need.
        data_fingerprint: Fingerprint of the data.
        also_fingerprint: Fingerprint of the data of each other domain, by label.
        weights_sha256: Digest of every weight file, by path.
        weights_layout: How their tensors are named, None where there are none.
    """
    import jax  # Not at the top: a sweep looks at manifests before jax starts.

    return {
        "began": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "seed": config["seed"],
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": _git(),
        "code_sha256": code_digest(),
        "platform": platform.platform(),
        "cpu": machine.cpu(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "processes": processes.count(),
        "backend": jax.default_backend(),
        "nproc": os.environ.get("NPROC"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "config": {key: value for key, value in config.items() if key != "seed"},
        "data": data,
        "data_fingerprint": data_fingerprint,
        "also_fingerprint": also_fingerprint,
        "weights_sha256": weights_sha256,
        "weights_layout": weights_layout,
    }


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Returns the versions of the packages that results depend on."""
    return {name: _version(name) for name in PACKAGES}


@functools.cache
def code_digest() -> str:
    """Returns the sha256 over the code of this package."""
    digester, root = hashlib.sha256(), pathlib.Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digester.update(path.relative_to(root).as_posix().encode())
        digester.update(path.read_bytes())
    return digester.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git() -> dict | None:
    """Returns commit and state of the checkout that the code runs from, if it is one.

    The first call of a process answers for it, as its code has been loaded by then.
    """
    root = pathlib.Path(__file__).resolve().parents[2]

    def ask(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if pathlib.Path(ask("rev-parse", "--show-toplevel")) != root:
            return None
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None
