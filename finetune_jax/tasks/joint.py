"""Joint learning: several data sets, and models that share parameters.

A rule over names says which parameters are shared. A shared parameter exists once, under
its own name ('stage1/conv/kernel'); any other exists once per domain, behind the domain's
name ('digits/head/logits/kernel'). Every domain has the model of `config.model`, with as
many logits as it has classes.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, collected, raise_if
from finetune_jax.core.pytrees import like, named, stage_of
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.modes import Mode, model_key
from finetune_jax.tasks import task_module
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.multi_domain import (
    MultiDomainTask,
    make_domain_tasks,
)
from finetune_jax.tasks.objectives.domain_losses import (
    pair_distance,
    uncertainty_weighted,
)
from finetune_jax.tasks.task import LossOutput, StepContext, Task

METRICS = ("accuracy", "loss")
BALANCES = ("domains", "examples", "uncertainty")
STATISTICS = ("shared", "domain")
# Weight decay leaves parameters of this last name alone by default.
LOG_VARIANCE = "log_variance/bias"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class JointDomains:
    """Domains whose models share parameters, and the sum of their losses.

    Attributes:
        specs: Description of each domain's data.
        tasks: Task of each domain, as if it were alone.
        shared: Regexes over the names that parameters have in a domain's model.
        statistics: 'shared', or 'domain': each domain has its own running averages of
            BatchNorm, even where its parameters are shared.
        balance: 'domains', 'examples' or 'uncertainty': how losses are weighted.
        weights: Weight of each domain's loss, by name.
        soft: Strength of the penalty that pulls the models together.
    """

    specs: Mapping[str, DataSpec]
    tasks: Mapping[str, Task]
    shared: tuple[str, ...]
    statistics: str
    balance: str
    weights: Mapping[str, float]
    soft: float

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[Any, Any]]:
        """Shapes of the parameters and batch statistics of each domain's model."""
        key = jax.random.key(0)
        return {k: jax.eval_shape(task.init, key) for k, task in self.tasks.items()}

    def is_shared(self, name: str) -> bool:
        """Returns whether the parameter of a name is shared."""
        return any(re.fullmatch(pattern, name) for pattern in self.shared)

    def state_name(self, domain: str, name: str, *, of_stats: bool = False) -> str:
        """Returns the name in the state of a variable of one domain's model."""
        is_shared = self.is_shared(name)
        if of_stats and self.statistics == "domain":
            is_shared = False
        return name if is_shared else f"{domain}/{name}"

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics.

        A shared parameter is sampled as in the first domain that has it.
        """
        places: tuple[dict, dict] = ({}, {})
        for domain, task in self.tasks.items():
            common = task.init(rng)
            own = task.init(model_key(rng, domain))
            for kind in (0, 1):
                shared, alone = named(common[kind]), named(own[kind])
                for name in alone:
                    place = self.state_name(domain, name, of_stats=kind == 1)
                    value = shared[name] if place == name else alone[name]
                    places[kind].setdefault(place, value)
        if self.balance == "uncertainty":
            kind = next(iter(places[0].values())).dtype
            for domain in self.tasks:
                places[0][f"{domain}/{LOG_VARIANCE}"] = jnp.zeros((), kind)
        params, batch_stats = places
        return unflatten_dict(params, sep="/"), unflatten_dict(batch_stats, sep="/")

    def variables_of(self, domain: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables of one domain's model."""
        found = {}
        for kind, shapes in zip(("params", "batch_stats"), self.shapes[domain]):
            leaves, of_stats = named(variables[kind]), kind == "batch_stats"
            own = {
                name: leaves[self.state_name(domain, name, of_stats=of_stats)]
                for name in named(shapes)
            }
            found[kind] = like(shapes, own)
        return found

    def mode_of(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of one domain's model run, by their own names."""
        begin = f"{domain}/"
        own = [s.removeprefix(begin) for s in mode.learning if s.startswith(begin)]
        return dataclasses.replace(mode, learning=frozenset(own))

    def learning(self, stages: frozenset[str]) -> frozenset[str]:
        """Returns the stages in training mode, also by the names that domains give them."""
        own = {
            f"{domain}/{stage}"
            for domain, task in self.tasks.items()
            for stage in task.models.stages
            if stage in stages
        }
        return stages | own

    def stages(self) -> tuple[str, ...]:
        """Returns the shared stages, then those of each domain; all have parameters."""
        found: dict[str, None] = {}
        owned: dict[str, None] = {}
        for domain, task in self.tasks.items():
            for stage in task.models.stages:
                names = [n for n in named(self.shapes[domain][0]) if _is_in(n, stage)]
                shared = [self.is_shared(name) for name in names]
                found |= {stage: None} if any(shared) else {}
                owned |= {f"{domain}/{stage}": None} if not all(shared) else {}
            if self.balance == "uncertainty":
                owned[f"{domain}/{LOG_VARIANCE.partition('/')[0]}"] = None
        return (*found, *owned)

    def totals(self, batch: dict) -> dict:
        """Returns the loss weight of each domain, and the number of micro-batches."""
        if self.balance == "examples":
            return {}
        weights = {domain: self._weight(domain, part) for domain, part in batch.items()}
        return {"weights": weights, "micro_batches": jnp.ones(())}

    def _weight(self, domain: str, batch: dict) -> jax.Array:
        """Returns the divisor of a domain's loss, which does not depend on the logits."""
        target = _target(self.tasks[domain])
        logits_BxK = jnp.zeros((len(batch["weight"]), target.logits))
        return target.loss(logits_BxK, batch).weight

    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the weighted losses of all domains, and 'domain/name' of each."""
        batch, totals = dict(batch), batch.get("totals")
        batch.pop("totals", None)
        losses, moved, metrics = {}, {}, {}
        for domain, part in batch.items():
            own = dataclasses.replace(
                context,
                rng=model_key(context.rng, domain),
                mode=self.mode_of(domain, context.mode),
            )
            found = self.tasks[domain].loss(
                self.variables_of(domain, variables), part, own
            )
            losses[domain] = found.total, found.weight
            moved[domain] = found.batch_stats
            metrics |= {f"{domain}/{name}": p for name, p in found.metrics.items()}
        params = variables["params"]
        total: Any
        weight: Any
        if totals is None:
            total, weight = (sum(pair) for pair in zip(*losses.values()))
        else:
            weight = 1 / totals["micro_batches"]
            total = sum(
                self._weighted(domain, params, loss, totals["weights"][domain], weight)
                for domain, (loss, _) in losses.items()
            )
        if self.soft:
            total += weight * self.soft * self._distance(params)
        metrics["loss"] = total, weight
        stats = self._scattered(variables["batch_stats"], moved, context.mode)
        return LossOutput(total, weight, metrics, stats)

    def _weighted(
        self, domain: str, params: Any, total: Any, divisor: Any, share: Any
    ) -> jax.Array:
        """Returns a micro-batch's part of the loss of a domain."""
        if self.balance == "domains":
            return self.weights[domain] * total / divisor
        log_variance = named(params)[f"{domain}/{LOG_VARIANCE}"]
        # A sum over micro-batches: the term without a loss is divided among them.
        weighted = uncertainty_weighted(
            total / (divisor * share),
            log_variance,
            of_classes=self.tasks[domain].head_kind != "numbers",
        )
        return self.weights[domain] * share * weighted

    def _distance(self, params: Any) -> jax.Array:
        """Returns the distance between the models without their heads."""
        leaves, models = named(params), []
        for domain, task in self.tasks.items():
            head, names = task.models.stages[-1], named(self.shapes[domain][0])
            names = [n for n in names if not _is_in(n, head)]
            own = {n: leaves[f"{domain}/{n}"] for n in names if not self.is_shared(n)}
            models.append(own)
        return pair_distance(models)

    def _scattered(self, batch_stats: Any, moved: Mapping, mode: Mode) -> Any:
        """Returns the batch statistics of all after an update of some domains' own.

        Shared statistics become the mean of what the domains would make them.
        """
        found: dict[str, list] = {}
        for domain, stats in moved.items():
            for name, leaf in named(stats).items():
                place = self.state_name(domain, name, of_stats=True)
                if mode.moves(stage_of(place, tuple(self.tasks))):
                    found.setdefault(place, []).append(leaf)
        means = {place: sum(leaves) / len(leaves) for place, leaves in found.items()}
        return like(batch_stats, named(batch_stats) | means)


def _target(task: Any) -> Any:
    """Returns the target of a domain's task."""
    return task.target


def _is_in(name: str, stage: str) -> bool:
    return name.startswith(f"{stage}/")


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
) -> MultiDomainTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Has the domains.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        of: The task of every domain, such as 'classify' or 'regress'.
        of_args: Options of that task besides `metrics`.
        shared: Regexes over the names of shared parameters; () shares nothing. The
            default shares all but the heads.
        statistics: 'shared': running averages of BatchNorm are shared where names match.
            'domain': each domain has its own.
        balance: 'domains': the loss is the sum over domains of their mean losses, each
            times its weight. 'examples': the mean over all examples. 'uncertainty': as
            'domains', each mean weighted by a trained variance (Kendall et al. 2018).
        weights: Weights of the domains' losses, in the order of `config.data.domains`; ()
            weighs each by 1.
        soft: Strength of soft sharing: |a - b|^2 / 2 is added for each pair of models,
            over the parameters that they do not share, without the heads.
        metrics: Metrics of each domain.

    Raises:
        UserError: Something unknown or out of range, or domains whose shapes clash.
    """
    registry.choose(dict.fromkeys(BALANCES), balance, "config.task.balance")
    registry.choose(dict.fromkeys(STATISTICS), statistics, "config.task.statistics")
    tasks = make_domain_tasks(
        task_module(of),
        {**of_args, "metrics": metrics},
        data=data,
        model=model,
        precision=precision,
    )
    by_domain = dict(zip(tasks, weights or (1.0,) * len(tasks)))
    _check(data, by_domain, weights, shared, balance, soft)
    domains = JointDomains(
        specs=data.domains,
        tasks=tasks,
        shared=shared,
        statistics=statistics,
        balance=balance,
        weights=by_domain,
        soft=soft,
    )
    raise_if(
        _clashes(domains),
        "The domains cannot share these parameters, whose shapes differ:",
        "Give the domains one data.image_size and data.channels, or share less: "
        "config.task.shared.",
    )
    modules = {name: task.models[""] for name, task in tasks.items()}
    models = ModelSet(modules=modules, stage_names=domains.stages(), cacheable=False)
    return MultiDomainTask(models=models, domains=domains)


def _check(
    data: DataSpec,
    by_domain: Mapping[str, float],
    weights: tuple[float, ...],
    shared: tuple[str, ...],
    balance: str,
    soft: float,
) -> None:
    problems: list[Any] = [
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
        with collected(problems):
            registry.check_regex(pattern, "config.task.shared")
    raise_if(problems, "The domains cannot be learned together:")


def _clashes(domains: JointDomains) -> list[str]:
    """Returns the shared parameters whose shapes differ.

    Raises:
        UserError: Rules that match nothing.
    """
    shapes: dict[str, dict[str, tuple]] = {}
    for domain, (params, _) in domains.shapes.items():
        for name, leaf in named(params).items():
            shapes.setdefault(name, {})[domain] = tuple(leaf.shape)
    problems = [
        f"{name}: " + ", ".join(f"{domain} {shape}" for domain, shape in found.items())
        for name, found in shapes.items()
        if domains.is_shared(name) and len(set(found.values())) > 1
    ]
    unmatched = [
        pattern
        for pattern in domains.shared
        if not any(re.fullmatch(pattern, name) for name in shapes)
    ]
    if unmatched and not problems:
        hints = [f"{p!r}{registry.closest(p, shapes)}" for p in unmatched]
        raise UserError(f"config.task.shared: {', '.join(hints)} matches nothing")
    return problems
