"""Compiles functions ahead of time, with the options that each platform needs."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from finetune_jax.core.flops import count_flops
from finetune_jax.core.machine import give_back_memory, uncollected

# XLA's default scheduler computes values long before they are used: the same bits, but a
# full step of ResNet-20 takes up to four times the memory and a tenth more time.
CPU_OPTIONS: Any = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
# Options of programs that are not run: a third of the time, and the same memory and
# collectives in ViTs on one and on eight devices.
UNRUN_CPU_OPTIONS: Any = {
    **CPU_OPTIONS,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}

# Options for programs that run only a few times.
FOR_FEW: Any = {"xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class Tally:
    """Programs that were compiled, or loaded from the folder of compiled programs.

    Attributes:
        programs: Number of programs.
        seconds: Seconds that tracing, compiling and loading took.
    """

    programs: int = 0
    seconds: float = 0.0

    def __sub__(self, before: "Tally") -> "Tally":
        return Tally(self.programs - before.programs, self.seconds - before.seconds)


# All programs of this process so far.
_tally = Tally()


def tally() -> Tally:
    """Returns the number of programs that this process has compiled so far."""
    return _tally


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of a program.

    Attributes:
        flops: Floating-point operations; a loop of updates counts as one update.
        memory_bytes: Bytes of arguments, results and temporaries on one device.
    """

    flops: float
    memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled function.

    Attributes:
        call: Takes placed arguments.
        program: Program of XLA, which tells its text and its memory.
        compile_s: Seconds that tracing and compiling took.
        cost: Cost of a run, if it was asked for.
    """

    call: Callable
    program: Any
    compile_s: float
    cost: Cost | None = None


def compiled(
    jitted: Any,
    *arguments: Any,
    options: Any = None,
    for_running: bool = True,
    costs: bool = False,
) -> Compiled:
    """Returns a jitted or pmapped function compiled for the shapes of its arguments.

    Args:
        jitted: Function to compile.
        *arguments: Arguments, for their shapes.
        options: Options of XLA; None is `CPU_OPTIONS` on CPU.
        for_running: Whether the program will be run, or only asked for its memory.
        costs: Whether to count the cost of a run; not for pmapped functions.
    """
    begin = time.perf_counter()
    if options is None and _platform(arguments) == "cpu":
        options = CPU_OPTIONS if for_running else UNRUN_CPU_OPTIONS
    with uncollected():
        if costs:
            traced = jitted.trace(*arguments)
            flops = count_flops(traced.jaxpr.jaxpr)
            lowered = traced.lower()
            del traced
        else:
            flops, lowered = 0.0, jitted.lower(*arguments)
    program = lowered.compile(compiler_options=options)
    cost = Cost(flops, _memory_bytes(program)) if costs else None
    give_back_memory()
    seconds = time.perf_counter() - begin
    if for_running:
        global _tally
        _tally = Tally(_tally.programs + 1, _tally.seconds + seconds)
    return Compiled(call=program, program=program, compile_s=seconds, cost=cost)


def _memory_bytes(program: Any) -> int:
    """Returns the bytes of a program on one device; donated arguments count once."""
    found = program.memory_analysis()
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes
        + found.temp_size_in_bytes - found.alias_size_in_bytes
    )  # fmt: skip


def _platform(arguments: Any) -> str:
    """Returns the platform that a program is compiled for."""
    for leaf in jax.tree.leaves(arguments):
        # A plan may be for a platform that is not there.
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return next(iter(leaf.sharding.device_set)).platform
    return jax.default_backend()


def run_once(function: Callable, *arguments: Any) -> Any:
    """Returns the result of a function as numpy arrays, compiled for few runs."""
    return compiled_for_few(function, *arguments)(*arguments)


def compiled_for_few(function: Callable, *arguments: Any) -> Callable:
    """Returns a function whose results are numpy arrays, compiled for few runs.

    Random initial values are quick to compute and slow to compile: at XLA's lowest level
    of optimisation that still vectorises, ResNet-20's take 2 s instead of 16 s, and have
    the same bits.

    Args:
        function: Function to compile.
        *arguments: Arguments, for their shapes.
    """
    program = compiled(jax.jit(function), *arguments, options=FOR_FEW).call
    return lambda *given: jax.tree.map(np.asarray, program(*given))
