"""One exact pass over a split: every example counts once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.core.pytrees import nbytes
from finetune_jax.core.train_state import TrainState, eval_params
from finetune_jax.data.batches import (
    BatchSource,
    LocalRows,
    Shortened,
    evaluation_batches,
    shortened,
)
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import DomainMixture
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.features.cache import Features, FeatureStore, FrozenPrefix
from finetune_jax.features.frozen_prefix import is_large
from finetune_jax.parallel import processes
from finetune_jax.parallel.devices import Devices, concurrent_batch
from finetune_jax.parallel.executor import Batches, Executor
from finetune_jax.tasks.components.decision import decided
from finetune_jax.tasks.task import Task

# Largest table of features that stays on the devices between evaluations.
DEVICE_CACHE_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures states.

    Attributes:
        task: Task, with outputs and metrics.
        executor: Compiles the programs and runs them.
        training: Whether updates come between measurements.
        ema: Whether averaged weights are measured too.
        chosen_ema: Whether predictions are made with averaged weights.
        batch_size: Number of examples that are computed at once; no result depends on
            it, since padding is cut off.
        extras: Measurements besides those of the splits.
        store: Cache of the outputs of frozen prefixes; None computes them again.
        compiled_before: `compile_s` of the executor and the cache before the run.
    """

    task: Task
    executor: Executor
    batch_size: int
    training: bool = False
    ema: bool = False
    chosen_ema: bool = False
    extras: tuple["Extra", ...] = ()
    store: FeatureStore | None = None
    compiled_before: float = 0.0

    @property
    def devices(self) -> Devices:
        """The devices of the run."""
        return self.executor.devices

    @property
    def compile_s(self) -> float:
        """Seconds spent on compiling evaluation programs, those of the cache too."""
        of_store = self.store.compile_s if self.store else 0.0
        return self.executor.compile_s + of_store - self.compiled_before

    def weights(self, placed: TrainState) -> dict[str, Any]:
        """Returns the parameters to measure, by the prefix of the names of metrics."""
        return {kind: eval_params(placed, ema=ema) for kind, ema in self._kinds.items()}

    @property
    def _kinds(self) -> dict[str, bool]:
        """Whether weights are averaged, by the prefix of the names of metrics."""
        return {"": False, "ema_": True} if self.ema else {"": False}

    def chosen(self, placed: TrainState) -> Any:
        """Returns the parameters that predictions are made with."""
        return eval_params(placed, ema=self.chosen_ema)

    def outputs(
        self,
        placed: TrainState,
        dataset: Dataset,
        domain: str | None = None,
        *,
        prefix: FrozenPrefix | None,
        ema: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a placed state, a row an example of `dataset.kept()`.

        Args:
            placed: Placed state.
            dataset: Split; of one domain, if there are several.
            domain: Name of the domain.
            prefix: Frozen prefix of the state, computed as a program of its own; None
                computes the whole model in one program.
            ema: Whether to use averaged weights; None is `chosen_ema`.
        """
        ema = self.chosen_ema if ema is None else ema
        first = prefix and prefix.first
        step = functools.partial(eval_step, task=self.task, first=first, domain=domain)
        params = eval_params(placed, ema=ema)
        arguments = params, placed.batch_stats
        examples: BatchSource = dataset
        if self._is_cached(prefix, ema):
            assert self.store is not None and prefix is not None
            examples = self.store.held_out(dataset, prefix)
        elif first is None:
            # Sorted, short examples share batches with little padding.
            examples = shortened(dataset, by_length=True)
        kind = "features" if isinstance(examples, Features) else "inputs"
        name = f"outputs of {domain or first}, {kind}"
        rows = self.rows(name, step, arguments, examples)
        if isinstance(examples, Shortened):
            rows = jax.tree.map(examples.unsorted, rows)
        counts = dataset.readable(np.arange(len(dataset)))
        return {name: array[counts] for name, array in rows.items()}

    def _is_cached(self, prefix: FrozenPrefix | None, ema: bool) -> bool:
        """Returns whether the outputs of a prefix may come from the cache."""
        if self.store is None or prefix is None or prefix.variables is None:
            return False
        return not (ema and prefix.is_averaged)

    def rows(
        self, name: str, step: Callable, arguments: tuple, examples: BatchSource
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a step for a split, a row an example, in order.

        Args:
            name: Name of the step, under which it is compiled once.
            step: Takes `arguments` and a batch; returns a dict of arrays [B, ...].
            arguments: Placed arguments.
            examples: The split.
        """
        size = concurrent_batch(self.devices, self.batch_size)
        whole = getattr(examples, "dataset", examples)
        cache = None
        if (
            isinstance(examples, Features)
            and nbytes(examples.table) <= DEVICE_CACHE_BYTES
        ):
            cache = examples.device_batches
        batches = Batches(
            key=(type(examples), id(whole), size),
            count=len(examples),
            make=functools.partial(
                evaluation_batches,
                examples,
                batch_size=size,
                local_rows=self._local_rows,
            ),
            cache=cache,
            # Between updates, memory counts for more than two programs at once.
            is_large=self.training and is_large(self.task),
        )
        rows = self.executor.rows(name, step, arguments, batches)
        if isinstance(whole, Dataset):
            share_unreadable(whole)
        return rows

    @property
    def _local_rows(self) -> LocalRows:
        """The rows of a batch that this process needs; None needs all."""
        return self.devices.local_rows if self.devices.spans_processes else None

    def measure(
        self,
        placed: TrainState,
        splits: Mapping[str, Dataset | DomainMixture],
        *,
        prefix: FrozenPrefix | None,
        observe: "Observer | None" = None,
    ) -> dict[str, float]:
        """Returns the metrics of a placed state on some splits, as `split/name`.

        With several domains they are `split/domain/name`, and `split/name` is the mean
        over domains. The metrics of `extras` are among them, under names of their own.
        If the task chooses a threshold, `splits` has 'validation' before the splits that
        are measured with the threshold.

        Args:
            placed: Placed state.
            splits: Splits by name.
            prefix: Frozen prefix of the state, as `outputs` takes it.
            observe: Called with the outputs of each split, domain and kind of weights.
        """
        tasks = dict.fromkeys(self._kinds.values(), self.task)

        def metrics_of(
            split: str, dataset: Dataset, ema: bool, domain: str | None = None
        ) -> dict[str, float]:
            task = tasks[ema]
            if domain is not None and task.domains is not None:
                task = task.domains.tasks[domain]
            outputs = self.outputs(placed, dataset, domain, prefix=prefix, ema=ema)
            batch = dataset.kept().on_host()
            if dataset is splits.get("validation"):
                task = tasks[ema] = decided(task, outputs, batch)
            if observe is not None:
                place = Place(split=split, domain=domain, ema=ema)
                observe(place, dataset, task, outputs)
            return task.metrics(outputs, batch)

        found = {}
        for split, dataset in splits.items():
            for kind, ema in self._kinds.items():
                if isinstance(dataset, DomainMixture):
                    domains = {
                        domain: metrics_of(split, part, ema, domain)
                        for domain, part in dataset.parts.items()
                    }
                    for domain, own in domains.items():
                        found |= {f"{split}/{domain}/{kind}{n}": own[n] for n in own}
                    metrics = mean_metrics(domains)
                else:
                    metrics = metrics_of(split, dataset, ema)
                found |= {f"{split}/{kind}{n}": v for n, v in metrics.items()}
        for extra in self.extras:
            found |= extra(self, placed)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The metrics that outputs belong to.

    Attributes:
        split: Name of the split.
        domain: Name of the domain; None if there is one data set.
        ema: Whether the weights are averaged.
    """

    split: str
    domain: str | None
    ema: bool

    def name(self, metric: str, *, of_state: bool = True) -> str:
        """Returns the full name of a metric, such as 'test/ema_loss'.

        Args:
            metric: Its name within the split.
            of_state: Whether it depends on the weights.
        """
        kind = "ema_" if self.ema and of_state else ""
        return "/".join(filter(None, (self.split, self.domain, f"{kind}{metric}")))


# Takes the outputs of `dataset.kept()`, and the task that they are measured by.
Observer = Callable[[Place, Dataset, Task, dict[str, np.ndarray]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedState:
    """A placed state, with the evaluator and the frozen prefix that it is measured with.

    Attributes:
        evaluator: Evaluator of the run.
        placed: Placed state.
        prefix: Frozen prefix of the state; None if it has none.
        refit: Set if the state was fitted to the validation split, too: see `Progress`.
        known: A split whose outputs have been computed, and these.
    """

    evaluator: Evaluator
    placed: TrainState
    prefix: FrozenPrefix | None
    refit: Mapping[str, Any] | None = None
    known: tuple[Dataset, dict[str, np.ndarray]] | None = None

    @property
    def params(self) -> Any:
        """Placed parameters that predictions are made with."""
        return self.evaluator.chosen(self.placed)

    def outputs(
        self, dataset: Dataset, domain: str | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the outputs, a row an example; see `Evaluator.outputs`."""
        if self.known is not None and self.known[0] is dataset:
            return dict(self.known[1])
        return self.evaluator.outputs(self.placed, dataset, domain, prefix=self.prefix)

    def measure(
        self,
        splits: Mapping[str, Dataset | DomainMixture],
        observe: Observer | None = None,
    ) -> dict[str, float]:
        """Returns the metrics on some splits; see `Evaluator.measure`.

        Those of a validation split that the state was fitted to are from before that fit.
        """
        seen = [name for name, split in splits.items() if self.has_seen(split)]
        unseen = {name: splits[name] for name in splits if name not in seen}
        before = self.refit["metrics"] if self.refit and seen else {}
        measured = self.evaluator.measure(
            self.placed, unseen, prefix=self.prefix, observe=observe
        )
        return {**before, **measured}

    def has_seen(self, split: Dataset | DomainMixture) -> bool:
        """Returns whether the state was fitted to a split besides the training split."""
        if self.refit is None or not isinstance(split, Dataset):
            return False
        return split.sha256 == self.refit["validation"]

    def with_batch_size(self, examples: int) -> "EvaluatedState":
        """Returns the state, measured in batches of at most so many examples."""
        size = min(self.evaluator.batch_size, examples)
        evaluator = dataclasses.replace(self.evaluator, batch_size=size)
        return dataclasses.replace(self, evaluator=evaluator)


def mean_metrics(domains: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean over domains of each metric that all of them have.

    >>> mean_metrics({"one": {"loss": 1.0, "auc": 0.5}, "two": {"loss": 2.0}})
    {'loss': 1.5}
    """
    first, *others = domains.values()
    return {
        name: sum(metrics[name] for metrics in domains.values()) / len(domains)
        for name in first
        if all(name in metrics for metrics in others)
    }


def share_unreadable(dataset: Dataset) -> None:
    """Tells all processes which examples one of them could not read."""
    if dataset.unreadable is None:
        return
    mine = {str(index): text for index, text in dataset.unreadable.items()}
    for found in processes.gathered("unreadable examples", mine):
        dataset.unreadable.update({int(index): text for index, text in found.items()})


# Returns metrics of a placed state by their full names.
Extra = Callable[[Evaluator, TrainState], dict[str, float]]
