"""Domain adaptation: labelled domains teach a model that shall work on one without.

All domains have one model. In training a domain with `labelled=False` gives inputs and
nothing else; its labels are read where the state is measured. Where a phase lets nothing
learn, with `batch_stats='update_all'`, running averages become the target's alone: AdaBN
(Li et al. 2017).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import problems_error
from finetune_jax.core.pytrees import like, named
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.layers.heads import Head, check_widths
from finetune_jax.tasks import task_module
from finetune_jax.tasks.components.multi_domain import Several, domain_key, make_parts
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
from finetune_jax.tasks.task import Mode, Task, apply

METRICS = ("accuracy", "loss")
METHODS = ("none", "dann", "mmd", "coral", "self_training")
SCHEDULES = ("ramp", "constant")
DISCRIMINATOR = "discriminator"


class Discriminator(nn.Module):
    """Tells the source from the target by features: one logit, positive for the source.

    Attributes:
        hidden: Widths of its hidden layers.
    """

    hidden: tuple[int, ...]
    param_dtype: Any = jnp.float32
    stages = ("layers",)

    def setup(self):
        """Makes the only stage."""
        self.layers = Head(classes=1, hidden=self.hidden, param_dtype=self.param_dtype)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns logits [B, 1] of features [B, F]."""
        del first, last
        return self.layers(x, train=train)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainAdapt(Several):
    """One classifier for all domains, and what makes them alike to it.

    Attributes:
        models: The classifier under '', and the discriminator of 'dann'.
        data: What the examples of the domains look like.
        parts: The task of each domain; all have the classifier.
        method: In `METHODS`.
        strength: Of what the method adds to the loss.
        schedule: 'ramp' lets that grow over a phase, from 0; 'constant'.
        features: The stage whose output the method compares.
        threshold: Probability from which 'self_training' takes a class for the label.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    parts: Mapping[str, Task]
    method: str
    strength: float
    schedule: str
    features: str
    threshold: float

    @property
    def _sources(self) -> list[str]:
        return [name for name, spec in self.data.domains.items() if spec.labelled]

    @property
    def _targets(self) -> list[str]:
        return [name for name, spec in self.data.domains.items() if not spec.labelled]

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        part = self.parts[self._sources[0]]
        params, batch_stats = part.init(rng)
        if DISCRIMINATOR in self.models:
            shape = jax.eval_shape(self._features_of_nothing, params, batch_stats).shape
            variables = self.models[DISCRIMINATOR].init(
                domain_key(rng, DISCRIMINATOR), jnp.zeros(shape), train=False
            )
            params = {**params, DISCRIMINATOR: variables["params"]}
        return params, batch_stats

    def _features_of_nothing(self, params: Any, batch_stats: Any) -> jax.Array:
        shape = self.data.domains[self._sources[0]].shape
        variables = {"params": params, "batch_stats": batch_stats}
        x = jnp.zeros((1, *shape), named(params)[next(iter(named(params)))].dtype)
        found, _ = apply(self, "", variables, x, mode=Mode(), last=self.features)
        return flat(found)

    def gather(self, domain: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
        """Returns what the classifier has of parameters and batch statistics."""
        del domain
        own = {name: leaf for name, leaf in params.items() if name != DISCRIMINATOR}
        return own, batch_stats

    def own_mode(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of the classifier run; sources adapt nothing to them."""
        if not mode.learning and domain not in self._targets:
            return Mode(axis_name=mode.axis_name)
        return mode

    def whole(self, batch: dict) -> dict:
        """Returns the weight of each domain, and how many micro-batches there are."""
        weights = {domain: jnp.sum(part["weight"]) for domain, part in batch.items()}
        for domain in self._sources:
            task: Any = self.parts[domain]
            if domain in batch:
                part = batch[domain]
                logits_BxK = jnp.zeros((len(part["weight"]), task.answer.logits))
                # What the loss is divided by, which no logits change.
                weights[f"{domain}/loss"] = task.answer.loss(logits_BxK, part)[0][1]
        return {"weights": weights, "parts": jnp.ones(())}

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
        """Returns the loss of the labelled domains and what the method adds to it."""
        del fixed
        assert first is None
        batch, whole = dict(batch), batch["whole"]
        del batch["whole"]
        share = 1 / whole["parts"]
        total, metrics, found, moved = jnp.zeros(()), {}, {}, []
        for domain, part in batch.items():
            *found[domain], stats = self._run(
                domain, params, batch_stats, part, mode=mode, rng=rng
            )
            if domain in self._movers(mode):
                moved.append(stats)
            if domain in self._sources:
                task: Any = self.parts[domain]
                (sum_of, _), pairs = task.answer.loss(found[domain][1], part)
                total += sum_of / whole["weights"][f"{domain}/loss"]
                metrics |= {f"{domain}/{name}": pair for name, pair in pairs.items()}
        total /= len([domain for domain in batch if domain in self._sources]) or 1
        if self.method != "none" and len(batch) == len(self.data.domains):
            strength = self.strength
            if self.schedule == "ramp":
                strength = strength * ramp(progress)
            added, more = self._added(params, batch, found, strength, whole, mode)
            total += added
            metrics |= more | {"alignment": (added, share)}
        metrics["loss"] = total, share
        means = [sum(leaves) / len(leaves) for leaves in _leaves_of(moved)]
        stats = like(batch_stats, dict(zip(named(batch_stats), means)))
        kept = self._moved(batch_stats, stats, mode)
        return (total, share), (kept, metrics)

    def _movers(self, mode: Mode) -> list[str]:
        """Returns the domains whose examples move running averages of BatchNorm."""
        if not mode.learning:
            return self._targets
        return self._sources if self.method == "none" else list(self.parts)

    def _moved(self, before: Any, after: Any, mode: Mode) -> Any:
        """Returns batch statistics: only of stages that move them, to the bit."""
        leaves = named(after)
        kept = {
            name: leaves[name] if mode.moves(name.partition("/")[0]) else leaf
            for name, leaf in named(before).items()
        }
        return like(before, kept)

    def _run(
        self, domain: str, params: Any, batch_stats: Any, part: dict, *, mode, rng
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Returns features [B, F], logits [B, K] and batch statistics of a domain."""
        module: Any = self.models[""]
        after = module.stages[module.stages.index(self.features) + 1]
        options = {"mode": self.own_mode(domain, mode), "rng": domain_key(rng, domain)}
        own, stats = self.gather(domain, params, batch_stats)
        variables = {"params": own, "batch_stats": stats}
        x, stats = apply(
            self, "", variables, part["inputs"], last=self.features, **options
        )
        variables = {"params": own, "batch_stats": stats}
        logits, stats = apply(self, "", variables, x, first=after, **options)
        return flat(x), logits, stats

    def _added(
        self,
        params: Any,
        batch: dict,
        found: Mapping[str, Any],
        strength: Any,
        whole: Mapping,
        mode: Mode,
    ) -> tuple[jax.Array, dict]:
        """Returns a micro-batch's part of what the method adds, and metrics of it."""
        if self.method == "self_training":
            return self._self_training(batch, found, strength, whole)
        if self.method == "dann":
            return self._adversarial(params, batch, found, strength, whole, mode)
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
        # Every device has all of it, and every micro-batch one of its own.
        value = distance(one[0], other[0], one[1], other[1])
        return strength * value / whole["parts"], {}

    def _self_training(
        self, batch: dict, found: Mapping[str, Any], strength: Any, whole: Mapping
    ) -> tuple[jax.Array, dict]:
        added, metrics = jnp.zeros(()), {}
        for name in self._targets:
            weight_B = batch[name]["weight"]
            loss_B, is_certain_B = confident(found[name][1], threshold=self.threshold)
            added += jnp.sum(loss_B * weight_B) / whole["weights"][name]
            pair = jnp.sum(is_certain_B * weight_B), jnp.sum(weight_B)
            metrics[f"{name}/certain"] = pair
        return strength * added / len(self._targets), metrics

    def _adversarial(
        self,
        params: Any,
        batch: dict,
        found: Mapping[str, Any],
        strength: Any,
        whole: Mapping,
        mode: Mode,
    ) -> tuple[jax.Array, dict]:
        """Source: Ganin et al. 2016, equation 9, each side a mean of its own."""
        added, right, counted = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
        variables = {"params": params[DISCRIMINATOR]}
        for name, part in batch.items():
            is_source = name in self._sources
            sides = len(self._sources if is_source else self._targets)
            turned = reverse_gradient(found[name][0], jnp.asarray(strength))
            logits_Bx1, _ = apply(self, DISCRIMINATOR, variables, turned, mode=mode)
            logit_B, weight_B = logits_Bx1[:, 0], part["weight"]
            loss_B = discrimination(logit_B, is_source=is_source)
            added += jnp.sum(loss_B * weight_B) / whole["weights"][name] / (2 * sides)
            right += jnp.sum(((logit_B > 0) == is_source) * weight_B)
            counted += jnp.sum(weight_B)
        return added, {"discriminator/accuracy": (right, counted)}


def _leaves_of(trees: list) -> list[tuple]:
    """Returns the leaves of the same place in several trees."""
    return list(zip(*(jax.tree.leaves(tree) for tree in trees)))


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
) -> DomainAdapt:
    """Returns the task that `config.task` describes.

    Args:
        data: Has the domains; one at least is labelled, and one is not.
        model: The section `config.model`.
        precision: As in the config.
        method: 'dann' (gradient reversal), 'mmd', 'coral', 'self_training', or 'none':
            what learns, learns from labelled domains alone.
        strength: Of what it adds to the loss; of 'dann', of the reversed gradient.
        schedule: 'ramp' lets the strength grow over a phase as Ganin et al. 2016 do, or
            'constant'.
        features: The stage whose output is compared; '' is the last before the head.
        discriminator: Widths of the hidden layers of the discriminator of 'dann'.
        threshold: Probability from which 'self_training' takes a class for the label.
        of_args: What `config.task` would say of 'classify', but for `metrics`.
        metrics: Of each domain.

    Raises:
        UserError: Something unknown or out of range, or domains that do not fit.
    """
    registry.choose(dict.fromkeys(METHODS), method, "config.task.method")
    registry.choose(dict.fromkeys(SCHEDULES), schedule, "config.task.schedule")
    check_widths("config.task.discriminator", discriminator)
    parts = make_parts(
        task_module("classify"),
        {**of_args, "metrics": metrics},
        data=data,
        model=model,
        precision=precision,
    )
    module: Any = next(iter(parts.values())).models[""]
    features = features or module.stages[-2]
    _check(data, module, features, threshold, strength)
    models: dict[str, nn.Module] = {"": module}
    if method == "dann":
        kind = jnp.dtype("float64" if precision == "float64" else "float32")
        models[DISCRIMINATOR] = Discriminator(hidden=discriminator, param_dtype=kind)
    return DomainAdapt(
        models=models,
        data=data,
        parts=parts,
        method=method,
        strength=float(strength),
        schedule=schedule,
        features=features,
        threshold=float(threshold),
    )


def _check(
    data: DataSpec, module: Any, features: str, threshold: float, strength: float
) -> None:
    """Checks what the task asks for against the domains and the model.

    Raises:
        UserError: Lists all that does not fit.
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
            f"{registry.closest(features, module.stages)} There are: "
            f"{', '.join(module.stages[:-1])}."
        )
    if not 0 <= threshold <= 1:
        problems.append(f"config.task.threshold: {threshold}; 0 to 1 is needed")
    if strength < 0:
        problems.append(f"config.task.strength: {strength}; 0 or more is needed")
    if problems:
        raise problems_error("The domains cannot be adapted:", problems)
