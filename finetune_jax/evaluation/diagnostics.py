"""Measurements besides the splits: other domains, distance from the start, CKA."""

import functools
from typing import Any

import numpy as np

from finetune_jax.config import Config
from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.core.pytrees import named, stage_of, whole
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, Dataset
from finetune_jax.evaluation.cka import gram, similarity, stage_features
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.evaluation.evaluator import Evaluator, Extra
from finetune_jax.evaluation.other_domains import Domain, find_domains, with_head


def open_domains(config: Config, data: Data) -> tuple[Domain, ...]:
    """Returns the domains of `config.evaluate.also`. Nothing is compiled.

    Raises:
        UserError: Lists all problems of `evaluate.also`, `evaluate.cka` and
            `init.fisher`.
    """
    domains, problems = find_domains(config, data)
    examples, held_out = config.evaluate.cka, data.held_out
    if examples is not None:
        split, key = _compared_split(data), "config.evaluate.cka"
        if split is None:
            text = (
                f"{examples}, but config.data has neither validation nor test; set one"
            )
            problems.append(Problem(key, text))
        elif not 2 <= examples <= len(held_out[split]):
            text = (
                f"{examples}, but {split} has {len(held_out[split])} examples; 2 to "
                "that many can be compared"
            )
            problems.append(Problem(key, text))
    raise_if(problems)
    return domains


def make_extras(
    config: Config, data: Data, start: TrainState, domains: tuple[Domain, ...]
) -> tuple[Extra, ...]:
    """Returns the measurements that the config asks for besides the splits.

    Args:
        config: Config of the run.
        data: Data of the run.
        start: State before the first update, on the host.
        domains: Other domains, from `open_domains`.
    """
    extras: list[Extra] = [_OnDomain(domain, start) for domain in domains]
    evaluate, split = config.evaluate, _compared_split(data)
    if evaluate.distance:
        extras.append(_Distance(start))
    if evaluate.cka is not None and split is not None:
        dataset = _first(data.held_out[split], evaluate.cka)
        extras.append(_Similarity(start, dataset))
    return tuple(extras)


def _compared_split(data: Data) -> str | None:
    splits = [s for s in ("validation", "test") if s in data.held_out]
    return splits[0] if splits else None


def _first(dataset: Dataset, examples: int) -> Dataset:
    return dataset.selected(slice(examples))


class _OnDomain:
    """Measures `label/name` on another domain."""

    def __init__(self, domain: Domain, start: TrainState):
        self._domain, self._head = domain, domain.head_variables(start)
        self._placed: dict[str, Any] | None = None

    def __call__(self, evaluator: Evaluator, placed: TrainState) -> dict[str, float]:
        domain, found = self._domain, {}
        if self._placed is None:
            self._placed = evaluator.devices.place(self._head)
        step = functools.partial(eval_step, task=domain.task)
        for kind, params in evaluator.weights(placed).items():
            variables = with_head(params, placed.batch_stats, self._placed or {})
            name = f"also {domain.label}"
            outputs = evaluator.rows(name, step, variables, domain.test)
            metrics = domain.task.metrics(outputs, {"label": domain.test.label})
            found |= {
                f"{domain.label}/{kind}{name}": value for name, value in metrics.items()
            }
        return found


class _Distance:
    """Measures `distance/STAGE`, from the start to the parameters of predictions."""

    def __init__(self, start: TrainState):
        self._start = start.params

    def __call__(self, evaluator: Evaluator, placed: TrainState) -> dict[str, float]:
        now = evaluator.devices.to_host(evaluator.chosen(placed))
        found = distances(self._start, now, evaluator.task.models.prefixes)
        return {f"distance/{stage}": value for stage, value in found.items()}


def distances(
    start: Any, now: Any, prefixes: tuple[str, ...] = ("",)
) -> dict[str, float]:
    """Returns the relative distance of each stage's parameters: |now - start| / |start|.

    Norms are Euclidean, over all parameters of the stage, in float64. For a stage that
    began with zeros, it is |now|. Stages without parameters have no entry.

    Args:
        start: Parameters at the start, on the host.
        now: Parameters now, on the host.
        prefixes: Prefixes of the task's models.
    """
    squares: dict[str, np.ndarray] = {}
    for (name, before), after in zip(named(start).items(), named(now).values()):
        before, after = (np.asarray(whole(x), np.float64) for x in (before, after))
        moved = before != after  # inf - inf is NaN, but equal values have distance 0.
        sums = np.array(
            [np.sum((after[moved] - before[moved]) ** 2), np.sum(before**2)]
        )
        stage = stage_of(name, prefixes)
        squares[stage] = squares.get(stage, np.zeros(2)) + sums
    return {
        stage: float(np.sqrt(moved) / (np.sqrt(norm) or 1.0))
        for stage, (moved, norm) in squares.items()
    }


class _Similarity:
    """Measures `cka/STAGE` between the features at the start and now.

    The host holds the features of all stages for the compared examples, and of the start
    only one matrix [N, N] for each stage.
    """

    def __init__(self, start: TrainState, dataset: Dataset):
        self._start, self._dataset = (start.params, start.batch_stats), dataset
        self._grams: dict[str, np.ndarray] | None = None

    def __call__(self, evaluator: Evaluator, placed: TrainState) -> dict[str, float]:
        if self._grams is None:
            self._grams = self._measured(
                evaluator, *evaluator.devices.place(self._start)
            )
        params = evaluator.chosen(placed)
        now = self._measured(evaluator, params, placed.batch_stats)
        return {f"cka/{s}": similarity(self._grams[s], now[s]) for s in now}

    def _measured(
        self, evaluator: Evaluator, params: Any, batch_stats: Any
    ) -> dict[str, np.ndarray]:
        step = functools.partial(stage_features, task=evaluator.task)
        arguments = params, batch_stats
        features = evaluator.rows("features", step, arguments, self._dataset)
        return {stage: gram(features[stage]) for stage in evaluator.task.models.stages}


def domain_named(domains: tuple[Domain, ...], label: str) -> Domain:
    """Returns the domain with a label, which `open_domains` has checked."""
    return next(domain for domain in domains if domain.label == label)
