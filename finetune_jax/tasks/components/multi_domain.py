"""Multi-domain tasks: several data sets, each with a task of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import jax

from finetune_jax.config import Config
from finetune_jax.config.schema import Domain as DomainSection
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import Data
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.modes import Mode, model_key
from finetune_jax.tasks.components.accepts import check_accepts
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.task import LossOutput, StepContext, Task


class Domains(Protocol):
    """The domains of a task, how they share a state, and their common loss."""

    @property
    def specs(self) -> Mapping[str, DataSpec]:
        """Description of each domain's data."""
        ...

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Task of each domain, as if it were alone."""
        ...

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics of all domains."""
        ...

    def variables_of(self, domain: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables of one domain's model."""
        ...

    def state_name(self, domain: str, name: str, *, of_stats: bool = False) -> str:
        """Returns the name in the state of a variable of one domain's model.

        Args:
            domain: The domain.
            name: Name of a parameter in its model, or of a batch statistic.
            of_stats: Whether it is a batch statistic.
        """
        ...

    def mode_of(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of one domain's model run, by their own names."""
        ...

    def learning(self, stages: frozenset[str]) -> frozenset[str]:
        """Returns the stages in training mode if `stages` have trained parameters."""
        ...

    def totals(self, batch: dict) -> dict:
        """Returns the values of a prepared micro-batch that the loss needs of the update.

        They are summed over micro-batches and devices; the loss finds them in 'totals'.
        """
        ...

    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the loss of a prepared batch of all domains."""
        ...


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiDomainTask(Task):
    """A task with one batch per domain; batches and specs are dicts by domain.

    Domains are measured and predicted one by one, each by its own task.

    Attributes:
        models: The models of all domains.
        domains: The domains and their loss.
    """

    models: ModelSet
    domains: Domains  # type: ignore[override]

    @property
    def head_kind(self) -> str:  # type: ignore[override]
        """The kind of prediction of the first domain."""
        return next(iter(self.domains.tasks.values())).head_kind

    @property
    def batch_spec(self) -> dict[str, Any]:
        """Batch spec of each domain."""
        return {k: self._spec(k, t.batch_spec) for k, t in self.domains.tasks.items()}

    @property
    def train_batch_spec(self) -> dict[str, Any]:
        """Batch spec of each domain in training."""
        tasks = self.domains.tasks.items()
        return {name: self._spec(name, task.train_batch_spec) for name, task in tasks}

    def _spec(self, domain: str, spec: dict) -> dict:
        """Returns a spec without the labels of unlabelled domains."""
        is_labelled = self.domains.specs[domain].labelled
        return {k: v for k, v in spec.items() if is_labelled or k != "label"}

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        return self.domains.init(rng)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the prepared batch of each domain, each with keys of its own."""
        return {
            name: self.domains.tasks[name].prepare(
                part, model_key(rng, name), self.domains.mode_of(name, mode)
            )
            for name, part in batch.items()
        }

    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the loss of all domains."""
        assert context.first is None
        return self.domains.loss(variables, batch, context)

    def outputs(
        self, variables: Mapping[str, Any], batch: dict, *, first: str | None = None
    ) -> dict:
        """Returns the outputs of every domain as 'domain/name'."""
        assert first is None
        found = {}
        for domain, part in batch.items():
            own = self.domains.variables_of(domain, variables)
            outputs = self.domains.tasks[domain].outputs(own, part)
            found |= {f"{domain}/{name}": rows for name, rows in outputs.items()}
        return found

    def _each_its_own(self, *args: Any, **kwargs: Any) -> Any:
        """Raises an error: each domain has its own outputs, metrics and records."""
        raise NotImplementedError

    serving_outputs = metrics = check_splits = records = _each_its_own


def shares(task: Task) -> dict[str, int]:
    """Returns the number of examples of each domain in an update."""
    specs = {} if task.domains is None else task.domains.specs
    return {name: spec.share for name, spec in specs.items() if spec.share}


def make_domain_tasks(
    module: Any,
    arguments: Mapping[str, Any],
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
) -> dict[str, Task]:
    """Returns the task of each domain.

    Args:
        module: Module of the task that they have.
        arguments: Options of that task, as in `config.task`.
        data: Has the domains.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.

    Raises:
        UserError: There are no domains, or one does not fit.
    """
    if not data.domains:
        raise UserError(
            "config.task.name: a task of several domains; describe them in "
            "config.data.domains, each with a `domain`, its name"
        )
    given = {"model": model, "precision": precision}
    for spec in data.domains.values():
        check_accepts(module, module.__name__.rpartition(".")[2], spec)
    return {
        name: registry.call(module.make, arguments, "config.task", data=spec, **given)
        for name, spec in data.domains.items()
    }


def chosen_by(
    domains: Sequence[DomainSection], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the metrics of several domains that can choose a checkpoint.

    A domain without labels in training has none, and then there is no mean either.

    Args:
        domains: The entries of `config.data.domains`.
        names: Metrics of one domain.
    """
    labelled = [entry.domain for entry in domains if entry.labelled]
    own = tuple(f"{domain}/{name}" for domain in labelled for name in names)
    return own if len(labelled) < len(domains) else (*names, *own)


def split_problems(task: Task, data: Data) -> list[str]:
    """Returns the metrics that are undefined on the held-out splits."""
    if task.domains is None:
        labels = {name: part.label for name, part in data.held_out.items()}
        return task.check_splits(labels)
    return [
        problem
        for domain, own in task.domains.tasks.items()
        for problem in own.check_splits(
            {
                f"{split} of {domain}": mixture.parts[domain].label
                for split, mixture in data.held_out.items()
            }
        )
    ]


def domain_problems(config: Config, data: Data) -> list[str]:
    """Returns the config keys that cannot be used with several domains."""
    if not data.spec.domains:
        return []
    asked = {
        "config.evaluate.also": bool(config.evaluate.also),
        "config.evaluate.cka": config.evaluate.cka is not None,
        "config.population": bool(config.population),
    }
    return [f"{key}: not with config.data.domains" for key, is_ in asked.items() if is_]
