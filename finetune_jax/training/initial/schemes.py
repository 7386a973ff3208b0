"""Initialisation schemes: how the parameters start that a rule matches.

`config.init.schemes` is a tuple of rules (regex over the full parameter name, scheme,
*arguments), of which the first match wins. They are applied after the pretrained weights
are loaded; a parameter that no rule matches keeps its value.

    init.schemes = (
        ("stage3/.*", "initial"),
        ("head/logits/bias", "class_frequencies"),
        ("head/.*", "xavier_uniform"),
    )

Three things hold for all of them:

- Schemes for kernels (xavier, kaiming, lecun, orthogonal, lsuv) give leaves of fewer than
  two dimensions, such as biases and scales of BatchNorm, the model's own initial value.
- A BatchNorm's running averages go with its scale (its bias, if it has no scale). A rule
  that starts the scale anew, by any scheme but `pretrained` and `constant`, gives the
  averages their initial values too, because the features that they described are gone. A
  stage matched as a whole starts as without weights; a stage that no rule matches starts
  as the weights have it.
- Drawn values depend on the seed and the parameter's name, not on the other rules.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.nn import initializers

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError, collected, raise_if
from finetune_jax.core.pytrees import like, named, stage_of
from finetune_jax.core.registry import closest, need
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
        draw: Function from the scheme's arguments to an initialiser (key, shape, dtype);
            None if nothing is drawn.
        kernels_only: Whether it is for leaves of two dimensions or more.
        reads_weights: Whether it starts from the pretrained values.
        renews: Whether it gives running averages their initial values too.
    """

    draw: Callable | None = None
    kernels_only: bool = False
    reads_weights: bool = False
    renews: bool = True


def _normal(std: float) -> Callable:
    need((std > 0, f"std {std}; more than 0"))
    return initializers.normal(std)


def _truncated_normal(std: float) -> Callable:
    need((std > 0, f"std {std}; more than 0"))
    return initializers.truncated_normal(std)


def _uniform(limit: float) -> Callable:
    need((limit > 0, f"limit {limit}; more than 0"))

    def draw(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _orthogonal(gain: float = 1.0) -> Callable:
    need((gain > 0, f"gain {gain}; more than 0"))
    return initializers.orthogonal(gain)


def _constant(value: float) -> Callable:
    return initializers.constant(value)


def _lsuv(tolerance: float = 0.1, rounds: int = 10) -> Callable:
    need(
        (tolerance > 0, f"tolerance {tolerance}; more than 0"),
        (rounds > 0, f"rounds {rounds}; 1 or more"),
    )
    return initializers.orthogonal()


def _lsuv_bounds(tolerance: float = 0.1, rounds: float = 10) -> tuple[float, float]:
    return tolerance, rounds


def _order(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns numbers to sort by; numpy does so, since XLA's sort compiles slowly."""
    del dtype
    return jax.random.bits(key, shape)


def _kernels(make: Callable) -> Scheme:
    return Scheme(lambda: make(), kernels_only=True)


# Fans are those of `jax.nn.initializers`: of a kernel [H, W, I, O], H W I and H W O. Its
# normal ones are truncated at two standard deviations; xavier, kaiming and lecun are
# widened first, so that the truncated distribution has the right standard deviation.
SCHEMES = registry.Choices(
    "scheme",
    {
        "pretrained": Scheme(reads_weights=True, renews=False),
        "initial": Scheme(),
        "normal": Scheme(_normal),
        "truncated_normal": Scheme(_truncated_normal),
        "uniform": Scheme(_uniform),
        "xavier_uniform": _kernels(initializers.glorot_uniform),
        "xavier_normal": _kernels(initializers.glorot_normal),
        "kaiming_uniform": _kernels(initializers.he_uniform),
        "kaiming_normal": _kernels(initializers.he_normal),
        "lecun_uniform": _kernels(initializers.lecun_uniform),
        "lecun_normal": _kernels(initializers.lecun_normal),
        "orthogonal": Scheme(_orthogonal, kernels_only=True),
        "constant": Scheme(_constant, renews=False),
        # Raghu et al. 2019, section 5, "Mean Var": mean and scale of the weights alone.
        "matched": Scheme(lambda: initializers.normal(1.0), reads_weights=True),
        "shuffled": Scheme(lambda: _order, reads_weights=True),
        "lsuv": Scheme(_lsuv, kernels_only=True),
        "class_frequencies": Scheme(renews=False),
    },
)


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
        stages: Stages of the model, in order.
        at: The first stage to start anew.
        scheme: A name in `SCHEMES`.
        *arguments: Arguments of the scheme.

    Raises:
        UserError: There is no such stage.
    """
    if at not in stages:
        hint = closest(at, stages)
        raise UserError(
            f"cut: no stage {at!r}{hint or '.'} There are: {', '.join(stages)}."
        )
    upper = "|".join(stages[list(stages).index(at) :])
    return ((f"({upper})/.*", scheme, *arguments),)


def make_rules(schemes: Sequence[Any], *pretrained: str | None) -> tuple[Rule, ...]:
    """Returns the rules of `config.init.schemes`, checked without model and data.

    Args:
        schemes: Entries of the config.
        *pretrained: Addresses of the weights that models begin with, if any.

    Raises:
        UserError: Lists invalid rules, unknown schemes and unsuitable arguments.
    """
    rules, problems = [], list[Problem]()
    for index, entry in enumerate(schemes):
        where = f"{_WHERE}[{index}]"
        if not isinstance(entry, tuple) or len(entry) < 2 or type(entry[1]) is not str:
            text = f"{entry!r} is not (regex, scheme, *arguments)"
            problems.append(Problem(where, text))
            continue
        pattern, name, *arguments = entry
        with collected(problems):
            registry.check_regex(pattern, where)
        with collected(problems):
            scheme = registry.choose(SCHEMES, name, where)
            registry.call(scheme.draw or (lambda: None), arguments, where)
            if scheme.reads_weights and not any(pretrained):
                text = (
                    f"{name!r} starts from pretrained values, but config.init.pretrained "
                    "is None"
                )
                raise UserError(Problem(where, text))
            rules.append(Rule(pattern, name, tuple(arguments)))
    raise_if(problems)
    return tuple(rules)


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
        rules: Rules from `make_rules`.
        shapes: Shapes of the parameters, by name.
        task: Task of the run.
        spec: Description of the data.
        fresh: `config.init.fresh`, regexes of parameters that ignore the weights.

    Raises:
        UserError: Lists rules that match nothing, or parameters that they cannot set.
    """
    chosen, problems = assign(rules, shapes), list[Problem]()
    for index, rule in enumerate(rules):
        names = [name for name, its in chosen.items() if its is rule]

        def add(text: str, where: str = f"{_WHERE}[{index}]") -> None:
            problems.append(Problem(where, text))

        if not any(re.fullmatch(rule.pattern, name) for name in shapes):
            add(f"{rule.pattern!r} matches nothing{closest(rule.pattern, shapes)}")
        elif not names:
            add(f"{rule.pattern!r}: earlier rules match all parameters that it does")
        if rule.scheme.reads_weights:
            fixed = [n for n in names if any(re.fullmatch(p, n) for p in fresh)]
            for name in fixed:
                add(
                    f"{rule.name!r} takes {name} from the weights, but config.init.fresh "
                    "names it too"
                )
        if rule.name in ("class_frequencies", "lsuv") and spec.domains:
            add(f"{rule.name!r} does not work with config.data.domains")
        elif rule.name == "class_frequencies":
            classes = len(spec.class_names)
            if not classes:
                add(f"{rule.name!r}, but the data has no classes")
                continue
            for name in names:
                if (
                    stage_of(name, task.models.prefixes) not in task.models.heads
                    or name.rpartition("/")[2] != "bias"
                    or shapes[name].shape != (classes,)
                ):
                    add(
                        f"{rule.name!r}: {name} {shapes[name].shape} is not the last "
                        f"layer's bias, with a value for each of the {classes} classes"
                    )
    raise_if(problems)


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
    """Returns a state whose matched parameters start by their schemes, on the host.

    Args:
        own: State with the model's own initial values.
        state: The same state with the weights loaded.
        rules: Checked rules.
        task: Task of the run.
        spec: Description of the data.
        seed: Seed of the initialisation.
        first_batch: Function that returns training examples, for `lsuv`; None leaves its
            kernels orthonormal.

    Raises:
        UserError: `lsuv` finds a layer without variance, or one that never runs.
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
        name: _lsuv_bounds(*rule.arguments)
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
    """Returns the random values of the leaves whose schemes draw them, by name."""

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
    """Returns the value of a leaf from the numbers drawn for it."""
    if rule.name == "shuffled":
        order = np.argsort(drawn, axis=None, kind="stable")
        return np.asarray(loaded).reshape(-1)[order].reshape(drawn.shape)
    if rule.name == "matched":
        exact = np.asarray(loaded, np.float64)
        return (exact.mean() + exact.std() * drawn).astype(drawn.dtype)
    return drawn
