"""The machine that a run is on: its processor, and where results are kept between runs."""

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator

from finetune_jax.core.paths import user_path

# Bytes from which an array has pages of its own, and the number of that option in glibc.
LARGE, M_MMAP_THRESHOLD = 2**20, -3
# Bytes that compiled programs may take on disk.
PROGRAMS = 2**31


def cache_folder() -> pathlib.Path:
    """Returns what runs share: FINETUNE_JAX_CACHE, or a folder in the user's cache."""
    if named := os.environ.get("FINETUNE_JAX_CACHE"):
        return user_path(named, "FINETUNE_JAX_CACHE")
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # A user without a home, as in some containers.
        return pathlib.Path(tempfile.gettempdir(), f"finetune_jax-{os.getuid()}")
    return home / "finetune_jax"


def keep_programs() -> None:
    """Has jax keep compiled programs on disk, unless the environment says where.

    To be called before jax starts. A program is for one kind of processor.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    lines = _cpu_lines()
    said = json.dumps([lines.get(k) for k in ("model name", "flags", "Features")])
    kind = hashlib.sha256(said.encode()).hexdigest()[:16]
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / f"programs-{kind}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def memory() -> int:
    """Returns the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def threads() -> int:
    """Returns how many threads XLA has on this machine: NPROC, or the cores."""
    return int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))


def free_at_once() -> None:
    """Has glibc return large arrays to the system when they are freed.

    Left alone it comes to keep those of up to 32 MB among small ones, in a heap that grows.
    """
    if option := getattr(ctypes.CDLL(None), "mallopt", None):
        option(M_MMAP_THRESHOLD, LARGE)


def give_back_memory() -> None:
    """Returns freed memory to the system; glibc keeps memory that a compiler has freed."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Has Python not look for cycles of garbage meanwhile, as around a trace by jax.

    It makes so many objects that are kept that a fifth of its time would go into looking.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cpu_lines() -> dict[str, str]:
    """Returns what the system says of the first processor."""
    lines: dict[str, str] = {}
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    return lines


def cpu() -> dict:
    """Returns the processor's name and its vector instructions, which decide bits."""
    lines = _cpu_lines()
    flags = lines.get("flags", lines.get("Features", "")).split()
    vector = ("avx", "fma", "amx", "sve", "asimd", "sse4")
    return {
        "name": lines.get("model name", platform.processor()),
        "vector": sorted(flag for flag in flags if flag.startswith(vector)),
    }
