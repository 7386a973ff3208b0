"""Other domains, such as the source: data on which a run is measured besides its own."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.schema import Also
from finetune_jax.core.errors import Problem, UserError, collected, listed, under
from finetune_jax.core.metric_names import label_problem
from finetune_jax.core.pytrees import like, named, stage_of
from finetune_jax.core.registry import closest
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, Dataset, dataset_of
from finetune_jax.data.kind import kind_named
from finetune_jax.data.loading import load_source
from finetune_jax.data.source import check_labelled
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.splits import named_splits, select
from finetune_jax.parallel import processes
from finetune_jax.tasks import make_task
from finetune_jax.tasks.components.random_state import shapes_of
from finetune_jax.tasks.task import Task
from finetune_jax.weights.addresses import Weights, read_weights
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata.labels import are_places, check_labels, keys

HEADS = ("current", "start", "pretrained")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """Another domain: its data, and the model with which it is measured.

    Attributes:
        label: Label of the domain; metrics are named `label/name`.
        head: Parameters of the last stage: 'current', 'start' or 'pretrained'.
        task: Task with the run's model, for this domain's data.
        test: Examples to measure on.
        train: Examples for the Fisher information, not augmented; None if the config
            names none.
        fingerprint: Returns the fingerprint of the data.
        warnings: Lines about doubtful values in the data.
        not_used: Lines about files or rows that were left out.
        pretrained: Variables of the last stage by name, 'params/...' and
            'batch_stats/...', if the head is 'pretrained'.
    """

    label: str
    head: str
    task: Task
    test: Dataset
    train: Dataset | None
    fingerprint: Callable[[], str]
    pretrained: Mapping[str, np.ndarray]
    warnings: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()

    def head_variables(self, start: TrainState) -> dict[str, np.ndarray]:
        """Returns the variables that replace the head, by name; empty for 'current'.

        Args:
            start: State before the first update, on the host.
        """
        if self.head == "start":
            return _last_stage(self.task, start.params, start.batch_stats)
        return dict(self.pretrained)


def with_head(
    params: Any, batch_stats: Any, head: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Returns parameters and batch statistics in which those of `head` are replaced."""
    trees = {"params": params, "batch_stats": batch_stats}
    # A tree without leaves, such as empty batch statistics, stays as it is.
    swapped = like(trees, named(trees) | dict(head))
    return swapped["params"], swapped["batch_stats"]


def _last_stage(task: Task, params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    return {
        name: leaf
        for name, leaf in named({"params": params, "batch_stats": batch_stats}).items()
        if stage_of(name.partition("/")[2], task.models.prefixes) in task.models.heads
    }


def find_domains(
    config: Config, data: Data
) -> tuple[tuple[Domain, ...], list[Problem]]:
    """Returns the domains of `config.evaluate.also`, and all problems with them.

    Nothing is compiled. Examples are decoded into memory if `data.memory_gb` has room for
    them beside the run's own.
    """
    found, problems = [], [*map(Problem.of, _label_problems(config))]
    weights = None
    if config.init.pretrained and any(
        entry.head == "pretrained" for entry in config.evaluate.also
    ):
        weights = read_weights(config.init.pretrained, config.init.entry)
    for index, entry in enumerate(config.evaluate.also):
        where = f"config.evaluate.also[{index}]"
        with collected(problems), under(where, instead_of="config.data"):
            _check_head(entry, f"{where}.", config)
            found.append(_domain(entry, config, data, f"{where}.", weights))
    if not problems:
        with collected(problems), under("config.evaluate.also"):
            found = _in_memory(found, config, data)
    return tuple(found), problems


def _label_problems(config: Config) -> list[str]:
    labels = [entry.label for entry in config.evaluate.also]
    problems = [
        f"config.evaluate.also[{index}].label: {text}"
        for index, label in enumerate(labels)
        if (text := label_problem(label, labels[:index]))
    ]
    if config.init.fisher is not None:
        entries = {entry.label: entry for entry in config.evaluate.also}
        where, label = "config.init.fisher", config.init.fisher
        if label not in entries:
            hint = closest(label, entries)
            problems.append(f"{where}: no {label!r} in config.evaluate.also{hint}")
        elif entries[label].train is None:
            problems.append(f"{where}: {label!r} in config.evaluate.also needs `train`")
    return problems


def _check_head(entry: Also, where: str, config: Config) -> None:
    """Checks the head of an entry before its data is opened.

    Raises:
        UserError: The head is unknown, or there are no weights to take it from.
    """
    if entry.head not in HEADS:
        hint = closest(entry.head, HEADS)
        raise UserError(f"{where}head: {entry.head!r} is not one of {HEADS}{hint}")
    if entry.head == "pretrained" and config.init.pretrained is None:
        raise UserError(
            f"{where}head: 'pretrained', but config.init.pretrained is None"
        )


def _domain(
    entry: Also, config: Config, data: Data, where: str, weights: Weights | None
) -> Domain:
    """Returns one domain, nothing decoded yet.

    Raises:
        UserError: The data cannot be read, or does not fit the model.
    """
    section = config.data
    keys = ("dir", "mean", "std", "resize")
    given = {k: section[k] if entry[k] is None else entry[k] for k in keys}
    source = load_source(entry.name, given.pop("dir"))
    if not source.class_names:
        raise UserError(f"{where}name: the labels of {entry.name} are not classes")
    label = {name: part.label for name, part in source.splits.items()}
    everything = np.concatenate(list(label.values()))
    given_label, class_names, warnings = everything, source.class_names, source.warnings
    if entry.head != "pretrained":
        own = data.spec.class_names
        _check_logits(entry, config, data, class_names, where)
        place, class_names, told = _places(class_names, own, where, entry.head)
        if class_names != source.class_names:  # Labels below 0 are missing.
            everything = np.where(everything < 0, everything, place[everything])
        warnings += told
    splits = named_splits(label, entry.split_seed)
    spec = kind_named(data.spec.kind).domain_spec(data.spec, source, given, where)
    spec = dataclasses.replace(spec, class_names=class_names)

    def split(key: str) -> Dataset:
        chosen = select(splits, entry[key], f"{where}{key}")
        check_labelled(source, given_label, {key: chosen}, training=True)
        return dataset_of(source, spec, chosen, everything[chosen])

    test, train = split("test"), split("train") if entry.train is not None else None
    task, pretrained = _task_and_head(entry, config, data, spec, where, weights)
    if unmeasurable := task.check_splits({entry.label: test.label}):
        raise UserError(f"{where}test: {'; '.join(unmeasurable)}")
    return Domain(
        label=entry.label,
        head=entry.head,
        task=task,
        test=test,
        train=train,
        fingerprint=source.fingerprint,
        pretrained=pretrained,
        warnings=warnings,
        not_used=source.not_used,
    )


def _check_logits(
    entry: Also, config: Config, data: Data, theirs: Sequence[str], where: str
) -> None:
    """Checks that the run's head has a logit for each class of a domain.

    Raises:
        UserError: It has fewer logits.
    """
    own = data.spec.class_names
    logits = _logits(config, data)
    if logits >= len(theirs):
        return
    if entry.head == "start":
        more = (
            f"set config.model.classes to {len(theirs)} or more if "
            "config.init.pretrained has as many"
        )
    else:
        more = (
            f"leave out the examples of other classes than the run's, {listed(own)} "
            "(more logits in config.model.classes would stay untrained)"
        )
    raise UserError(
        f"{where}head: {entry.head!r} has {logits} logits, but {entry.name} has "
        f"{len(theirs)} classes; {more}, or measure with head='pretrained'"
    )


def _logits(config: Config, data: Data) -> int:
    """Returns the number of logits of the run's head."""
    return config.model.classes or len(data.spec.class_names)


def _places(
    theirs: tuple[str, ...], own: tuple[str, ...], where: str, head: str = "current"
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Returns the logit of each class of a domain, names of the logits, and warnings.

    Classes are matched by name. Class names that are numbers from 0 are matched by
    position, and so are those of a head before the first update; a warning lists the
    pairs.

    Args:
        theirs: Class names of the domain.
        own: Class names of the run; empty where it has none.
        where: Start of the messages.
        head: 'current' or 'start'.

    Raises:
        UserError: The run does not have all of the classes.
    """
    in_place = np.arange(len(theirs)), theirs
    if not own:
        return *in_place, ()
    named_alike, of_run = keys(theirs, own)
    index = {name: place for place, name in enumerate(of_run)}
    found = [index.get(name) for name in named_alike]
    absent = [name for name, place in zip(theirs, found) if place is None]
    if not absent:
        if found == list(range(len(theirs))):
            return *in_place, ()
        return (
            np.array(found),
            own,
            (f"{where}name: its classes are numbered as the run's",),
        )
    is_numbered = len(absent) == len(theirs) and (are_places(theirs) or are_places(own))
    has_moved = any(place not in (None, k) for k, place in enumerate(found))
    if (is_numbered and len(theirs) <= len(own)) or (head == "start" and not has_moved):
        pairs = [
            f"{name!r} is {own[k]!r}" if k < len(own) else f"{name!r} is logit {k}"
            for k, name in enumerate(theirs)
        ]
        line = f"{where}name: its classes are taken in their order: {listed(pairs)}"
        return *in_place, (line,)
    raise UserError(
        f"{where}name: {listed(absent)}: not among the classes of the run, "
        f"{listed(own)}, whose head is measured; give the data the run's names, leave out "
        "their examples, or measure with the head that knows them: head='pretrained', or "
        "'start' for the one before the first update"
    )


def _task_and_head(
    entry: Also,
    config: Config,
    data: Data,
    spec: DataSpec,
    where: str,
    weights: Weights | None,
) -> tuple[Task, dict[str, np.ndarray]]:
    """Returns the task of a domain, and its head where it is a pretrained one.

    Raises:
        UserError: The weights have another head.
    """
    classes = len(spec.class_names)
    logits = _logits(config, data)
    if entry.head != "pretrained":
        return _task(config, spec, logits), {}
    assert weights is not None
    problems = []
    # Such a head is the domain's own, or that of a model with the run's own logits.
    for count in dict.fromkeys((classes, max(logits, classes))):
        task = _task(config, spec, count)
        try:
            return task, _pretrained_head(task, weights, spec, config.init.accept)
        except UserError as error:
            problems += str(error).splitlines()[1:-1]
    told = "; ".join(dict.fromkeys(problem.strip() for problem in problems))
    raise UserError(
        f"{where}head: 'pretrained', but {weights.address} does not have it for the "
        f"{classes} classes of {entry.name}: {told}"
    )


def _task(config: Config, spec: DataSpec, classes: int) -> Task:
    model = {**dict(config.model), "classes": classes}
    return make_task(config.task, model, config.precision, spec)


def _pretrained_head(
    task: Task, weights: Weights, spec: DataSpec, accept: Collection[str]
) -> dict[str, np.ndarray]:
    """Returns the variables of the last stage as the weights have them.

    Low-rank updates are zero where the weights have none. Logits are in the order of the
    domain's classes.

    Raises:
        UserError: They do not have them, or not in these shapes, or for other classes.
    """
    shapes = shapes_of(task)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        {"params": shapes.params, "batch_stats": shapes.batch_stats},
    )
    heads = task.models.heads
    others = (rf"(?!({'|'.join(map(re.escape, heads))})/).*",)
    has_others = len(task.models.stages) > len(heads)
    loaded = load_weights(
        zeros, weights, fresh=others if has_others else (), accept=accept
    )
    kept = check_labels(weights.address, spec.names, weights.class_names, accept)
    for stage in heads:
        loaded = kept.placed(loaded, stage)
    return _last_stage(task, loaded["params"], loaded["batch_stats"])


def _in_memory(domains: list[Domain], config: Config, data: Data) -> list[Domain]:
    own = sum(p.nbytes for p in (data.train, *data.held_out.values()))
    limit = config.data.memory_gb * 1e9
    limit -= own if own <= limit else 0
    if sum(domain.test.nbytes for domain in domains) > limit:
        return domains
    return [
        dataclasses.replace(
            domain, test=domain.test.in_memory(lazily=processes.count() > 1)
        )
        for domain in domains
    ]
