"""One exact pass over a split: every example counts once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.core.train_state import TrainState, eval_params
from finetune_jax.data.batches import Examples, Shortened, by_length, evaluation_batches
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import Mixture
from finetune_jax.data.text.tokens import TextOptions
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.features.cache import Features, FeatureStore, Frozen, frozen_part
from finetune_jax.features.frozen_prefix import is_large
from finetune_jax.parallel.devices import Compiled, Devices
from finetune_jax.tasks.task import Task


@dataclasses.dataclass(kw_only=True)
class Evaluator:
    """Measures states; compiles once.

    Attributes:
        task: Has outputs and metrics.
        devices: Where batches go.
        fixed: What updates read and nobody updates, placed; 'task' is the task's part.
        training: Whether there are updates between what is measured.
        ema: Whether averaged weights are measured too.
        chosen_ema: Whether they are what predictions are made with.
        batch_size: Examples that are in work at a time, in parts that devices divide; no
            result depends on it, since padding is cut off.
        extras: What is measured besides the splits.
        compile_s: Seconds that compiling has taken.
        store: Keeps what frozen stages make of the splits; None computes it again.
        first: The stage up to which the model is computed on its own; None: is not.
        frozen: The stages before it, where the states to be measured have them in common.
        programs: Compiled so far, by name and the shapes of a batch.
        text: How texts may be shortened; None of what is no text.
        all_rows: Gives what `rows` does for several runs at once; None: it is one run.
    """

    task: Task
    devices: Devices
    fixed: Any
    batch_size: int
    training: bool = False
    ema: bool = False
    chosen_ema: bool = False
    extras: tuple["Extra", ...] = ()
    compile_s: float = 0.0
    store: FeatureStore | None = None
    first: str | None = None
    frozen: Frozen | None = None
    programs: dict[Any, Compiled] = dataclasses.field(default_factory=dict)
    text: TextOptions | None = None
    all_rows: Callable[..., dict[str, np.ndarray]] | None = None

    def freeze(self, first: str | None, state: TrainState) -> None:
        """Takes note of what the states to be measured have in common.

        Args:
            first: The stage before which none differs from `state`; None: there is none.
            state: On the host.
        """
        found, self.first = None, first
        if first is not None and self.store is not None:
            found = frozen_part(self.task, state, first)
        if found is None or not found.is_like(self.frozen):
            self.frozen = found

    def thaw(self, state: TrainState) -> None:
        """Keeps in mind what states have in common only if this one has it too."""
        if self.frozen is not None and self.first is not None:
            found = frozen_part(self.task, state, self.first)
            self.frozen = self.frozen if found.is_like(self.frozen) else None

    @property
    def all_compile_s(self) -> float:
        """Seconds that compiling has taken, of what the store keeps too."""
        return self.compile_s + (self.store.compile_s if self.store else 0.0)

    def weights(self, placed: TrainState) -> dict[str, Any]:
        """Returns the parameters that are measured, by what metrics' names begin with."""
        return {kind: eval_params(placed, ema=ema) for kind, ema in self._kinds.items()}

    @property
    def _kinds(self) -> dict[str, bool]:
        """Whether weights are averaged, by what the names of their metrics begin with."""
        return {"": False, "ema_": True} if self.ema else {"": False}

    def chosen(self, placed: TrainState) -> Any:
        """Returns the parameters that predictions are made with."""
        return eval_params(placed, ema=self.chosen_ema)

    def outputs(
        self, placed: TrainState, dataset: Dataset, domain: str | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a placed state, a row an example of `dataset.kept()`.

        Args:
            placed: The state.
            dataset: Of one domain, where there are several.
            domain: Its name.
        """
        return self._outputs(placed, dataset, ema=self.chosen_ema, domain=domain)

    def _outputs(
        self,
        placed: TrainState,
        dataset: Dataset,
        *,
        ema: bool,
        domain: str | None = None,
    ) -> dict[str, np.ndarray]:
        task = self.task if domain is None else self.task.of_domain(domain)
        step = functools.partial(eval_step, task=task, first=self.first)
        params = eval_params(placed, ema=ema)
        arguments = params, placed.batch_stats, self.fixed["task"]
        examples: Examples = dataset
        frozen, order = self.frozen, None
        if frozen is not None and not (ema and frozen.averaged):
            assert self.store is not None
            examples = self.store.held_out(dataset, frozen)
        elif self.text is not None and self.first is None:
            # By length, so that short texts stand beside short ones.
            order = by_length(dataset)
            examples = Shortened(dataset=dataset, options=self.text, order=order)
        kind = "features" if isinstance(examples, Features) else "inputs"
        name = f"outputs of {domain or self.first}, {kind}"
        rows = self.rows(name, step, arguments, examples)
        if order is not None:
            rows = jax.tree.map(lambda array: array[np.argsort(order)], rows)
        counts = dataset.readable(np.arange(len(dataset)))
        return {name: array[counts] for name, array in rows.items()}

    def rows(
        self, name: str, step: Callable, arguments: tuple, dataset: Examples
    ) -> dict[str, np.ndarray]:
        """Returns what a step gives for a split, a row an example in their order.

        Args:
            name: Of the step, which is compiled once under it.
            step: Takes `arguments` and a batch; returns a dict of arrays [B, ...].
            arguments: Placed.
            dataset: The examples.
        """
        size = self.devices.part_of(self.batch_size)
        if self.all_rows is not None:
            return self.all_rows(name, step, arguments, dataset, batch_size=size)

        def ready(batch):
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if (name, shapes) not in self.programs:
                program = self.devices.compile_eval(step, *arguments, batch)
                self.programs[name, shapes] = program
                self.compile_s += program.compile_s
            program = self.programs[name, shapes]
            return functools.partial(program.call, *arguments, batch)

        batches = evaluation_batches(dataset, batch_size=size)
        # Small updates on large examples take less memory than two programs here.
        spares = self.training and is_large(self.task)
        at_once = 1 if spares else self.devices.at_once
        parts = list(self.devices.outputs(ready, batches, at_once=at_once))
        return jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[: len(dataset)], *parts
        )

    def measure(
        self, placed: TrainState, splits: Mapping[str, Dataset | Mixture]
    ) -> dict[str, float]:
        """Returns the metrics of a placed state on some splits, as `split/name`.

        Of several domains they are `split/domain/name`, and `split/name` is the mean
        over domains. What `extras` measure is among them, under names of its own.
        """
        found = {}
        for split, dataset in splits.items():
            for kind, ema in self._kinds.items():
                if not isinstance(dataset, Mixture):
                    metrics = self._metrics(placed, dataset, ema=ema)
                    found |= {f"{split}/{kind}{n}": v for n, v in metrics.items()}
                    continue
                domains = {
                    domain: self._metrics(placed, part, ema=ema, domain=domain)
                    for domain, part in dataset.parts.items()
                }
                for domain, metrics in domains.items():
                    own = f"{split}/{domain}/{kind}"
                    found |= {f"{own}{name}": v for name, v in metrics.items()}
                means = mean_metrics(domains)
                found |= {f"{split}/{kind}{name}": v for name, v in means.items()}
        for extra in self.extras:
            found |= extra(self, placed)
        return found

    def _metrics(
        self,
        placed: TrainState,
        dataset: Dataset,
        *,
        ema: bool,
        domain: str | None = None,
    ) -> dict[str, float]:
        task = self.task if domain is None else self.task.of_domain(domain)
        outputs = self._outputs(placed, dataset, ema=ema, domain=domain)
        return task.metrics(outputs, dataset.kept().on_host())


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


# Returns metrics of a placed state by their full names.
Extra = Callable[[Evaluator, TrainState], dict[str, float]]
