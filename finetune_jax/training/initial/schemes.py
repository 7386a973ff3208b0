"""Where parameters start: a scheme for every name that a rule matches.

`config.init.schemes` is a tuple of rules (regex over the full parameter name, scheme,
*arguments), of which the first match wins. They are applied after the pretrained weights
are loaded; a name that no rule matches keeps what it has.

    init.schemes = (
        ("stage3/.*", "initial"),
        ("head/logits/bias", "class_frequencies"),
        ("head/.*", "xavier_uniform"),
    )

Three things hold for all of them:

- Schemes for kernels (xavier, kaiming, lecun, orthogonal, lsuv) give what has fewer than
  two dimensions, such as biases and scales of BatchNorm, the model's own initial value.
- A BatchNorm's running averages go with its scale (its bias, if it has no scale). A rule
  that starts the scale anew, by any scheme but `pretrained` and `constant`, gives the
  averages their initial values too: they were those of features that are gone. So a stage
  matched as a whole starts as if there had been no weights, and one that no rule matches
  as the weights left it.
- What is drawn depends on the seed and the parameter's name, not on the other rules.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.nn import initializers

from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.pytrees import like, named, stage_of
from finetune_jax.core.registry import closest
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.peft.lora import is_lora
from finetune_jax.parallel.compiling import run_once
from finetune_jax.tasks.task import Task
from finetune_jax.training.initial.lsuv import scale_layers

_WHERE = "config.init.schemes"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to start a parameter.

    Attributes:
        draw: Returns, of the scheme's arguments, an initialiser of (key, shape, dtype);
            None where nothing is drawn.
        needed: Names of the arguments.
        optional: Names of those that may be left out.
        kernels_only: Whether it is for leaves of two dimensions or more.
        reads_weights: Whether it starts from the pretrained values.
        renews: Whether nothing of the pretrained values' place in the model is left.
    """

    draw: Callable | None = None
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kernels_only: bool = False
    reads_weights: bool = False
    renews: bool = True


def _uniform(limit: float) -> Callable:
    def draw(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _order(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns numbers to sort by; numpy does so, since XLA's sort compiles slowly."""
    del dtype
    return jax.random.bits(key, shape)


def _lsuv(tolerance: float = 0.1, rounds: float = 10) -> tuple[float, float]:
    return tolerance, rounds


# Fans are those of `jax.nn.initializers`: of a kernel [H, W, I, O], H W I and H W O. Its
# normal ones are cut at two standard deviations, those named after people widened so that
# what is left has the right one.
SCHEMES = {
    "pretrained": Scheme(reads_weights=True, renews=False),
    "initial": Scheme(),
    "normal": Scheme(initializers.normal, ("std",)),
    "truncated_normal": Scheme(initializers.truncated_normal, ("std",)),
    "uniform": Scheme(_uniform, ("limit",)),
    "xavier_uniform": Scheme(initializers.glorot_uniform, kernels_only=True),
    "xavier_normal": Scheme(initializers.glorot_normal, kernels_only=True),
    "kaiming_uniform": Scheme(initializers.he_uniform, kernels_only=True),
    "kaiming_normal": Scheme(initializers.he_normal, kernels_only=True),
    "lecun_uniform": Scheme(initializers.lecun_uniform, kernels_only=True),
    "lecun_normal": Scheme(initializers.lecun_normal, kernels_only=True),
    "orthogonal": Scheme(initializers.orthogonal, (), ("gain",), kernels_only=True),
    "constant": Scheme(initializers.constant, ("value",), renews=False),
    # Raghu et al. 2019, section 5, "Mean Var": the scale of the features, not they.
    "matched": Scheme(lambda: initializers.normal(1.0), reads_weights=True),
    "shuffled": Scheme(lambda: _order, reads_weights=True),
    "lsuv": Scheme(
        lambda *_: initializers.orthogonal(), (), ("tolerance", "rounds"), True
    ),
    "class_frequencies": Scheme(renews=False),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Starts the parameters whose full name a regex matches by a scheme."""

    pattern: str
    name: str
    arguments: tuple[float, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """The scheme of this name."""
        return SCHEMES[self.name]


def cut(
    stages: Sequence[str], at: str, scheme: str = "initial", *arguments: float
) -> tuple[tuple, ...]:
    """Returns the rule that starts all stages from one upward by a scheme.

    >>> cut(("stem", "stage1", "stage2", "head"), "stage2")
    (('(stage2|head)/.*', 'initial'),)

    Args:
        stages: Of the model, in order.
        at: The first stage to start anew.
        scheme: A name in `SCHEMES`.
        *arguments: Of the scheme.

    Raises:
        UserError: There is no such stage.
    """
    if at not in stages:
        hint = closest(at, stages)
        raise UserError(f"cut: no stage {at!r}{hint} There are: {', '.join(stages)}.")
    upper = "|".join(stages[list(stages).index(at) :])
    return ((f"({upper})/.*", scheme, *arguments),)


def make_rules(schemes: Sequence[Any], *pretrained: str | None) -> tuple[Rule, ...]:
    """Returns the rules of `config.init.schemes`, checked as far as they can be alone.

    Args:
        schemes: From the config.
        *pretrained: Addresses of the weights that models begin with, if any.

    Raises:
        UserError: Lists what is no rule, unknown schemes and arguments that do not fit.
    """
    rules, problems = [], []
    for index, entry in enumerate(schemes):
        where = f"{_WHERE}[{index}]"
        if not isinstance(entry, tuple) or len(entry) < 2 or type(entry[1]) is not str:
            problems.append(f"{where}: {entry!r} is not (regex, scheme, *arguments)")
            continue
        pattern, name, *arguments = entry
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            problems.append(f"{where}: {pattern!r} is no regex: {error}")
        if name not in SCHEMES:
            known = ", ".join(SCHEMES)
            hint = closest(name, SCHEMES)
            problems.append(f"{where}: no scheme {name!r}{hint} There are: {known}.")
            continue
        problems += [f"{where}: {text}" for text in _misfits(name, arguments)]
        if SCHEMES[name].reads_weights and not any(pretrained):
            problems.append(
                f"{where}: {name!r} starts from pretrained values, but "
                "config.init.pretrained is None"
            )
        rules.append(Rule(pattern, name, tuple(arguments)))
    if problems:
        raise problems_error("The initialisation cannot be done:", problems)
    return tuple(rules)


def _misfits(name: str, arguments: Sequence[Any]) -> list[str]:
    """Returns what is wrong with the arguments of a scheme."""
    scheme = SCHEMES[name]
    takes = (*scheme.needed, *scheme.optional)
    if not len(scheme.needed) <= len(arguments) <= len(takes):
        says = f"({', '.join(takes)})" if takes else "no arguments"
        return [f"{name!r} takes {says}, not {tuple(arguments)!r}"]
    problems = []
    for key, value in zip(takes, arguments):
        kinds = (int,) if key == "rounds" else (int, float)
        if type(value) not in kinds or not math.isfinite(value):
            problems.append(f"{key} of {name!r}: {value!r} is not a number for it")
        elif key != "value" and value <= 0:
            problems.append(f"{key} of {name!r}: {value}; more than 0 is needed")
    return problems


def assign(rules: Sequence[Rule], names: Iterable[str]) -> dict[str, Rule]:
    """Returns the rule of each name that has one; the first match wins."""
    return {
        name: rule
        for name in names
        for rule in [r for r in rules if re.fullmatch(r.pattern, name)][:1]
    }


def check_rules(
    rules: Sequence[Rule],
    shapes: Mapping[str, Any],
    *,
    task: Task,
    spec: DataSpec,
    fresh: Sequence[str] = (),
) -> None:
    """Checks the rules against a model and its data. Nothing is compiled or read.

    Args:
        rules: From `make_rules`.
        shapes: Of the parameters, by name.
        task: Has the models.
        spec: What the data look like.
        fresh: `config.init.fresh`, which take nothing from the weights.

    Raises:
        UserError: Lists rules that set nothing, or what they cannot set.
    """
    chosen, problems = assign(rules, shapes), []
    for rule in rules:
        names = [name for name, its in chosen.items() if its is rule]
        where = f"{_WHERE}: {rule.pattern!r}"
        if not any(re.fullmatch(rule.pattern, name) for name in shapes):
            problems.append(f"{where} matches nothing{closest(rule.pattern, shapes)}")
        elif not names:
            problems.append(f"{where}: earlier rules match all that it does")
        if rule.scheme.reads_weights:
            problems += [
                f"{where}, {rule.name!r}: {name} takes nothing from the weights, since "
                "config.init.fresh names it"
                for name in names
                if any(re.fullmatch(pattern, name) for pattern in fresh)
            ]
        if rule.name in ("class_frequencies", "lsuv") and spec.domains:
            problems.append(f"{where}, {rule.name!r}: not with config.data.domains")
            continue
        if rule.name == "class_frequencies":
            classes = len(spec.class_names)
            if not classes:
                problems.append(f"{where}, {rule.name!r}: the data has no classes")
                continue
            problems += [
                f"{where}, {rule.name!r}: {name} {shapes[name].shape} is not the last "
                f"layer's bias, with a value for each of the {classes} classes"
                for name in names
                if stage_of(name, task.prefixes) not in task.heads
                or name.rpartition("/")[2] != "bias"
                or shapes[name].shape != (classes,)
            ]
    if problems:
        raise problems_error("The initialisation does not fit the model:", problems)


def initialise(
    own: TrainState,
    state: TrainState,
    rules: Sequence[Rule],
    *,
    task: Task,
    spec: DataSpec,
    seed: int,
    first_batch: Callable[[], dict] | None,
) -> TrainState:
    """Returns a state with what the rules match started by their schemes, on the host.

    Args:
        own: The model's own initial values.
        state: The same with the weights loaded.
        rules: Checked.
        task: Has the models.
        spec: What the data look like.
        seed: Of the run.
        first_batch: Returns training examples, for `lsuv`; None leaves its kernels
            orthonormal.

    Raises:
        UserError: `lsuv` finds a layer without variance, or that never runs.
    """
    initial, leaves = named(own.params), named(state.params)
    chosen = assign(rules, leaves)
    drawn = draw(chosen, initial, seed)
    for name, rule in chosen.items():
        if name in drawn:
            leaves[name] = _finished(rule, drawn[name], leaves[name])
        elif rule.name == "class_frequencies":
            share = np.asarray(spec.train_counts) / spec.train_examples
            leaves[name] = np.log(share).astype(initial[name].dtype)
        elif rule.scheme.renews:
            leaves[name] = initial[name]
    averages, kept = named(own.batch_stats), named(state.batch_stats)
    for name in averages:
        module = name.rpartition("/")[0]
        is_scaled = f"{module}/scale" in leaves
        rule = chosen.get(f"{module}/{'scale' if is_scaled else 'bias'}")
        if rule is not None and rule.scheme.renews:
            kept[name] = averages[name]
    state = state.replace(
        params=like(state.params, leaves), batch_stats=like(state.batch_stats, kept)
    )
    scaled = {
        name: _lsuv(*rule.arguments)
        for name, rule in chosen.items()
        # Low-rank updates start at zero, or the model would not start at its weights.
        if rule.name == "lsuv" and name in drawn
    }
    if scaled and first_batch is not None:
        params = scale_layers(task, state, first_batch(), scaled)
        state = state.replace(params=params)
    return state


def draw(
    chosen: Mapping[str, Rule], shapes: Mapping[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """Returns what the schemes draw at random for their leaves, by name."""

    def is_drawn(name: str, rule: Rule) -> bool:
        if rule.name == "lsuv" and not name.endswith("/kernel"):
            return False  # Its layers are found by their kernels.
        is_kernel = len(shapes[name].shape) >= 2 and not is_lora(name)
        return bool(rule.scheme.draw) and (is_kernel or not rule.scheme.kernels_only)

    wanted = {name: rule for name, rule in chosen.items() if is_drawn(name, rule)}

    def values() -> dict[str, jax.Array]:
        drawn = {}
        for name, rule in wanted.items():
            leaf, make = shapes[name], rule.scheme.draw
            assert make is not None
            hashed = zlib.crc32(f"init.schemes/{name}".encode())
            key = jax.random.fold_in(jax.random.key(seed), hashed)
            drawn[name] = make(*rule.arguments)(key, leaf.shape, leaf.dtype)
        return drawn

    return run_once(values) if wanted else {}


def _finished(rule: Rule, drawn: np.ndarray, loaded: Any) -> np.ndarray:
    """Returns the value of a leaf from what was drawn for it."""
    if rule.name == "shuffled":
        order = np.argsort(drawn, axis=None, kind="stable")
        return np.asarray(loaded).reshape(-1)[order].reshape(drawn.shape)
    if rule.name == "matched":
        exact = np.asarray(loaded, np.float64)
        return (exact.mean() + exact.std() * drawn).astype(drawn.dtype)
    return drawn
