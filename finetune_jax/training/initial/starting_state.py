"""Data and initial state of a run: random values, pretrained weights, schemes."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_jax.config import Config, seeds
from finetune_jax.config.members import weights_addresses, weights_entries
from finetune_jax.config.schema import Init
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.pytrees import like, named, part, with_part
from finetune_jax.core.registry import closest
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data, make_data
from finetune_jax.data.domains import make_mixture
from finetune_jax.data.kind import Resources
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.multi_domain import Domains
from finetune_jax.tasks.task import Task
from finetune_jax.training.initial.embeddings import is_matched, matched, with_vectors
from finetune_jax.training.initial.lsuv import first_examples
from finetune_jax.training.initial.random_states import RandomStates
from finetune_jax.training.initial.schemes import initialise, make_rules
from finetune_jax.weights.addresses import Weights, read_weights
from finetune_jax.weights.layout import Layout, recognise
from finetune_jax.weights.merge import fresh_in, load_weights, taken_line
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.labels import check_labels, is_output
from finetune_jax.weights.metadata.tokenizer import files_beside, find_tokenizer
from finetune_jax.weights.numbers import told_of_accepted, told_of_numbers
from finetune_jax.weights.prefixes import without_prefix


def run_data(config: Config, fitted: Any = None) -> Data:
    """Returns the data that a config describes.

    Args:
        config: Resolved config.
        fitted: State that a run has kept; None fits it to the training examples.

    Raises:
        UserError: The data cannot be read, or do not fit the config.
    """
    seed = seeds(config)["order"]
    if config.data.domains:
        return make_mixture(config.data, seed=seed)
    mixed = config.data.mixing != "weights", config.data.mixing_temperature != 1
    if any(mixed):
        key = "mixing" if mixed[0] else "mixing_temperature"
        raise UserError(f"config.data.{key}: config.data.domains has nothing to mix")
    addresses = config.data.tokenizer, config.init.pretrained
    resources = Resources(
        fitted=fitted,
        tokenizer=functools.partial(find_tokenizer, *addresses),
        tokenizer_files=functools.partial(files_beside, *addresses),
    )
    return make_data(config.data, seed=seed, resources=resources)


def told_of(
    weights: Weights | None, precision: str, accept: Sequence[str] = ()
) -> list[str]:
    """Returns warnings about the weights that a run begins with.

    Args:
        weights: The weights, if there are any.
        precision: Precision of the run's computation.
        accept: `config.init.accept`.
    """
    if weights is None:
        return []
    about = weights.address, weights.tensors
    return [*told_of_numbers(*about, precision), *told_of_accepted(*about, accept)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Origin of the weights of a state.

    Attributes:
        sha256: Digest of every file, by its path.
        layouts: Name of the layout, by the prefix of the model.
        lines: Lines about the arrays taken from each address, and those left.
        told: Warnings about the weights.
        names: Names of the leaves that are values of a weight file, if only these leaves
            were not sampled.
    """

    sha256: Mapping[str, str]
    layouts: Mapping[str, str]
    lines: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()

    @property
    def layout(self) -> Any:
        """Layout of the only address, or of each model that has one."""
        return self.layouts[""] if "" in self.layouts else dict(self.layouts) or None


def starting_state(
    task: Task,
    data: Data,
    config: Config,
    random_states: RandomStates,
    *,
    measure: bool = True,
) -> tuple[TrainState, Loaded]:
    """Returns the state before the first update, at rest, and its origin.

    Args:
        task: Task with the models.
        data: Data of the run.
        config: Config of the run.
        random_states: `RandomStates` of the task.
        measure: Whether schemes that run the model on examples do so.

    Raises:
        UserError: The model is too large, the weights cannot be read or do not fit, or a
            scheme fails.
    """
    random_states.check_size()
    drawn, init = seeds(config), config.init
    weights = _weights_of(task, config)
    rules = make_rules(init.schemes, *(w.address for w in weights.values()))
    # Sampling a leaf takes longer than loading it, so loaded leaves are not sampled.
    # The files of a model without a prefix have no weights of models with one.
    prefixes = task.models.prefixes
    others = [prefix for prefix in prefixes if prefix] if "" in prefixes else []
    wanted = None if rules else _wanted(task, data, weights, init.fresh, others)
    on_host = bool(rules or init.embeddings)
    own = random_states(drawn, wanted, on_host=on_host)
    if "" in weights:
        weights[""] = matched(weights[""], own.params, data.fitted)
    variables = {"params": own.params, "batch_stats": own.batch_stats}
    layouts, lines, told = {}, [], []
    for prefix, read in weights.items():
        if task.domains is not None:
            found = with_domains_loaded(task.domains, variables, read, config)
        else:
            found = with_model_loaded(
                task,
                variables,
                prefix,
                read,
                others=others,
                spec=data.spec,
                config=config,
            )
        variables, layouts[prefix], own_lines = found
        lines += own_lines
        told += told_of(read, config.precision, init.accept)
    if weights and ("" not in weights or task.domains is not None):
        _check_fresh(init.fresh, named(own.params))
    batch = functools.partial(first_examples, data, config)
    state = initialise(
        own,
        own.replace(**variables),
        rules,
        task=task,
        spec=data.spec,
        seed=drawn["init"],
        first_batch=batch if measure else None,
    )
    sha256 = {path: sha for w in weights.values() for path, sha in w.sha256.items()}
    params, vectors = with_vectors(state.params, init.embeddings, data.fitted)
    lines += _lines_of_models(task, config, weights, layouts)
    found = Loaded(
        sha256=sha256 | vectors, layouts=layouts, lines=tuple(lines), told=tuple(told),
        names=_not_sampled(variables, wanted),
    )  # fmt: skip
    return state.replace(params=params), found


def _lines_of_models(
    task: Task,
    config: Config,
    weights: Mapping[str, Weights],
    layouts: Mapping[str, str],
) -> list[str]:
    """Returns lines about teachers, and about variants that were assumed.

    Args:
        task: Task of the run.
        config: Config of the run.
        weights: Weights by the prefix of the models that are trained.
        layouts: Names of their layouts, likewise.
    """
    fixed = task.teachers.layouts() if task.teachers is not None else {}
    lines = [line for _, own in fixed.values() for line in own]
    known = {**layouts, **{label: layout for label, (layout, _) in fixed.items()}}
    for one in architecture.described(config):
        if one.prefix in known:
            arch = weights[one.prefix].arch if one.prefix in weights else ""
            named_lines = architecture.named(one, arch, config.init.fresh)
            if named_lines is None:
                named_lines = architecture.assumed(one, known[one.prefix])
            lines += named_lines
    return lines


def _weights_of(task: Task, config: Config) -> dict[str, Weights]:
    """Returns the initial weights of models, by their prefix.

    Raises:
        UserError: They cannot be read, or were trained for another network.
    """
    architecture.check(architecture.described(config), config.init.fresh)
    entries = weights_entries(config)
    return {
        prefix: read_weights(address, entries[prefix])
        for prefix, address in weights_addresses(config).items()
        if prefix in ("", *task.models.prefixes)
    }


def with_model_loaded(
    task: Task, variables: Mapping[str, Any], prefix: str, read: Weights,
    *, others: Sequence[str], spec: DataSpec, config: Config,
) -> tuple[dict[str, Any], str, list[str]]:  # fmt: skip
    """Returns variables with the weights of one model, their layout, and lines about it."""
    init = config.init
    mine = {
        kind: {k: v for k, v in part(tree, prefix).items() if k not in others}
        for kind, tree in variables.items()
    }
    loaded, fitting, layout, lines = _with_weights(
        task.models, mine, read, prefix=prefix, fresh=init.fresh, spec=spec, init=init
    )
    merged = {
        kind: with_part(tree, prefix, {**part(tree, prefix), **loaded[kind]})
        for kind, tree in variables.items()
    }
    is_fresh = fresh_in(read, init.fresh, prefix)
    taken = taken_line(mine, fitting, layout, is_fresh, prefix)
    return merged, layout.name, [taken, *fitting.notes, *lines]


def _with_weights(
    models: ModelSet, variables: dict[str, Any], read: Weights,
    *, prefix: str = "", fresh: Sequence[str], spec: DataSpec, init: Init,
) -> tuple[dict[str, Any], Weights, Layout, list[str]]:  # fmt: skip
    """Returns variables of a model with its weights, these, their layout, and lines.

    Logits are in the order of the data's classes.

    Args:
        models: Models of the task.
        variables: Variables of the model, without its prefix.
        read: Weights as they were read.
        prefix: Prefix of the model; '' is all models if none has that prefix.
        fresh: Regexes of leaves that are not taken from the weights.
        spec: Description of the data.
        init: The section `config.init`.
    """
    stem = models[prefix].stages[0] if prefix else models.stages[0]
    fitting = without_prefix(read, named(variables))
    layout = recognise(named(variables), fitting.tensors, read.address)
    loaded = load_weights(
        variables,
        fitting,
        fresh=fresh,
        adapt_stem=stem if init.input_channels == "adapt" else None,
        left_out=() if prefix else models.unused(),
        prefix=prefix,
        accept=init.accept,
    )
    alone = prefix in models.prefixes
    heads = (models[prefix].stages[-1],) if alone else models.heads
    is_fresh = fresh_in(read, fresh, prefix)
    kept_heads = [
        stage
        for stage in heads
        if not all(is_fresh(name) for name in named(loaded) if is_output(name, stage))
    ]
    if not kept_heads:
        return loaded, fitting, layout, []
    kept = check_labels(read.address, spec.names, read.class_names, init.accept)
    for stage in kept_heads:
        loaded = kept.placed(loaded, stage)
    return loaded, fitting, layout, [kept.told] if kept.told else []


def with_domains_loaded(
    domains: Domains, variables: Mapping[str, Any], read: Weights, config: Config
) -> tuple[dict[str, Any], str, list[str]]:
    """Returns variables with the weights of all models, their layout, and lines."""
    found = {kind: dict(named(tree)) for kind, tree in variables.items()}
    layout, told = "", {}
    for domain, task in domains.tasks.items():
        mine = domains.variables_of(domain, variables)
        places = {
            kind: {
                name: domains.state_name(domain, name, of_stats=kind == "batch_stats")
                for name in named(tree)
            }
            for kind, tree in mine.items()
        }
        # `init.fresh` matches the names of the joint state.
        fresh = {
            re.escape(name)
            for by_name in places.values()
            for name, place in by_name.items()
            if any(re.fullmatch(pattern, place) for pattern in config.init.fresh)
        }
        loaded, fitting, used, lines = _with_weights(
            task.models,
            mine,
            read,
            fresh=sorted(fresh),
            spec=domains.specs[domain],
            init=config.init,
        )
        layout = used.name
        told |= dict.fromkeys([*fitting.notes, *lines])
        for kind, tree in loaded.items():
            found[kind] |= {places[kind][n]: leaf for n, leaf in named(tree).items()}
    merged = {kind: like(variables[kind], found[kind]) for kind in variables}
    return merged, layout, [f"{read.address} (layout: {layout})", *read.notes, *told]


def _wanted(
    task: Task,
    data: Data,
    weights: Mapping[str, Weights],
    fresh: Sequence[str],
    others: Sequence[str],
) -> Callable[[str], bool] | None:
    """Returns whether a leaf is sampled, by its full name; None samples all.

    Args:
        task: Task with the models.
        data: Data of the run; embeddings of new values are sampled.
        weights: Weights by the prefix of the model.
        fresh: Regexes of leaves that are not taken from the weights.
        others: Prefixes of models without weights.
    """
    if not weights or task.domains is not None:
        return None
    is_fresh = {p: fresh_in(w, fresh, p) for p, w in weights.items()}

    def wanted(name: str) -> bool:
        if is_matched(name, data.fitted):
            return True
        kind, _, rest = name.partition("/")
        prefix, _, inside = rest.partition("/")
        if prefix in is_fresh:
            return is_fresh[prefix](f"{kind}/{inside}")
        return "" not in is_fresh or prefix in others or is_fresh[""](name)

    return wanted


def _not_sampled(
    variables: Mapping[str, Any], wanted: Callable[[str], bool] | None
) -> frozenset[str]:
    """Returns the names of the leaves that `wanted` leaves out."""
    names = named(variables) if wanted is not None else ()
    return frozenset(name for name in names if wanted and not wanted(name))


def _check_fresh(fresh: Sequence[str], names: Mapping[str, Any]) -> None:
    """Checks that every regex of `config.init.fresh` matches a parameter.

    Raises:
        UserError: Lists the regexes that match none.
    """
    problems = [
        f"config.init.fresh: {pattern!r} matches nothing{closest(pattern, names)}"
        for pattern in fresh
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    raise_if(problems)
