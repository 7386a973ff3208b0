"""What fine-tuning forgets, measured: other domains, distances, CKA, Fisher information."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.config import Config
from finetune_jax.core.errors import problems_error
from finetune_jax.core.pytrees import count, like, named, part, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, Dataset
from finetune_jax.evaluation.eval_step import eval_step
from finetune_jax.evaluation.evaluator import Evaluator, Extra
from finetune_jax.evaluation.other_domains import Domain, find_domains, with_head
from finetune_jax.tasks.task import EVALUATION, Task, apply

# Features whose Gram matrix is taken at once, and values of the gradients of examples
# that lie on the device at once: bounds of memory, chosen by us.
GRAM_COLUMNS = 2**14
GRADIENT_VALUES, MOST_GRADIENTS = 2**28, 32


def open_domains(config: Config, data: Data) -> tuple[Domain, ...]:
    """Returns the domains of `config.evaluate.also`. Nothing is compiled.

    Raises:
        UserError: Lists all that these, `evaluate.cka` and `init.fisher` ask for and that
            is not there.
    """
    domains, problems = find_domains(config, data)
    examples, held_out = config.evaluate.cka, data.held_out
    if examples is not None:
        where = f"config.evaluate.cka: {examples}"
        split = _compared_split(data)
        if split is None:
            problems.append(
                f"{where}, but config.data has neither validation nor test, whose "
                "examples it takes"
            )
        elif not 2 <= examples <= len(held_out[split]):
            problems.append(
                f"{where}; {split} has {len(held_out[split])} examples, and 2 is the "
                "least to compare"
            )
    if problems:
        raise problems_error("What is to be measured besides cannot be:", problems)
    return domains


def make_extras(
    config: Config, data: Data, start: TrainState, domains: tuple[Domain, ...]
) -> tuple[Extra, ...]:
    """Returns what the config measures of a state besides its splits.

    Args:
        config: Of the run.
        data: Of the run.
        start: The state before the first update, on the host.
        domains: From `open_domains`.
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
    kept = {name: getattr(dataset, name) for name in ("indices", "label", "decoded")}
    kept = {k: None if v is None else v[:examples] for k, v in kept.items()}
    return dataclasses.replace(dataset, **kept)


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
            outputs = evaluator.rows(
                f"also {domain.label}",
                step,
                (*variables, evaluator.fixed["task"]),
                domain.test,
            )
            metrics = domain.task.metrics(outputs, {"label": domain.test.label})
            found |= {
                f"{domain.label}/{kind}{name}": value for name, value in metrics.items()
            }
        return found


class _Distance:
    """Measures `distance/STAGE` of the parameters that predictions are made with."""

    def __init__(self, start: TrainState):
        self._start = start.params

    def __call__(self, evaluator: Evaluator, placed: TrainState) -> dict[str, float]:
        now = evaluator.devices.to_host(evaluator.chosen(placed))
        found = distances(self._start, now, evaluator.task.prefixes)
        return {f"distance/{stage}": value for stage, value in found.items()}


def distances(
    start: Any, now: Any, prefixes: tuple[str, ...] = ("",)
) -> dict[str, float]:
    """Returns how far each stage's parameters are from the start: |now - start| / |start|.

    Norms are Euclidean, over all parameters of the stage, in float64. A stage that began
    with zeros has no such ratio: for it this is |now|. Stages without parameters have no
    entry.

    Args:
        start: Parameters on the host.
        now: The same, later.
        prefixes: Of the task's models.
    """
    squares: dict[str, np.ndarray] = {}
    for (name, before), after in zip(named(start).items(), named(now).values()):
        before, after = (np.asarray(x, np.float64) for x in (before, after))
        moved = before != after  # An infinite value that stayed has moved by 0.
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

    The host holds the features of all stages for the examples that are compared, once,
    and of the start only a matrix [N, N] a stage.
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
        return {stage: gram(features[stage]) for stage in evaluator.task.stages}


def stage_features(
    params: Any, batch_stats: Any, batch: dict, *, task: Task
) -> dict[str, jax.Array]:
    """Returns the output of every stage in evaluation, [B, F] each."""
    batch = task.prepare(batch, jax.random.key(0), EVALUATION)
    trees, found, x = {"params": params, "batch_stats": batch_stats}, {}, None
    for stage in task.stages:
        prefix, _, name = stage.rpartition("/")
        if name == task.models[prefix].stages[0]:  # type: ignore[attr-defined]
            x = batch["inputs"]
        variables = {key: part(tree, prefix) for key, tree in trees.items()}
        x, _ = apply(task, prefix, variables, x, mode=EVALUATION, first=name, last=name)
        found[stage] = jnp.concatenate(
            [
                leaf.reshape(leaf.shape[0], -1)
                for leaf in jax.tree.leaves(x)
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
            ],
            axis=-1,
        )
    return found


def gram(features_NxF: np.ndarray) -> np.ndarray:
    """Returns the products [N, N] of all pairs of examples, columns centred first.

    That is the double-centred H X X' H, H = I - 1/N, in float64. Where the features do
    not vary but for rounding, it is zero.
    """
    examples = len(features_NxF)
    found_NxN, total = np.zeros((examples, examples)), 0.0
    for start in range(0, features_NxF.shape[1], GRAM_COLUMNS):
        part_NxF = features_NxF[:, start : start + GRAM_COLUMNS].astype(np.float64)
        total += np.sum(part_NxF**2)
        part_NxF -= part_NxF.mean(axis=0)
        found_NxN += part_NxF @ part_NxF.T
    rounding = (examples * np.finfo(np.float64).eps) ** 2 * total
    return found_NxN if np.trace(found_NxN) > rounding else np.zeros_like(found_NxN)


def similarity(one_NxN: np.ndarray, other_NxN: np.ndarray) -> float:
    """Returns the linear CKA of two centred Gram matrices, between 0 and 1.

    Features that do not vary have none. Here they are as similar as can be to others
    that do not vary either (1.0), and not at all to those that do (0.0).

    Source: Kornblith et al. 2019, section 3.
    """
    norms = np.linalg.norm(one_NxN), np.linalg.norm(other_NxN)
    if not all(norms):
        return float(norms[0] == norms[1])
    # Divided first: products of large features would overflow.
    return float(np.sum((one_NxN / norms[0]) * (other_NxN / norms[1])))


def domain_named(domains: tuple[Domain, ...], label: str) -> Domain:
    """Returns the domain of a label, which `open_domains` has checked."""
    return next(domain for domain in domains if domain.label == label)


def domain_fisher(
    domain: Domain, start: TrainState, *, examples: int, seed: int
) -> Any:
    """Returns the Fisher information on a domain's training examples, like the parameters.

    It is that of the model with the domain's head; where that is the pretrained one, the
    run's own head has no part in it and gets zeros.

    Args:
        domain: Has training examples.
        start: The state before the first update, on the host.
        examples: At most so many are used.
        seed: Of the draws.
    """
    assert domain.train is not None
    head = domain.head_variables(start)
    params, batch_stats = with_head(start.params, start.batch_stats, head)
    found = named(
        fisher_information(
            domain.task, params, batch_stats, domain.train, examples=examples, seed=seed
        )
    )
    if domain.head == "pretrained":
        found |= {
            name: np.zeros_like(leaf)
            for name, leaf in named(start.params).items()
            if stage_of(name, domain.task.prefixes) in domain.task.heads
        }
    return like(start.params, found)


def fisher_information(
    task: Task,
    params: Any,
    batch_stats: Any,
    dataset: Dataset,
    *,
    examples: int,
    seed: int,
) -> Any:
    """Returns the diagonal of the Fisher information, a tree like the parameters.

    It is the mean over examples of the squared gradient of log p(y | x) in evaluation,
    y drawn from the model's own p(y | x): once for each example, by its place in the
    dataset.

    Args:
        task: Has outputs 'logits'.
        params: On the host.
        batch_stats: The same.
        dataset: Not augmented.
        examples: How many to draw from it, without replacement; at most all are used.
        seed: Of both draws.

    Source: Kirkpatrick et al. 2017, equation 3; Martens 2020, section 5 (the labels of
    the data would give the "empirical" one, which is another).
    """
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:examples]
    size = int(np.clip(GRADIENT_VALUES // count(params), 1, MOST_GRADIENTS))
    total = {n: np.zeros(leaf.shape, np.float64) for n, leaf in named(params).items()}
    program = jax.jit(functools.partial(_squared_gradients, task=task, seed=seed))
    on_device = jax.device_put((params, batch_stats))
    for start in range(0, len(drawn), size):
        places = drawn[start : start + size]
        padded = np.resize(places, size).astype(np.int32)
        batch = dataset.take(padded) | {"position": padded}
        batch["weight"] *= np.arange(size) < len(places)
        sums = named(program(*on_device, batch))
        for name, values in sums.items():
            total[name] += np.asarray(values, np.float64)
    mean = {name: values / len(drawn) for name, values in total.items()}
    return jax.tree.map(
        lambda leaf, values: values.astype(leaf.dtype), params, like(params, mean)
    )


def _squared_gradients(
    params: Any, batch_stats: Any, batch: Mapping, *, task: Task, seed: int
) -> Any:
    """Returns the sum over a batch of each example's squared gradient."""
    batch = task.prepare(dict(batch), jax.random.key(0), EVALUATION)

    def squares(example: dict) -> Any:
        rng = jax.random.fold_in(jax.random.key(seed), example["position"])

        def log_likelihood(params: Any) -> jax.Array:
            alone = jax.tree.map(lambda x: x[None], example)
            logits_K = task.outputs(params, batch_stats, {}, alone)["logits"][0]
            logits_K = logits_K.astype(jnp.promote_types(logits_K.dtype, jnp.float32))
            drawn = jax.random.categorical(rng, jax.lax.stop_gradient(logits_K))
            return jax.nn.log_softmax(logits_K)[drawn]

        gradient = jax.grad(log_likelihood)(params)
        return jax.tree.map(lambda g: g**2 * example["weight"], gradient)

    return jax.tree.map(lambda x: x.sum(axis=0), jax.vmap(squares)(batch))
