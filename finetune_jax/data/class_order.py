"""The order of classes that a run began with, for data that is read once more."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.core.registry import closest
from finetune_jax.data.dataset import Data
from finetune_jax.data.labels import class_name
from finetune_jax.data.spec import DataSpec


def in_order_of_run(data: Data, looks: Mapping[str, Any]) -> Data:
    """Returns the data with its classes numbered as a run has them.

    Versions of this project may order classes differently, such as '2' and '10'.

    Args:
        data: Data as it is read today.
        looks: Entry 'data' of the run's manifest.

    Raises:
        UserError: The data has other classes than the run.
    """
    if not data.spec.domains:
        return _ordered(data, looks.get("class_names"))
    for domain, theirs in (looks.get("domains") or {}).items():
        if domain in data.spec.domains:
            data = _ordered(data, theirs.get("class_names"), domain)
    return data


def _ordered(data: Data, wanted: Any, domain: str | None = None) -> Data:
    """Returns the data, or one of its domains, with its classes in the order wanted."""
    own = data.spec if domain is None else data.spec.domains[domain]
    where = "" if domain is None else f"domain {domain!r}"
    places = _places(own, wanted, where and f"{where}, ")
    if places is None:
        return data
    warning = (
        f"config.data{where and f', {where}'}: the classes are in another order than when "
        f"the run began, {', '.join(own.class_names[:20])}; they are numbered by name as "
        "the run has them"
    )

    def ordered(part: Any) -> Any:
        if domain is None:
            return _numbered(part, places)
        numbered = _numbered(part.parts[domain], places)
        return dataclasses.replace(part, parts={**part.parts, domain: numbered})

    spec = _spec(own, wanted, places)
    if domain is not None:
        domains = {**data.spec.domains, domain: spec}
        names = next(iter(domains.values())).class_names
        spec = dataclasses.replace(data.spec, domains=domains, class_names=names)
    return dataclasses.replace(
        data,
        spec=spec,
        train=ordered(data.train),
        warnings=(*data.warnings, warning),
        held_out={split: ordered(part) for split, part in data.held_out.items()},
    )


def _places(spec: DataSpec, wanted: Any, where: str) -> np.ndarray | None:
    """Returns the run's index of each class; None where nothing changes.

    Raises:
        UserError: The classes are not those of the run.
    """
    names = list(spec.class_names)
    if not names or not isinstance(wanted, list | tuple):
        return None
    # As the data are read today.
    wanted = list(map(class_name, wanted))
    if wanted == names:
        return None
    if set(wanted) != set(names):
        lines = [
            f"{name!r} is not a class of the {place}{closest(name, theirs)}"
            for place, own, theirs in (("run", names, wanted), ("data", wanted, names))
            for name in own
            if name not in theirs
        ]
        raise UserError(
            f"config.data: {where}the classes are not those that the run began with: "
            f"{'; '.join(lines[:20])}. Give another --workdir, or bring the data back."
        )
    return np.array([wanted.index(name) for name in names], np.int32)


def _spec(spec: DataSpec, wanted: Sequence[str], places: np.ndarray) -> DataSpec:
    counts = spec.train_counts
    if len(counts) == len(places):
        ordered = np.zeros(len(places), int)
        ordered[places] = counts
        counts = tuple(ordered.tolist())
    return dataclasses.replace(
        spec, class_names=tuple(map(class_name, wanted)), train_counts=counts
    )


def _numbered(dataset: Any, places: np.ndarray) -> Any:
    label = dataset.label  # Places of texts without a tag are negative.
    return dataclasses.replace(
        dataset, label=np.where(label < 0, label, places[label]).astype(label.dtype)
    )
