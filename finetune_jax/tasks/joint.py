"""Joint learning: several data sets, and models that share parameters.

What is shared is a rule over names. A parameter that it matches is there once, under its
own name ('stage1/conv/kernel'); any other is there once a domain, behind the domain's name
('digits/head/logits/kernel'). Every domain has the model that `config.model` describes,
with as many logits as it has classes.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.pytrees import like, named, stage_of
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks import task_module
from finetune_jax.tasks.components.multi_domain import Several, domain_key, make_parts
from finetune_jax.tasks.components.targets import Numbers
from finetune_jax.tasks.objectives.domain_losses import (
    pair_distance,
    uncertainty_weighted,
)
from finetune_jax.tasks.task import Mode, Task

METRICS = ("accuracy", "loss")
BALANCES = ("domains", "examples", "uncertainty")
STATISTICS = ("shared", "domain")
# Its last part is that of what weight decay leaves alone by default.
LOG_VARIANCE = "log_variance/bias"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Several):
    """Models of several domains.

    Attributes:
        models: By domain.
        data: What the examples of the domains look like.
        parts: The task of each domain, as if it were alone.
        shared: Regexes over the names that parameters have in a domain's model.
        statistics: 'shared', or 'domain': running averages of BatchNorm are each domain's
            own, also where its parameters are shared.
        balance: 'domains', 'examples' or 'uncertainty': what losses are weighed by.
        weights: Of the losses of the domains, by name.
        soft: Strength of the penalty that pulls the models together.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    parts: Mapping[str, Task]
    shared: tuple[str, ...]
    statistics: str
    balance: str
    weights: Mapping[str, float]
    soft: float

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[Any, Any]]:
        """Shapes of the parameters and batch statistics of each domain's model."""
        key = jax.random.key(0)
        return {name: jax.eval_shape(part.init, key) for name, part in self._all}

    def _is_shared(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.shared)

    def place(self, domain: str, name: str, *, of_stats: bool = False) -> str:
        """Returns where the state has what a domain's model has by a name."""
        is_shared = self._is_shared(name)
        if of_stats and self.statistics == "domain":
            is_shared = False
        return name if is_shared else f"{domain}/{name}"

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics.

        What is shared is that of the first domain that has it.
        """
        places: tuple[dict, dict] = ({}, {})
        for domain, part in self._all:
            common = part.init(rng)
            own = part.init(domain_key(rng, domain))
            for kind in (0, 1):
                shared, alone = named(common[kind]), named(own[kind])
                for name in alone:
                    place = self.place(domain, name, of_stats=kind == 1)
                    value = shared[name] if place == name else alone[name]
                    places[kind].setdefault(place, value)
        if self.balance == "uncertainty":
            kind = next(iter(places[0].values())).dtype
            for domain in self.parts:
                places[0][f"{domain}/{LOG_VARIANCE}"] = jnp.zeros((), kind)
        return _nested(places[0]), _nested(places[1])

    def gather(self, domain: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
        """Returns what a domain's model has of parameters and batch statistics."""
        found = []
        for kind, tree in enumerate((params, batch_stats)):
            leaves, shapes = named(tree), self._shapes[domain][kind]
            own = {
                name: leaves[self.place(domain, name, of_stats=kind == 1)]
                for name in named(shapes)
            }
            found.append(like(shapes, own))
        return found[0], found[1]

    def own_mode(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of a domain's model run, by their own names."""
        begin = f"{domain}/"
        own = [s.removeprefix(begin) for s in mode.learning if s.startswith(begin)]
        return dataclasses.replace(mode, learning=frozenset(own))

    def learning(self, stages: frozenset[str]) -> frozenset[str]:
        """Returns the stages that run as in training, those of each domain among them."""
        own = {
            f"{domain}/{stage}"
            for domain, module in self.models.items()
            for stage in module.stages  # type: ignore[attr-defined]
            if stage in stages
        }
        return stages | own

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that domains share, then those of each; only what has parameters."""
        found: dict[str, None] = {}
        owned: dict[str, None] = {}
        for domain in self.parts:
            for stage in self.models[domain].stages:  # type: ignore[attr-defined]
                names = [n for n in named(self._shapes[domain][0]) if _is_in(n, stage)]
                shared = [self._is_shared(name) for name in names]
                found |= {stage: None} if any(shared) else {}
                owned |= {f"{domain}/{stage}": None} if not all(shared) else {}
            if self.balance == "uncertainty":
                owned[f"{domain}/{LOG_VARIANCE.partition('/')[0]}"] = None
        return (*found, *owned)

    def whole(self, batch: dict) -> dict:
        """Returns the weight of each domain, and how many micro-batches there are."""
        if self.balance == "examples":
            return {}
        weights = {domain: self._weight(domain, part) for domain, part in batch.items()}
        return {"weights": weights, "parts": jnp.ones(())}

    def _weight(self, domain: str, batch: dict) -> jax.Array:
        """Returns what the loss of a domain is divided by, which no logits change."""
        task: Any = self.parts[domain]
        logits_BxK = jnp.zeros((len(batch["weight"]), task.answer.logits))
        return task.answer.loss(logits_BxK, batch)[0][1]

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns the weighed losses of all domains, and 'domain/name' of each."""
        assert first is None
        batch, whole = dict(batch), batch.get("whole")
        batch.pop("whole", None)
        losses, moved, metrics = {}, {}, {}
        for domain, part in batch.items():
            loss, (stats, found) = self.parts[domain].loss(
                *self.gather(domain, params, batch_stats),
                fixed,
                part,
                rng=domain_key(rng, domain),
                progress=progress,
                mode=self.own_mode(domain, mode),
            )
            losses[domain], moved[domain] = loss, stats
            metrics |= {f"{domain}/{name}": pair for name, pair in found.items()}
        total: Any
        weight: Any
        if whole is None:
            total, weight = (sum(pair) for pair in zip(*losses.values()))
        else:
            weight = 1 / whole["parts"]
            total = sum(
                self._weighed(domain, params, loss, whole["weights"][domain], weight)
                for domain, (loss, _) in losses.items()
            )
        if self.soft:
            total += weight * self.soft * self._distance(params)
        metrics["loss"] = total, weight
        return (total, weight), (self._scattered(batch_stats, moved, mode), metrics)

    def _weighed(
        self, domain: str, params: Any, total: Any, divisor: Any, share: Any
    ) -> jax.Array:
        """Returns a micro-batch's part of the loss of a domain."""
        if self.balance == "domains":
            return self.weights[domain] * total / divisor
        log_variance = named(params)[f"{domain}/{LOG_VARIANCE}"]
        task: Any = self.parts[domain]
        # A sum over micro-batches: the term without a loss is divided among them.
        of_classes = not isinstance(task.answer, Numbers)
        weighed = uncertainty_weighted(
            total / (divisor * share), log_variance, of_classes=of_classes
        )
        return self.weights[domain] * share * weighed

    def _distance(self, params: Any) -> jax.Array:
        """Returns how far apart the models are, but for their last stages."""
        leaves, models = named(params), []
        for domain, module in self.models.items():
            head = module.stages[-1]  # type: ignore[attr-defined]
            names = [n for n in named(self._shapes[domain][0]) if not _is_in(n, head)]
            own = {n: leaves[f"{domain}/{n}"] for n in names if not self._is_shared(n)}
            models.append(own)
        return pair_distance(models)

    def _scattered(self, batch_stats: Any, moved: Mapping, mode: Mode) -> Any:
        """Returns the batch statistics of all after those of some domains have moved.

        Where domains share them, they move by the mean of what each would move them.
        """
        found: dict[str, list] = {}
        for domain, stats in moved.items():
            for name, leaf in named(stats).items():
                place = self.place(domain, name, of_stats=True)
                if mode.moves(stage_of(place, self.prefixes)):
                    found.setdefault(place, []).append(leaf)
        means = {place: sum(leaves) / len(leaves) for place, leaves in found.items()}
        return like(batch_stats, named(batch_stats) | means)


def _is_in(name: str, stage: str) -> bool:
    return name.startswith(f"{stage}/")


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree of named leaves."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return tree


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    of: str = "classify",
    of_args: Mapping[str, Any] = MappingProxyType({}),
    shared: tuple[str, ...] = (r"(?!head/).*",),
    statistics: str = "shared",
    balance: str = "domains",
    weights: tuple[float, ...] = (),
    soft: float = 0.0,
    metrics: tuple[str, ...] = METRICS,
) -> Joint:
    """Returns the task that `config.task` describes.

    Args:
        data: Has the domains.
        model: The section `config.model`.
        precision: As in the config.
        of: The task of every domain, such as 'classify' or 'regress'.
        of_args: What `config.task` would say of it, but for `metrics`.
        shared: Regexes over parameter names, of what domains share; () is nothing. By
            default it is all but the heads.
        statistics: 'shared': running averages of BatchNorm are shared where names match.
            'domain': each domain has its own.
        balance: 'domains': the loss is the sum over domains of their mean losses, each
            times its weight. 'examples': the mean over all examples. 'uncertainty': as
            'domains', each mean weighed by a variance that learns (Kendall et al. 2018).
        weights: Of the domains' losses, in the order of `config.data.domains`; () is 1
            each.
        soft: Strength of soft sharing: |a - b|^2 / 2 is added for each pair of models,
            over what they do not share, heads left out.
        metrics: Of each domain.

    Raises:
        UserError: Something unknown or out of range, or domains whose shapes clash.
    """
    registry.choose(dict.fromkeys(BALANCES), balance, "config.task.balance")
    registry.choose(dict.fromkeys(STATISTICS), statistics, "config.task.statistics")
    parts = make_parts(
        task_module(of),
        {**of_args, "metrics": metrics},
        data=data,
        model=model,
        precision=precision,
    )
    by_domain = dict(zip(parts, weights or (1.0,) * len(parts)))
    _check(data, by_domain, weights, shared, balance, soft)
    task = Joint(
        models={name: part.models[""] for name, part in parts.items()},
        data=data,
        parts=parts,
        shared=shared,
        statistics=statistics,
        balance=balance,
        weights=by_domain,
        soft=soft,
    )
    if clashes := _clashes(task):
        raise problems_error(
            "The domains cannot share these parameters, whose shapes differ:",
            clashes,
            "Give the domains one data.image_size and data.channels, or share less: "
            "config.task.shared.",
        )
    return task


def _check(
    data: DataSpec,
    by_domain: Mapping[str, float],
    weights: tuple[float, ...],
    shared: tuple[str, ...],
    balance: str,
    soft: float,
) -> None:
    problems = [
        f"config.data.domains: {name!r} has no labels, which the task 'joint' needs"
        for name, spec in data.domains.items()
        if not spec.labelled
    ]
    if weights and len(weights) != len(data.domains):
        problems.append(
            f"config.task.weights: {len(weights)} of them, but {len(data.domains)} domains"
        )
    elif any(weight < 0 for weight in weights) or not any(by_domain.values()):
        problems.append(f"config.task.weights: {weights}; 0 or more, and not all 0")
    if weights and balance == "examples":
        problems.append(
            "config.task.weights: with balance='examples' all count the same"
        )
    if soft < 0:
        problems.append(f"config.task.soft: {soft}; 0 or more is needed")
    for pattern in shared:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"config.task.shared: {pattern!r} is no regex: {error}")
    if problems:
        raise problems_error("The domains cannot be learned together:", problems)


def _clashes(task: Joint) -> list[str]:
    """Returns the shared parameters whose shapes differ, and rules that match nothing."""
    shapes: dict[str, dict[str, tuple]] = {}
    for domain in task.parts:
        for name, leaf in named(task._shapes[domain][0]).items():
            shapes.setdefault(name, {})[domain] = tuple(leaf.shape)
    problems = [
        f"{name}: " + ", ".join(f"{domain} {shape}" for domain, shape in found.items())
        for name, found in shapes.items()
        if task._is_shared(name) and len(set(found.values())) > 1
    ]
    unmatched = [
        pattern
        for pattern in task.shared
        if not any(re.fullmatch(pattern, name) for name in shapes)
    ]
    if unmatched and not problems:
        hints = [f"{p!r}{registry.closest(p, shapes)}" for p in unmatched]
        raise UserError(f"config.task.shared: {', '.join(hints)} matches nothing")
    return problems
