"""Fine-tuning strategies: functions that return plans.

A plan is a tuple of phases; any other strategy is a tuple written by hand. `stages` are
the stages with parameters, the head last, as `models.stages_of` lists them. Every other
keyword is a field of `Phase` for every phase; `steps`, `epochs` and `peak_lr` may be
tuples with a value for each phase.

Running averages of BatchNorm move in trained stages unless a strategy says otherwise;
in frozen stages they never move. Phases start with a fresh optimizer state; with
`optimizer_state='carry'` parameters that were trained before keep theirs.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.plans.phase import Phase

HEAD = "head/.*"
HEAD_ONLY = ((HEAD, 1.0), (".*", 0.0))
EVERYTHING = ((".*", 1.0),)
BIASES = ".*/bias"
NORMS = r".*/([^/]*_)?(bn|ln|norm)\d*/(scale|bias)"
LORA = ".*/lora_[ab]"
ULMFIT_DECAY = 1 / 2.6  # Howard & Ruder 2018, sec. 3.2.
PER_PHASE = ("steps", "epochs", "peak_lr")

Rules = tuple[tuple[str, float], ...]


def head_only(*, name: str = "head", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains the head and freezes the rest, BatchNorm included."""
    return _single(name, HEAD_ONLY, {"batch_stats": "hold", **fields})


def linear_probe(*, name: str = "probe", **arguments) -> tuple[Phase, ...]:
    """Returns a plan that fits a head to the features of a frozen backbone.

    L-BFGS minimises the loss of all training examples with an L2 penalty, for a path of
    penalties of which the validation split chooses one. As the last phase of a plan it
    then fits training and validation examples together. It is one update, and takes
    seconds. Dropout is off.

    Args:
        name: Name of the phase.
        **arguments: `penalties`, `iterations` and `refit`; see `optim.penalty_path`.

    Source: Kornblith et al. 2019, section 4.1 and appendix A.
    """
    fields = {"steps": 1, "peak_lr": 1.0, "schedule": "constant"}
    fields |= {"optimizer": "linear_probe", "optimizer_args": arguments}
    return head_only(name=name, **fields)


def full(*, name: str = "all", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains every parameter."""
    return _single(name, EVERYTHING, fields)


def partial(
    stages: Sequence[str],
    *,
    named: Sequence[str] = (),
    last: int | None = None,
    name: str = "partial",
    **fields,
) -> tuple[Phase, ...]:
    """Returns a plan that trains a part of the model.

    Args:
        stages: Stages of the model.
        named: Stages to train, or deeper parts such as 'stage2/block1'; the head only if it
            is named.
        last: Number of last stages to train instead; the head is one of them.
        name: Name of the phase.
        **fields: Fields of the phase.

    Raises:
        UserError: Neither or both of `named` and `last`, or unknown parts.
    """
    _check(stages, "partial")
    if bool(named) == (last is not None):
        raise UserError("strategies.partial: give exactly one of named and last")
    if last is not None:
        if not 1 <= last <= len(stages):
            raise UserError(
                f"strategies.partial: last={last}; 1 to {len(stages)} is needed, the "
                f"number of stages: {', '.join(stages)}"
            )
        named = stages[-last:]
    parts = (named,) if isinstance(named, str) else tuple(named)
    _check_parts(stages, parts, "strategies.partial, named")
    return _single(name, _rules(stages, dict.fromkeys(parts, 1.0)), fields)


def surgical(
    stages: Sequence[str],
    *,
    block: str,
    head: bool = True,
    name: str = "surgical",
    **fields,
) -> tuple[Phase, ...]:
    """Returns a plan that trains one block, and the head.

    The running averages of the block's whole stage move; `batch_stats='hold'` keeps them.

    Args:
        stages: Stages of the model.
        block: A stage, or a part of one such as 'stage2/block1'.
        head: Whether to train the head too. The paper keeps the source's head, which needs
            the source's classes; otherwise the head is new and must be trained.
        name: Name of the phase.
        **fields: Fields of the phase.

    Raises:
        UserError: The model has no such stage.

    Source: Lee et al. 2023.
    """
    _check(stages, "surgical")
    _check_parts(stages, (block,), "strategies.surgical, block")
    parts = [block, *stages[-1:]] if head else [block]
    return _single(name, _rules(stages, dict.fromkeys(parts, 1.0)), fields)


def discriminative(
    stages: Sequence[str], *, decay: float, name: str = "all", **fields
) -> tuple[Phase, ...]:
    """Returns a plan that trains all stages, each at `decay` times the next one's rate.

    Args:
        stages: Stages of the model.
        decay: More than 0; the head has the whole rate. ULMFiT's is `ULMFIT_DECAY`.
        name: Name of the phase.
        **fields: Fields of the phase.

    Raises:
        UserError: `decay` is not more than 0.

    Source: Howard & Ruder 2018, sec. 3.2.
    """
    _check(stages, "discriminative")
    return _single(
        name, _rules(stages, _rates(stages, decay, "discriminative")), fields
    )


def layerwise(stages: Sequence[str], **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains the head, then one stage more in each phase."""
    _check(stages, "layerwise")
    return _sequence(_unfreezing(stages), fields, "layerwise")


def gradual(
    stages: Sequence[str], *, decay: float = 1.0, **fields
) -> tuple[Phase, ...]:
    """Returns a plan of gradual unfreezing: the head, then one stage more in each phase.

    Rates are slanted triangles: a warm-up, which is a tenth of the phase where its length
    is given in steps, then linear to 1/32.

    Args:
        stages: Stages of the model.
        decay: Factor of the rate from a stage to the one before it; 1.0 is one rate,
            `ULMFIT_DECAY` the paper's discriminative fine-tuning.
        **fields: Fields of the phases.

    Raises:
        UserError: `decay` is not more than 0.

    Source: Howard & Ruder 2018, sec. 3.2 and 3.3.
    """
    _check(stages, "gradual")
    if "schedule" not in fields:
        fields = {"schedule": "linear", "end_lr_scale": 1 / 32, **fields}
    phases = _sequence(_unfreezing(stages, decay, "gradual"), fields, "gradual")
    if "warmup_steps" in fields:
        return phases
    return tuple(
        dataclasses.replace(phase, warmup_steps=(phase.steps or 0) // 10)
        for phase in phases
    )


def progressive(
    stages: Sequence[str],
    *,
    peak_lr: float = Phase.peak_lr,
    start_scale: float = 0.01,
    **fields,
) -> tuple[Phase, ...]:
    """Returns a plan whose rate grows back as more stages learn, the head first.

    The peak rate of the phases rises by equal factors from `start_scale * peak_lr`, for
    the head alone, to `peak_lr`, for all.

    Args:
        stages: Stages of the model.
        peak_lr: Peak rate of the last phase.
        start_scale: Peak rate of the first phase as a share; chosen by us.
        **fields: Fields of the phases.

    Raises:
        UserError: `start_scale` is not more than 0 and at most 1.
    """
    _check(stages, "progressive")
    if not 0 < start_scale <= 1:
        raise UserError(f"strategies.progressive: start_scale={start_scale}; 0 to 1")
    rises = max(len(stages) - 1, 1)
    rates = tuple(
        peak_lr * start_scale ** ((len(stages) - 1 - index) / rises)
        for index in range(len(stages))
    )
    return _sequence(_unfreezing(stages), {**fields, "peak_lr": rates}, "progressive")


def two_stage(*, head_lr: float, all_lr: float, **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains the head, then all: LP-FT.

    Args:
        head_lr: Peak rate of the first phase.
        all_lr: Peak rate of the second, commonly much lower.
        **fields: Fields of the phases; `epochs=(5, 20)` are the lengths of each.

    Source: Kumar et al. 2022.
    """
    parts = [("head", HEAD_ONLY), ("all", EVERYTHING)]
    return _sequence(parts, {**fields, "peak_lr": (head_lr, all_lr)}, "two_stage")


def alternating(stages: Sequence[str], *, cycles: int, **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains the head and the backbone in turn, the head first.

    Args:
        stages: Stages of the model.
        cycles: Number of phases of each.
        **fields: Fields of the phases; a tuple (head, backbone) holds for every cycle.

    Raises:
        UserError: `cycles` is less than 1, or there is no backbone.
    """
    _check(stages, "alternating", at_least=2)
    if cycles < 1:
        raise UserError(
            f"strategies.alternating: cycles={cycles}; at least 1 is needed"
        )
    backbone = _rules(stages, dict.fromkeys(stages[:-1], 1.0))
    parts = [
        (f"{name}{cycle + 1}", rules)
        for cycle in range(cycles)
        for name, rules in (("head", HEAD_ONLY), ("backbone", backbone))
    ]
    pairs = {
        key: value * cycles
        for key, value in fields.items()
        if key in PER_PHASE and isinstance(value, tuple) and len(value) == 2
    }
    return _sequence(parts, {**fields, **pairs}, "alternating")


def bias_only(
    *, head: bool = True, name: str = "biases", **fields
) -> tuple[Phase, ...]:
    """Returns a plan that trains the biases, those of BatchNorm included, and the head.

    Running averages are held, so that the backbone differs from the pretrained one in its
    biases only.

    Args:
        head: Whether to train the head; if not, its bias is frozen too.
        name: Name of the phase.
        **fields: Fields of the phase.

    Source: Zaken et al. 2022 (BitFit).
    """
    return _single(name, _among(BIASES, head), {"batch_stats": "hold", **fields})


def norm_only(*, head: bool = True, name: str = "norms", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains scale and bias of the normalisations, and the head.

    Normalisations are modules named bn, ln or norm, such as 'bn1' and 'expand_bn'.

    Args:
        head: Whether to train the head.
        name: Name of the phase.
        **fields: Fields of the phase.

    Source: Frankle et al. 2021.
    """
    return _single(name, _among(NORMS, head), fields)


def lora(*, head: bool = True, name: str = "lora", **fields) -> tuple[Phase, ...]:
    """Returns a plan that trains low-rank updates, and the head; see `model.lora_rank`.

    Running averages are held, so that the backbone differs from the pretrained one in its
    low-rank updates only.

    Args:
        head: Whether to train the head.
        name: Name of the phase.
        **fields: Fields of the phase.

    Source: Hu et al. 2021.
    """
    return _single(name, _among(LORA, head), {"batch_stats": "hold", **fields})


def together(plans: Mapping[str, Sequence[Phase]]) -> tuple[Phase, ...]:
    """Returns one plan that trains each member as its own plan does.

    Args:
        plans: Plan of each member, by label; all have as many phases, which differ in names
            and rules alone. The phases are named as in the first plan.

    Raises:
        UserError: The plans differ in other fields.
    """
    first, *others = plans.values()
    for label, plan in plans.items():
        for index in range(max(len(first), len(plan))):
            if index >= min(len(first), len(plan)):
                raise UserError(
                    f"plans.together: {label!r} has {len(plan)} phases, and "
                    f"{next(iter(plans))!r} has {len(first)}"
                )
            same = {"name": first[index].name, "rules": first[index].rules}
            if dataclasses.replace(plan[index], **same) != first[index]:
                raise UserError(
                    f"plans.together: phase {index} of {label!r} differs from that of "
                    f"{next(iter(plans))!r} in more than name and rules"
                )
    return tuple(
        dataclasses.replace(
            phases[0],
            rules=tuple(
                (f"{label}/(?:{pattern})", scale)
                for label, phase in zip(plans, phases)
                for pattern, scale in phase.rules
            ),
        )
        for phases in zip(first, *others)
    )


def _single(name: str, rules: Rules, fields: Mapping[str, Any]) -> tuple[Phase, ...]:
    return (Phase(**{"name": name, "rules": rules, **fields}),)


def _sequence(
    parts: Sequence[tuple[str, Rules]], fields: Mapping[str, Any], strategy: str
) -> tuple[Phase, ...]:
    """Returns a phase for each (name, rules), the first of which carries no state."""
    each = {k: v for k, v in fields.items() if k in PER_PHASE and isinstance(v, tuple)}
    problems = [
        f"{key}: {len(values)} values for {len(parts)} phases"
        for key, values in each.items()
        if len(values) != len(parts)
    ]
    names = ", ".join(name for name, _ in parts)
    raise_if(problems, f"strategies.{strategy}: phases {names}")
    phases = []
    for index, (name, rules) in enumerate(parts):
        own = {key: values[index] for key, values in each.items()}
        if index == 0:
            own["optimizer_state"] = "reset"
        phases.append(Phase(**{**fields, **own, "name": name, "rules": rules}))
    return tuple(phases)


def _unfreezing(
    stages: Sequence[str], decay: float = 1.0, strategy: str = ""
) -> list[tuple[str, Rules]]:
    """Returns (name, rules) of phases that each train one stage more, from the top."""
    rates, top = _rates(stages, decay, strategy), len(stages) - 1
    parts = []
    for index, stage in reversed(list(enumerate(stages))):
        chosen = {other: rates[other] for other in stages[index:]}
        name = "head" if index == top else f"from_{stage}" if index else "all"
        parts.append((name, _rules(stages, chosen)))
    return parts


def _rates(stages: Sequence[str], decay: float, strategy: str) -> dict[str, float]:
    """Returns the scale of the rate of each stage."""
    if not 0 < decay < math.inf:
        raise UserError(f"strategies.{strategy}: decay={decay}; more than 0 is needed")
    return {stage: decay**depth for depth, stage in enumerate(reversed(stages))}


def _rules(stages: Sequence[str], rates: Mapping[str, float]) -> Rules:
    """Returns rules that give parts of a model their rates and freeze the rest."""
    parts_of: dict[float, list[str]] = {}
    for part, rate in rates.items():
        parts_of.setdefault(rate, []).append(part)
    if set(stages) <= set(rates) and len(parts_of) == 1:
        return tuple((".*", rate) for rate in parts_of)
    rules = [(f"({'|'.join(parts)})/.*", rate) for rate, parts in parts_of.items()]
    # Where every stage has a rate, a rule for the rest would match nothing.
    return (*rules, *(() if set(stages) <= set(rates) else ((".*", 0.0),)))


def _among(pattern: str, head: bool) -> Rules:
    """Returns rules for what a pattern matches outside the head, and for the head."""
    return ((HEAD, 1.0 if head else 0.0), (pattern, 1.0), (".*", 0.0))


def _check(stages: Sequence[str], strategy: str, at_least: int = 1) -> None:
    if isinstance(stages, str) or len(stages) < at_least:
        raise UserError(
            f"strategies.{strategy}: stages={stages!r}; a tuple of {at_least} or more is "
            "needed, as models.stages_of(name, arguments) returns it"
        )


def _check_parts(stages: Sequence[str], parts: Iterable[str], where: str) -> None:
    # Deeper parts are checked against the model's names, with every other rule.
    problems = [
        f"no stage {part.partition('/')[0]!r}"
        f"{registry.closest(part.partition('/')[0], stages)}"
        for part in parts
        if part.partition("/")[0] not in stages
    ]
    raise_if(problems, f"{where}:", f"There are: {', '.join(stages)}.")
