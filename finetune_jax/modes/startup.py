"""Resolves the config and sets the environment of jax before jax is imported."""

import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import Any

from finetune_jax import config as configs
from finetune_jax.config import Config, plugins
from finetune_jax.config.parallel import LAUNCH
from finetune_jax.core.errors import UserError, collected, raise_if
from finetune_jax.core.machine import free_at_once, keep_programs
from finetune_jax.parallel import joining
from finetune_jax.plans.phase import plan_problems
from finetune_jax.report.workdir import (
    origin,
    read_config,
    read_manifest,
    read_recorded_config,
)

# Modes that several processes can run together.
TOGETHER = ("train",)
# Modes in which one process with several devices has the bits of several processes.
JOINS_ITSELF = ("train", "reproduce")
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def resolved_config(
    address: str,
    workdir: pathlib.Path | None,
    overrides: list[tuple[str, str]],
    *,
    reproduces: bool = False,
    extend: pathlib.Path | None = None,
) -> Config:
    """Returns the config of a file, or else of a workdir, with overrides.

    Args:
        address: FILE[:ARG] of `--config`; '' reads the workdir.
        workdir: Workdir of a run.
        overrides: (key, text) pairs of the command line.
        reproduces: Whether to read the config of the manifest instead of config.json.
        extend: Workdir of a finished run that this one goes on from; without `address`
            its config is read.

    Raises:
        UserError: Lists everything that is wrong with it.
    """
    if extend is not None:
        overrides = [*overrides, ("extend", str(extend))]
    if address:
        given = configs.load(address)
    elif extend is not None:
        given = read_config(extend)
    elif workdir is not None and reproduces:
        given = read_recorded_config(workdir)
    elif workdir is not None:
        given = read_config(workdir)
    else:
        raise UserError(
            "--config: missing; for example --config=configs/resnet_head.py"
        )
    config, problems = configs.resolve(given, overrides)
    problems += plan_problems(config.plan)
    if problems and not config.plugins:  # Which may add names, but are not loaded yet.
        # The program ends, so jax may start: it is needed to know all names.
        from finetune_jax.training.setup import check_before_data

        with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
            with collected(problems):
                check_before_data(config)
    raise_if(dict.fromkeys(problems))
    for line in plugins.ready(config.plugins, origin(config, workdir)):
        print(f"warning: {line}")
    return config


def pin_environment(
    workdir: pathlib.Path | None, deterministic: bool, parallel: Any = None
) -> None:
    """Sets NPROC, XLA_FLAGS and the folder of compiled programs before jax starts.

    A run that is resumed gets NPROC and XLA_FLAGS from its manifest: XLA divides
    reductions by the number of host threads, so another number changes the last bits. One
    process also gets as many CPU devices as the processes of the run had together.

    Args:
        workdir: Workdir of the run.
        deterministic: Whether a GPU gives the same bits again; without autotuning and
            atomic additions it is slower.
        parallel: Section `config.parallel`; None leaves the number of devices.
    """
    manifest = (read_manifest(workdir) if workdir else None) or {}
    threads = str(manifest.get("nproc") or "")
    if threads and not threads.isdigit():
        raise UserError(f"{workdir}/manifest.json: nproc is {threads!r}")
    if threads or "NPROC" not in os.environ:
        os.environ["NPROC"] = threads or str(len(os.sched_getaffinity(0)))
    flags = os.environ.get("XLA_FLAGS", "").split()
    if "XLA_FLAGS" not in os.environ:
        flags = str(manifest.get("xla_flags") or "").split()
        flags = [flag for flag in flags if not flag.startswith(joining.VIRTUAL_DEVICES)]
    devices = manifest.get("device_count", 1)
    if parallel is not None and manifest.get("backend") == "cpu" and devices > 1:
        is_set = any(flag.startswith(joining.VIRTUAL_DEVICES) for flag in flags)
        launch = joining.launch_of(parallel, os.environ, tpu=False)
        if launch.is_alone and not is_set and "JAX_NUM_CPU_DEVICES" not in os.environ:
            os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
            print(f"the CPU is divided into {devices} devices, as many as the run had")
    if deterministic:
        flags += [flag for flag in DETERMINISTIC if flag not in flags]
    if flags:
        os.environ["XLA_FLAGS"] = " ".join(flags)
    keep_programs()
    free_at_once()


def quiet_libraries() -> None:
    """Turns off notes and progress bars of libraries; their errors are still shown.

    Orbax warns through absl of every save that waits for the one before it.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("huggingface_hub", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def set_precision(precision: str) -> None:
    """Enables 64-bit numbers in jax for float64, and disables them otherwise.

    They also change random numbers of 32 bits, so a run after one in float64 in the same
    process would have other bits.
    """
    import jax

    jax.config.update("jax_enable_x64", precision == "float64")


def joined(config: Config, mode: str) -> Config:
    """Joins the processes of a run; returns the config without what only starts them.

    Args:
        config: Resolved config.
        mode: Mode of the command line.

    Raises:
        UserError: The processes cannot be joined, or the mode needs one process.
    """
    from finetune_jax.parallel import processes

    asked = config.parallel
    launch = joining.launch_of(asked, os.environ)
    if not launch.is_alone and mode not in TOGETHER:
        if launch.processes is not None:
            raise UserError(
                f"--mode={mode}: runs in one process, but {launch.processes} were started "
                f"({launch.started_by}); start one"
            )
    elif mode in JOINS_ITSELF:
        lines = joining.join(asked, launch)
        if processes.is_first():
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
    parallel = dataclasses.replace(asked, **dict.fromkeys(LAUNCH))
    return dataclasses.replace(config, parallel=parallel)


def part() -> None:
    """Waits for the other processes at the end of a run."""
    joining.leave()


def end_processes(error: Exception, text: str | None, status: int) -> None:
    """Ends this process and all others after an exception; returns if there is one.

    Args:
        error: The exception.
        text: Message for the user; None shows the traceback.
        status: Exit status.
    """
    from finetune_jax.parallel import watch

    if watch.is_on():
        watch.ended(error, text, status)
