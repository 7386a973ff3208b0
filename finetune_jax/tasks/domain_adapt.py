"""Domain adaptation: labelled source domains train a model for an unlabelled target.

All domains have one model. In training a domain with `labelled=False` gives inputs only;
its labels are read where the state is measured. In a phase that trains nothing, with
`batch_stats='update_all'`, the running averages become those of the target alone: AdaBN
(Li et al. 2017).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import raise_if
from finetune_jax.core.pytrees import like, named
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.layers.heads import Head, check_widths
from finetune_jax.models.layers.stages import Staged
from finetune_jax.models.modes import Mode, model_key
from finetune_jax.tasks import task_module
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.multi_domain import (
    MultiDomainTask,
    make_domain_tasks,
)
from finetune_jax.tasks.objectives.domain_losses import (
    confident,
    coral,
    discrimination,
    flat,
    mmd,
    over_axis,
    ramp,
    reverse_gradient,
)
from finetune_jax.tasks.task import LossOutput, StepContext, Task

METRICS = ("accuracy", "loss")
METHODS = ("none", "dann", "mmd", "coral", "self_training")
SCHEDULES = ("ramp", "constant")
DISCRIMINATOR = "discriminator"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedDomains:
    """Source and target domains of one classifier, and an adaptation loss.

    Attributes:
        specs: Description of each domain's data.
        tasks: Task of each domain; all have the classifier.
        models: The classifier under '', and the discriminator of 'dann'.
        method: In `METHODS`.
        strength: Weight of the adaptation loss.
        schedule: 'ramp' increases the weight over a phase, from 0; or 'constant'.
        features: The stage whose output the method compares.
        threshold: Probability from which 'self_training' takes a class for the label.
    """

    specs: Mapping[str, DataSpec]
    tasks: Mapping[str, Task]
    models: ModelSet
    method: str
    strength: float
    schedule: str
    features: str
    threshold: float

    @property
    def _sources(self) -> list[str]:
        return [name for name, spec in self.specs.items() if spec.labelled]

    @property
    def _targets(self) -> list[str]:
        return [name for name, spec in self.specs.items() if not spec.labelled]

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        source = self.specs[self._sources[0]]
        return self.models.init(rng, jnp.zeros((1, *source.shape), jnp.float32))

    def variables_of(self, domain: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables of the classifier."""
        del domain
        params = {k: v for k, v in variables["params"].items() if k != DISCRIMINATOR}
        return {**variables, "params": params}

    def state_name(self, domain: str, name: str, *, of_stats: bool = False) -> str:
        """Returns the name of a variable in the state, which is its own."""
        del domain, of_stats
        return name

    def mode_of(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of the classifier run; AdaBN adapts to targets only."""
        if not mode.learning and domain not in self._targets:
            return Mode(axis_name=mode.axis_name)
        return mode

    def learning(self, stages: frozenset[str]) -> frozenset[str]:
        """Returns the stages in training mode."""
        return stages

    def totals(self, batch: dict) -> dict:
        """Returns the weight of each domain, and the number of micro-batches."""
        weights = {domain: jnp.sum(part["weight"]) for domain, part in batch.items()}
        for domain in self._sources:
            if domain in batch:
                part, target = batch[domain], self._target(domain)
                logits_BxK = jnp.zeros((len(part["weight"]), target.logits))
                # The divisor of the loss does not depend on the logits.
                weights[f"{domain}/loss"] = target.loss(logits_BxK, part).weight
        return {"weights": weights, "micro_batches": jnp.ones(())}

    def _target(self, domain: str) -> Any:
        task: Any = self.tasks[domain]
        return task.target

    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the loss of the labelled domains plus the adaptation loss."""
        batch, totals, mode = dict(batch), batch["totals"], context.mode
        del batch["totals"]
        share = 1 / totals["micro_batches"]
        total, metrics, found, moved = jnp.zeros(()), {}, {}, []
        for domain, part in batch.items():
            *found[domain], stats = self._run(domain, variables, part, context)
            if domain in self._movers(mode):
                moved.append(stats)
            if domain in self._sources:
                labels = self._target(domain).loss(found[domain][1], part)
                total += labels.total / totals["weights"][f"{domain}/loss"]
                metrics |= {f"{domain}/{n}": pair for n, pair in labels.metrics.items()}
        total /= len([domain for domain in batch if domain in self._sources]) or 1
        if self.method != "none" and len(batch) == len(self.specs):
            strength = self.strength
            if self.schedule == "ramp":
                strength = strength * ramp(context.progress)
            added, more = self._added(variables, batch, found, strength, totals, mode)
            total += added
            metrics |= more | {"alignment": (added, share)}
        metrics["loss"] = total, share
        batch_stats = variables["batch_stats"]
        stats = batch_stats
        if moved:
            stats = jax.tree.map(lambda *each: sum(each) / len(each), *moved)
        return LossOutput(total, share, metrics, self._moved(batch_stats, stats, mode))

    def _movers(self, mode: Mode) -> list[str]:
        """Returns the domains whose examples move running averages of BatchNorm."""
        if not mode.learning:
            return self._targets
        return self._sources if self.method == "none" else list(self.tasks)

    def _moved(self, before: Any, after: Any, mode: Mode) -> Any:
        """Returns batch statistics in which only the stages of the mode have moved."""
        leaves = named(after)
        kept = {
            name: leaves[name] if mode.moves(name.partition("/")[0]) else leaf
            for name, leaf in named(before).items()
        }
        return like(before, kept)

    def _run(
        self,
        domain: str,
        variables: Mapping[str, Any],
        part: dict,
        context: StepContext,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Returns features [B, F], logits [B, K] and batch statistics of a domain."""
        stages = self.models[""].stages
        after = stages[stages.index(self.features) + 1]
        mode, rng = self.mode_of(domain, context.mode), model_key(context.rng, domain)
        own = self.variables_of(domain, variables)
        x, stats = self.models.apply(
            own, part["inputs"], last=self.features, mode=mode, rng=rng
        )
        own = {**own, "batch_stats": stats}
        logits, stats = self.models.apply(own, x, first=after, mode=mode, rng=rng)
        return flat(x), logits, stats

    def _added(
        self, variables: Any, batch: dict, found: Mapping[str, Any], strength: Any,
        totals: Mapping, mode: Mode,
    ) -> tuple[jax.Array, dict]:  # fmt: skip
        """Returns a micro-batch's part of the adaptation loss, and its metrics."""
        if self.method == "self_training":
            return self._self_training(batch, found, strength, totals)
        if self.method == "dann":
            return self._adversarial(variables, batch, found, strength, totals, mode)
        one, other = (
            [
                over_axis(jnp.concatenate(arrays), mode.axis_name)
                for arrays in (
                    [found[name][0] for name in names],
                    [batch[name]["weight"] for name in names],
                )
            ]
            for names in (self._sources, self._targets)
        )
        distance = {"mmd": mmd, "coral": coral}[self.method]
        # Every device has the whole distance, and every micro-batch one of its own.
        value = distance(one[0], other[0], one[1], other[1])
        return strength * value / totals["micro_batches"], {}

    def _self_training(
        self, batch: dict, found: Mapping[str, Any], strength: Any, totals: Mapping
    ) -> tuple[jax.Array, dict]:
        added, metrics = jnp.zeros(()), {}
        for name in self._targets:
            weight_B = batch[name]["weight"]
            loss_B, is_certain_B = confident(found[name][1], threshold=self.threshold)
            added += jnp.sum(loss_B * weight_B) / totals["weights"][name]
            pair = jnp.sum(is_certain_B * weight_B), jnp.sum(weight_B)
            metrics[f"{name}/certain"] = pair
        return strength * added / len(self._targets), metrics

    def _adversarial(
        self, variables: Any, batch: dict, found: Mapping[str, Any], strength: Any,
        totals: Mapping, mode: Mode,
    ) -> tuple[jax.Array, dict]:  # fmt: skip
        """Source: Ganin et al. 2016, equation 9, each side a mean of its own."""
        added, right, counted = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
        for name, part in batch.items():
            is_source = name in self._sources
            sides = len(self._sources if is_source else self._targets)
            turned = reverse_gradient(found[name][0], jnp.asarray(strength))
            logits_Bx1, _ = self.models.apply(
                variables, turned, prefix=DISCRIMINATOR, mode=mode
            )
            logit_B, weight_B = logits_Bx1[:, 0], part["weight"]
            loss_B = discrimination(logit_B, is_source=is_source)
            added += jnp.sum(loss_B * weight_B) / totals["weights"][name] / (2 * sides)
            right += jnp.sum(((logit_B > 0) == is_source) * weight_B)
            counted += jnp.sum(weight_B)
        return added, {"discriminator/accuracy": (right, counted)}


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    method: str = "dann",
    strength: float = 1.0,
    schedule: str = "ramp",
    features: str = "",
    discriminator: tuple[int, ...] = (64,),
    threshold: float = 0.9,
    of_args: Mapping[str, Any] = MappingProxyType({}),
    metrics: tuple[str, ...] = METRICS,
) -> MultiDomainTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Has the domains; at least one is labelled, and at least one is not.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        method: 'dann' (gradient reversal), 'mmd', 'coral', 'self_training', or 'none',
            which trains on labelled domains alone.
        strength: Weight of the adaptation loss; for 'dann', of the reversed gradient.
        schedule: 'ramp' increases the strength over a phase as Ganin et al. 2016 do, or
            'constant'.
        features: The stage whose output is compared; '' is the last before the head.
        discriminator: Widths of the hidden layers of the discriminator of 'dann'.
        threshold: Probability from which 'self_training' takes a class for the label.
        of_args: Options of 'classify' besides `metrics`.
        metrics: Metrics of each domain.

    Raises:
        UserError: Something unknown or out of range, or domains that do not fit.
    """
    registry.choose(dict.fromkeys(METHODS), method, "config.task.method")
    registry.choose(dict.fromkeys(SCHEDULES), schedule, "config.task.schedule")
    check_widths("config.task.discriminator", discriminator)
    tasks = make_domain_tasks(
        task_module("classify"),
        {**of_args, "metrics": metrics},
        data=data,
        model=model,
        precision=precision,
    )
    models = next(iter(tasks.values())).models
    features = features or models.stages[-2]
    _check(data, models[""], features, threshold, strength)
    if method == "dann":
        kind = jnp.dtype("float64" if precision == "float64" else "float32")
        # Classifies features as source or target: one logit, positive for the source.
        layers = Head(1, discriminator, param_dtype=kind, name="layers")
        models = ModelSet(
            modules={
                "": models[""],
                DISCRIMINATOR: Staged((layers,), param_dtype=kind),
            },
            auxiliary=frozenset({DISCRIMINATOR}),
            examples={DISCRIMINATOR: _feature_shape(tasks, features)},
        )
    models = dataclasses.replace(models, cacheable=False)
    domains = AdaptedDomains(
        specs=data.domains,
        tasks=tasks,
        models=models,
        method=method,
        strength=float(strength),
        schedule=schedule,
        features=features,
        threshold=float(threshold),
    )
    return MultiDomainTask(models=models, domains=domains)


def _feature_shape(tasks: Mapping[str, Task], features: str) -> jax.ShapeDtypeStruct:
    """Returns the shape of the flattened features [1, F] of the classifier."""
    task: Any = next(iter(tasks.values()))

    def features_of(rng: jax.Array) -> jax.Array:
        params, batch_stats = task.init(rng)
        variables = {"params": params, "batch_stats": batch_stats}
        x = task.inputs.example().astype(task.inputs.dtype)
        return flat(task.models.apply(variables, x, last=features)[0])

    return jax.eval_shape(features_of, jax.random.key(0))


def _check(
    data: DataSpec, module: Any, features: str, threshold: float, strength: float
) -> None:
    """Checks the options of the task against the domains and the model.

    Raises:
        UserError: Lists all problems.
    """
    specs, problems = data.domains, []
    for labelled in (True, False):
        named_so = [name for name, spec in specs.items() if spec.labelled is labelled]
        if not named_so:
            problems.append(
                f"config.data.domains: none with labelled={labelled}; a source has "
                "labels, and a target has none in training"
            )
        problems += [
            f"config.data.domains: {name!r} has no part in updates; give it a weight"
            for name in named_so
            if not specs[name].share
        ]
    for key, values in (
        ("shapes", {name: spec.shape for name, spec in specs.items()}),
        ("classes", {name: spec.class_names for name, spec in specs.items()}),
    ):
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            problems.append(
                f"config.data.domains: one model for all, but their {key} differ: {found}"
            )
    if features not in module.stages[:-1]:
        problems.append(
            f"config.task.features: no stage {features!r} before the head"
            f"{registry.closest(features, module.stages) or '.'} There are: "
            f"{', '.join(module.stages[:-1])}."
        )
    if not 0 <= threshold <= 1:
        problems.append(f"config.task.threshold: {threshold}; 0 to 1 is needed")
    if strength < 0:
        problems.append(f"config.task.strength: {strength}; 0 or more is needed")
    raise_if(problems, "The domains cannot be adapted:")
