"""The overview of a run: data, weights and plan in at most ten lines."""

import math
import pathlib
from collections.abc import Sequence

from finetune_jax.config import Config
from finetune_jax.core.pytrees import count, named
from finetune_jax.data.dataset import Data
from finetune_jax.data.kind import kind_named
from finetune_jax.training.initial.starting_state import Loaded
from finetune_jax.training.setup import Setup

# A phase of fewer updates is warned of. Chosen by us.
_FEW_UPDATES = 10
# Most lines about the data, the weights and the plan.
_DATA_LINES, _WEIGHTS_LINES, _PLAN_LINES = 4, 3, 3


def overview(setup: Setup, loaded: Loaded, notes: Sequence[str] = ()) -> list[str]:
    """Returns what a run trains on, starts from and does, in at most ten lines.

    Args:
        setup: Setup of the run.
        loaded: Weights that the run starts from.
        notes: Lines about config keys that files beside the weights decided.
    """
    sections = (
        ("data", data_lines(setup.config, setup.data), _DATA_LINES),
        ("weights", _weights_lines(loaded, notes), _WEIGHTS_LINES),
        ("plan", _plan_lines(setup), _PLAN_LINES),
    )
    return [
        f"{title if first == 0 else '':9}{_one_line(line)}"
        for title, lines, most in sections
        for first, line in enumerate(_at_most(most, lines))
    ]


def plan_warnings(setup: Setup) -> list[str]:
    """Returns lines for phases of few updates, and for devices that divide nothing."""
    examples, size = setup.data.spec.train_examples, setup.config.data.batch_size
    unused = [
        f"config.parallel.{axis}: {number}, but config.parallel.sharding divides no "
        f"parameter over {axis!r}, so each of these devices has all of them; 'fsdp' "
        "divides arrays of at least config.parallel.fsdp_min_mb"
        for axis, number in setup.devices.unused(setup.shapes.params).items()
    ]
    return unused + [
        f"config.plan[{index}], phase {phase.name!r}: {phase.steps:,} "
        f"update{'' if phase.steps == 1 else 's'} of {size:,} of {examples:,} examples; "
        "more epochs or a smaller config.data.batch_size train longer"
        for index, phase in enumerate(setup.plan)
        if phase.steps is not None
        and phase.steps < _FEW_UPDATES
        and setup.phase(index).compiled.probe is None
    ]


def _one_line(text: str) -> str:
    r"""Returns a text with escapes for line breaks and bytes that are not UTF-8.

    >>> print(_one_line("caf\n\udce9"))
    caf\n\udce9
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def _at_most(most: int, lines: Sequence[str]) -> list[str]:
    """Returns the lines, the last ones joined where there are too many."""
    return [*lines[: most - 1], *filter(None, ["; ".join(lines[most - 1 :])])]


def data_lines(config: Config, data: Data) -> list[str]:
    """Returns what a run trains on and is measured on, in at most four lines."""
    spec = data.spec
    if spec.domains:
        lines = [
            f"domain {name}: {of.train_examples:,} train examples, "
            f"{kind_named(of.kind).describe(of)}; "
            f"{of.describe_labels(of.train_counts)}"
            for name, of in spec.domains.items()
        ]
    else:
        sizes = {"train": data.train, **data.held_out}
        counts = ", ".join(f"{len(part):,} {split}" for split, part in sizes.items())
        place = pathlib.PurePath(config.data.dir or "").name
        name = f"{config.data.name} {place}".strip()
        kind = kind_named(spec.kind)
        names = [spec.describe_labels(data.label_counts()), kind.columns(spec)]
        described = f"{name}: {counts} examples, {kind.describe(spec)}"
        lines = [described, "; ".join(filter(None, names))]
    left = ["; ".join(data.not_used)] if data.not_used else []
    return _at_most(_DATA_LINES - len(left), lines) + left


def _weights_lines(loaded: Loaded, notes: Sequence[str]) -> list[str]:
    lines = [*loaded.lines, *notes]
    return lines or ["none: all parameters start at random"]


def _plan_lines(setup: Setup) -> list[str]:
    """Returns a line for every phase: length, trained parameters, optimizer."""
    params, lines = named(setup.shapes.params), []
    for index, phase in enumerate(setup.plan):
        trained, compiled = setup.phase(index).groups, setup.phase(index).compiled
        values = sum(math.prod(params[name].shape) for name in trained)
        given = "" if phase.epochs is None else f" ({phase.epochs:g} epochs)"
        lines.append(
            f"{phase.name}: {phase.steps:,} update{'' if phase.steps == 1 else 's'}{given} "
            f"of {values:,} of {count(setup.shapes.params):,} parameters, "
            f"{phase.optimizer}, {compiled.rates}"
        )
    return lines
