"""The machine that a run is on: its processor, and where results are kept between runs."""

import hashlib
import json
import os
import pathlib
import platform

# Bytes that compiled programs may take on disk.
PROGRAMS = 2**31


def cache_folder() -> pathlib.Path:
    """Returns what runs share: FINETUNE_JAX_CACHE, or a folder in the user's cache."""
    named = os.environ.get("FINETUNE_JAX_CACHE")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(named) if named else home / "finetune_jax"


def keep_programs() -> None:
    """Has jax keep compiled programs on disk, unless the environment says where.

    To be called before jax starts. A program is for one kind of processor.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    kind = hashlib.sha256(json.dumps(cpu()).encode()).hexdigest()[:16]
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / f"programs-{kind}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def cpu() -> dict:
    """Returns the processor's name and its vector instructions, which decide bits."""
    lines = {}
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    flags = lines.get("flags", lines.get("Features", "")).split()
    vector = ("avx", "fma", "amx", "sve", "asimd", "sse4")
    return {
        "name": lines.get("model name", platform.processor()),
        "vector": sorted(flag for flag in flags if flag.startswith(vector)),
    }
