"""Pretrained embeddings of tables, matched to a run's categories by their values."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.core.pytrees import like, named
from finetune_jax.core.registry import closest
from finetune_jax.data.tables.encoding import VOCABULARY, Fitted, read_fitted
from finetune_jax.data.tables.schema import ROWS_BEFORE
from finetune_jax.weights.addresses import Weights
from finetune_jax.weights.formats.word_vectors import read_vectors

STAGE = "embeddings"


def name_of(field: str) -> str:
    """Returns the name of a field's embedding among the parameters."""
    return f"{STAGE}/{field}/embedding"


def is_matched(name: str, fitted: Fitted | None) -> bool:
    """Returns whether the rows of a leaf are matched one by one.

    Args:
        name: Name of the leaf, such as 'params/embeddings/C1/embedding'.
        fitted: Column statistics of the run; None if the data are not a table.
    """
    if fitted is None:
        return False
    categories = fitted.spec.categories
    own = {f"params/{name_of(one.field)}" for one in categories if not one.hashed}
    return name in own


def matched(weights: Weights, params: Any, fitted: Fitted | None) -> Weights:
    """Returns weights whose embeddings have a row for each value of this run.

    A value that the weights know has their row, any other value its row in `params`. The
    rows of missing and unseen values come from the weights.

    Args:
        weights: Weights of an earlier run.
        params: Initial parameters of this run.
        fitted: Column statistics of this run; None if the data are not a table.

    Raises:
        UserError: The weights have embeddings, but not the values of their rows.
    """
    ours = {
        name: leaf
        for name, leaf in named({"params": params}).items()
        if is_matched(name, fitted) and name in weights.tensors
    }
    if not ours or fitted is None:
        return weights
    kind, _, place = weights.address.partition(":")
    workdir = user_path(place, "config.init.pretrained")
    if kind != "orbax" or not (workdir / VOCABULARY).is_file():
        raise UserError(
            f"config.init.pretrained: {weights.address!r} has embeddings, but not the "
            "values of their rows; the workdir of a run has both: orbax:WORKDIR"
        )
    former = read_fitted(workdir, "config.init.pretrained")
    tensors = dict(weights.tensors)
    for one in fitted.spec.categories:
        name = f"params/{name_of(one.field)}"
        theirs = {other.field: at for at, other in enumerate(former.spec.categories)}
        if name not in ours or one.field not in theirs:
            continue
        saved, found = tensors[name], np.array(ours[name])
        rows = former.rows_of(theirs[one.field], fitted.known[one.name])
        if saved.shape[1:] != found.shape[1:]:
            continue  # `load_weights` reports the shapes.
        is_known = rows >= ROWS_BEFORE
        found[:ROWS_BEFORE] = saved[:ROWS_BEFORE]
        found[ROWS_BEFORE:][is_known] = saved[rows[is_known]]
        tensors[name] = found
    return dataclasses.replace(weights, tensors=tensors)


def with_vectors(
    params: Any, entries: Sequence[Any], fitted: Fitted | None
) -> tuple[Any, dict[str, str]]:
    """Returns parameters with word vectors as embeddings, and the files' digests.

    Values that are not in a file keep their rows.

    Args:
        params: Parameters on the host.
        entries: `config.init.embeddings`, (regex of fields, address) pairs.
        fitted: Column statistics of the run.

    Raises:
        UserError: Lists entries that match no field, files that cannot be read, vectors
            of another width, and files that know none of the values.
    """
    if not entries:
        return params, {}
    leaves, sha256, problems = dict(named(params)), {}, []
    for entry in entries:
        try:
            sha256 |= _take(leaves, entry, fitted)
        except UserError as error:
            problems.append(str(error))
    raise_if(problems)
    return like(params, leaves), sha256


def _take(leaves: dict[str, Any], entry: Any, fitted: Fitted | None) -> Mapping:
    """Changes the embeddings that an entry names, and returns the file's digest."""
    where = "config.init.embeddings"
    if not (isinstance(entry, tuple) and len(entry) == 2):
        raise UserError(f"{where}: {entry!r}; (regex of fields, address) is needed")
    pattern, address = entry
    categories = fitted.spec.categories if fitted is not None else ()
    fields = [one.field for one in categories]
    own = [c for c in categories if re.fullmatch(pattern, c.field) and not c.hashed]
    if not own or fitted is None:
        raise UserError(
            f"{where}: {pattern!r} matches no category that is not hashed"
            f"{closest(pattern, fields)}"
        )
    values = {one.name: fitted.known[one.name].to_pylist() for one in own}
    wanted = {value for listed in values.values() for value in listed}
    vectors, width, sha256 = read_vectors(address, wanted)
    if not vectors:
        raise UserError(f"{where}: {address!r} knows no value of {pattern!r}")
    for one in own:
        leaf = np.array(leaves[name_of(one.field)])
        if leaf.shape[1] != width:
            raise UserError(
                f"{where}: {address!r} has vectors of {width}, the model of "
                f"{leaf.shape[1]}; config.model.width={width} fits"
            )
        for row, value in enumerate(values[one.name], start=ROWS_BEFORE):
            if value in vectors:
                leaf[row] = vectors[value]
        leaves[name_of(one.field)] = leaf
    return sha256
