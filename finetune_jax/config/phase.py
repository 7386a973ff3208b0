"""A phase of training: an entry of `plan`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_jax.config.fields import LARGEST_FLOAT, Section, key, limit_problems
from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, collected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(Section):
    """A stretch of training in which a fixed set of parameters is trained."""

    name: str = key(
        "train", "Name in metrics.jsonl and in the report; unique.", static=False
    )
    steps: int | None = key(
        None, "Length in updates; give this or epochs.", least=1, static=False
    )
    epochs: float | None = key(
        None, "Length in passes over the training data.", above=0, static=False
    )
    optimizer: str = key("adamw", "Name in optim.algorithms.OPTIMIZERS.")
    optimizer_args: Mapping[str, Any] = key({}, 'Its arguments, such as {"b1": 0.9}.')
    peak_lr: float = key(
        1e-3, "Highest learning rate, after the warm-up.", least=0, static=False
    )
    schedule: str = key("cosine", "Name in optim.schedules.SCHEDULES.", static=False)
    schedule_args: Mapping[str, Any] = key(
        {}, 'Its arguments, such as {"power": 2.0}.', static=False
    )
    warmup_steps: int = key(
        0, "Updates of linear warm-up to peak_lr.", least=0, static=False
    )
    warmup_share: float = key(
        0.0,
        "Warm-up as a share of the phase, instead of warmup_steps.",
        least=0,
        most=1,
        static=False,
    )
    end_lr_scale: float = key(
        0.0,
        "Last rate as a share of peak_lr, if the schedule has one.",
        least=0,
        most=1,
        static=False,
    )
    clip_norm: float | None = key(
        None, "Bound of the global norm of the gradient.", above=0
    )
    clip_value: float | None = key(
        None, "Bound of each value of the gradient.", above=0
    )
    clip_adaptive: float | None = key(
        None,
        "Bound of a unit's gradient as a share of the norm of its weights.",
        above=0,
    )
    fixed_batch: bool = key(
        False, "Whether every update sees the first batch, as line searches need."
    )
    accumulate_steps: int = key(
        1, "Micro-batches of an update; they divide the batch.", least=1
    )
    weight_decay: float = key(
        0.0, "Decoupled for adamw, added to the gradient for most others.", least=0
    )
    decay: tuple = key(
        (r"(?!.*(bias|scale)$).*",), "Regexes of the parameters with weight decay."
    )
    regularise: tuple = key(
        (), "Entries (name in optim.regularisers, strength, regex of parameters)."
    )
    # The compile key has `rules` and `optimizer_state` as groups of parameters, and
    # `batch_stats` as the mode of the stages.
    rules: tuple = key(
        ((".*", 1.0),),
        "Pairs (regex of the full name, scale of the rate); the first match wins, and "
        "0.0 freezes.",
        static=False,
    )
    batch_stats: str = key(
        "update",
        "Running averages of BatchNorm: 'hold' all, 'update' those of trained stages, "
        "'update_all'.",
        choices=("hold", "update", "update_all"),
        static=False,
    )
    optimizer_state: str = key(
        "reset",
        "Optimizer state of parameters that the phase before trained too.",
        choices=("reset", "carry"),
        static=False,
    )
    plateau_metric: str | None = key(
        None, "Metric that ends the phase when it stops improving.", static=False
    )
    plateau_patience: int = key(
        3, "Measurements without improvement until then.", least=1, static=False
    )
    plateau_min_change: float = key(
        0.0, "Smallest change that is an improvement.", least=0, static=False
    )
    plateau_restore: bool = key(
        False,
        "Whether the phase ends with the state of its best measurement.",
        static=False,
    )

    @property
    def static(self) -> tuple[tuple[str, Any], ...]:
        """Fields that decide a compiled step by themselves, as a hashable value.

        All but those marked `static=False`, which are arguments of the step, belong to the
        loop, or reach the step as groups of parameters and modes of stages.
        """
        return tuple(
            (field.name, _hashable(getattr(self, field.name)))
            for field in dataclasses.fields(self)
            if field.metadata.get("static", True)
        )

    def problems(self) -> list[Problem]:
        """Returns wrong values and conflicts between values; keys are relative."""
        found = limit_problems(self, Phase)

        def add(name: str, text: str) -> None:
            found.append(Problem(name, text))

        if (self.steps is None) == (self.epochs is None):
            add(
                "steps", f"{self.steps}, epochs {self.epochs}; give exactly one of them"
            )
        clips = ("clip_norm", "clip_value", "clip_adaptive")
        given = [name for name in clips if self[name] is not None]
        if len(given) > 1:
            add(given[0], f"{', '.join(given)} are given; give at most one of them")
        if self.plateau_restore and self.plateau_metric is None:
            add("plateau_restore", "True, but plateau_metric is None; give a metric")
        if self.warmup_steps and self.warmup_share:
            text = f"{self.warmup_share}, but warmup_steps is {self.warmup_steps}"
            add("warmup_share", f"{text}; give at most one of them")
        if self.steps is not None and self.warmup_steps > self.steps:
            add("warmup_steps", f"{self.warmup_steps} is more than steps {self.steps}")
        if not self.rules:
            add("rules", "empty; ('.*', 1.0) trains everything")
        for index, rule in enumerate(self.rules):
            where = f"rules[{index}]"
            with collected(found):
                if text := _rule_problem(rule, where):
                    add(where, text)
        for pattern in self.decay:
            with collected(found):
                registry.check_regex(pattern, "decay")
        return found


def _rule_problem(rule: Any, where: str) -> str | None:
    """Returns why a rule is none, or None.

    Raises:
        UserError: Its pattern is no regular expression.
    """
    if not (isinstance(rule, tuple | list) and len(rule) == 2):
        return f"{rule!r} is not a pair (regex, scale)"
    pattern, scale = rule
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        return f"the scale in {rule!r} is not a number"
    registry.check_regex(pattern, where)
    if not 0 <= scale < LARGEST_FLOAT:
        return f"the scale in {rule!r} is not finite and >= 0"
    return None


def _hashable(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value
