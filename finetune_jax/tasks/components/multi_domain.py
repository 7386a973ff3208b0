"""Tasks of several domains: each has a task of its own, as if it were alone."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import Data
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.accepts import check_accepts
from finetune_jax.tasks.task import Mode, Task

# From parameters and batch statistics of all to those of one domain.
Gather = Callable[[Any, Any], tuple[Any, Any]]


def domain_key(rng: jax.Array, domain: str) -> jax.Array:
    """Returns the key of a domain, whichever others there are."""
    return jax.random.fold_in(rng, zlib.crc32(domain.encode()))


def make_parts(
    module: Any,
    arguments: Mapping[str, Any],
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
) -> dict[str, Task]:
    """Returns the task of each domain.

    Args:
        module: Of the task that they have.
        arguments: What `config.task` says of it.
        data: Has the domains.
        model: The section `config.model`.
        precision: As in the config.

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


def chosen_by(domains: Sequence[Config], names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those metrics of several domains that can choose, by the names of one's.

    Where a domain has no labels in training, it has no say, nor has a mean with it.
    """
    labelled = [entry.domain for entry in domains if entry.labelled]
    own = tuple(f"{domain}/{name}" for domain in labelled for name in names)
    return own if len(labelled) < len(domains) else (*names, *own)


def split_problems(task: Task, data: Data) -> list[str]:
    """Returns what cannot be measured on the splits that are held out."""
    if not data.spec.domains:
        labels = {name: part.label for name, part in data.held_out.items()}
        return task.check_splits(labels)
    return [
        problem
        for domain in data.spec.domains
        for problem in task.of_domain(domain).check_splits(
            {
                f"{split} of {domain}": mixture.parts[domain].label
                for split, mixture in data.held_out.items()
            }
        )
    ]


def domain_problems(config: Config, data: Data) -> list[str]:
    """Returns what several domains and the rest of a config do not have in common."""
    if not data.spec.domains:
        return []
    asked = {
        "config.evaluate.also": bool(config.evaluate.also),
        "config.evaluate.cka": config.evaluate.cka is not None,
        "config.population": bool(config.population),
    }
    return [f"{key}: not with config.data.domains" for key, is_ in asked.items() if is_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneDomain(Task):
    """What one domain is measured by, on the state of all.

    Attributes:
        part: Its own task.
        gather: Returns what its model has of parameters and batch statistics.
    """

    part: Task
    gather: Gather

    @property
    def models(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Those of its own task."""
        return self.part.models

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """That of its own task."""
        return self.part.batch_spec

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random variables of its own task."""
        return self.part.init(rng)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch as its own task prepares it."""
        return self.part.prepare(batch, rng, mode)

    def loss(self, params: Any, batch_stats: Any, *rest: Any, **options: Any) -> Any:
        """Returns the loss of its own task."""
        return self.part.loss(*self.gather(params, batch_stats), *rest, **options)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns the outputs of its own task."""
        return self.part.outputs(
            *self.gather(params, batch_stats), fixed, batch, first=first
        )

    def answers(self, outputs: dict) -> dict:
        """Returns the answers of its own task."""
        return self.part.answers(outputs)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns the metrics of its own task."""
        return self.part.metrics(outputs, batch)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what its own task cannot measure."""
        return self.part.check_splits(labels)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the records of its own task."""
        return self.part.records(outputs, batch)

    def masks(self, outputs: dict[str, np.ndarray]) -> np.ndarray | None:
        """Returns the masks of its own task."""
        return self.part.masks(outputs)


class Several(Task):
    """What tasks of several domains share; `parts` has the task of each.

    Attributes:
        data: What the examples of the domains look like.
        parts: By domain.
    """

    data: DataSpec
    parts: Mapping[str, Task]

    def gather(self, domain: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
        """Returns what a domain's model has of parameters and batch statistics."""
        raise NotImplementedError

    def place(self, domain: str, name: str, *, of_stats: bool = False) -> str:
        """Returns where the state has what a domain's model has by a name.

        Args:
            domain: Of the model.
            name: Of a parameter there, or of batch statistics.
            of_stats: Which of the two.
        """
        del domain, of_stats
        return name

    def own_mode(self, domain: str, mode: Mode) -> Mode:
        """Returns how the stages of a domain's model run, by their own names."""
        raise NotImplementedError

    @property
    def batch_spec(self) -> dict[str, Any]:
        """That of each domain."""
        return {name: self._unlabelled(name, p.batch_spec) for name, p in self._all}

    @property
    def train_batch_spec(self) -> dict[str, Any]:
        """That of each domain; without labels where updates get none."""
        return {
            name: self._unlabelled(name, p.train_batch_spec) for name, p in self._all
        }

    @property
    def _all(self) -> list[tuple[str, Task]]:
        return list(self.parts.items())

    def _unlabelled(self, domain: str, spec: dict) -> dict:
        if self.data.domains[domain].labelled:
            return spec
        return {name: leaf for name, leaf in spec.items() if name != "label"}

    @property
    def shares(self) -> Mapping[str, int]:
        """Examples of each domain in an update."""
        specs = self.data.domains.items()
        return {name: spec.share for name, spec in specs if spec.share}

    def first_learning(self, mode: Mode) -> str | None:
        """Returns None: features of several domains are not kept."""
        del mode
        return None

    def of_domain(self, domain: str) -> Task:
        """Returns the task of one domain, of the same state."""

        def gather(params: Any, batch_stats: Any) -> tuple[Any, Any]:
            return self.gather(domain, params, batch_stats)

        return OneDomain(part=self.parts[domain], gather=gather)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch of each domain prepared, with keys of its own."""
        return {
            name: self.parts[name].prepare(
                part, domain_key(rng, name), self.own_mode(name, mode)
            )
            for name, part in batch.items()
        }

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns the outputs of every domain as 'domain/name'."""
        assert first is None
        found = {}
        for domain, part in batch.items():
            outputs = self.of_domain(domain).outputs(params, batch_stats, fixed, part)
            found |= {f"{domain}/{name}": rows for name, rows in outputs.items()}
        return found

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Domains are measured one by one: see `of_domain`."""
        raise NotImplementedError

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Domains are predicted one by one: see `of_domain`."""
        raise NotImplementedError
