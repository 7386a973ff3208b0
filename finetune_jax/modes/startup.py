"""Resolves the config and sets the environment of jax, before jax starts."""

import os
import pathlib

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.errors import (
    UserError,
    problems_error,
)
from finetune_jax.core.machine import free_at_once, keep_programs
from finetune_jax.plans.phase import plan_problems
from finetune_jax.report.workdir import read_config, read_manifest, read_recorded_config

DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def resolved_config(
    address: str,
    workdir: pathlib.Path | None,
    overrides: list[tuple[str, str]],
    *,
    reproduces: bool = False,
) -> Config:
    """Returns the config of the file, or else of the workdir, with the overrides.

    Raises:
        UserError: Lists everything in it that is wrong.
    """
    if address:
        given = configs.load(address)
    elif workdir is not None and reproduces:
        given = read_recorded_config(workdir)
    elif workdir is not None:
        given = read_config(workdir)
    else:
        raise UserError("--config: which? For example --config=configs/resnet_head.py")
    config, problems = configs.resolve(given, overrides)
    problems += plan_problems(config.plan)
    if problems:
        raise problems_error("The config cannot be run:", problems)
    return config


def pin_environment(workdir: pathlib.Path | None, deterministic: bool) -> None:
    """Sets NPROC, XLA_FLAGS and where programs are kept, before jax starts.

    The first two are as the manifest says when there is a run already.

    XLA divides reductions by the number of host threads, so that another number gives
    other bits. Takes effect if no computation has been made yet.

    Args:
        workdir: Workdir of the run.
        deterministic: Whether a GPU shall give the same bits again, at the cost of what
            autotuning and atomic additions save.
    """
    manifest = (read_manifest(workdir) if workdir else None) or {}
    threads = str(manifest.get("nproc") or "")
    if threads and not threads.isdigit():
        raise UserError(f"{workdir}/manifest.json: nproc is {threads!r}")
    if threads or "NPROC" not in os.environ:
        os.environ["NPROC"] = threads or str(len(os.sched_getaffinity(0)))
    flags = os.environ.get("XLA_FLAGS", str(manifest.get("xla_flags") or "")).split()
    if deterministic:
        flags += [flag for flag in DETERMINISTIC if flag not in flags]
    if flags:
        os.environ["XLA_FLAGS"] = " ".join(flags)
    keep_programs()
    free_at_once()


def set_precision(precision: str) -> None:
    """Allows 64-bit numbers where the config computes with them, and only there.

    Where they are allowed, what is drawn in 32 bits differs too: a run in a process that
    made another one before would not have its bits.
    """
    import jax

    jax.config.update("jax_enable_x64", precision == "float64")
