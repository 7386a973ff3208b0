"""Names, counts and digests of the arrays of a tree."""

import functools
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax.core.machine import threads

# Values whose digest takes less time than handing the leaves to threads.
FEW_VALUES = 2**22


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in the tree's order.

    >>> named({"head": {"bias": 1, "kernel": 2}})
    {'head/bias': 1, 'head/kernel': 2}
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): leaf for path, leaf in leaves}


def name_of(path: tuple) -> str:
    """Returns the name of a leaf from its path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def like(tree: Any, leaves: dict[str, Any]) -> Any:
    """Returns a tree shaped like `tree` with each leaf taken from `leaves` by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name_of(path)], tree)


def stage_of(name: str, prefixes: tuple[str, ...] = ("",)) -> str:
    """Returns the stage of a parameter, with the prefix of its model if it has one.

    >>> stage_of("stage1/conv/kernel")
    'stage1'
    >>> stage_of("student/stage1/conv/kernel", ("student", "teacher"))
    'student/stage1'
    """
    parts = name.split("/")
    return "/".join(parts[: 2 if parts[0] in prefixes else 1])


def part(tree: Any, prefix: str) -> Any:
    """Returns what a tree has of one model: nothing, or all of it for the prefix ''."""
    return tree.get(prefix, {}) if prefix else tree


def with_part(tree: Any, prefix: str, of_model: Any) -> Any:
    """Returns a tree with the subtree of one model replaced, if it has one."""
    if not prefix:
        return of_model
    return {**tree, prefix: of_model} if prefix in tree else tree


def count(tree: Any) -> int:
    """Returns the number of values in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the number of bytes of a tree of arrays or shapes."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole(leaf: Any) -> Any:
    """Returns an array of which this process has all values.

    An array over processes is gathered; all processes call it in the same order.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    return _gather(sharding.mesh)(leaf).addressable_data(0)


@functools.cache
def _gather(mesh: Mesh) -> Callable:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda leaf: leaf, out_shardings=everywhere)


def digest(tree: Any) -> str:
    """Returns the sha256 over sorted names, dtypes, shapes and bytes of the leaves."""
    digester = hashlib.sha256()
    for name, sha256 in sorted(leaf_digests(tree).items()):
        digester.update(f"{name}:{sha256}\n".encode())
    return digester.hexdigest()


def text_digest(text: str) -> str:
    """Returns the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def leaf_digests(tree: Any) -> dict[str, str]:
    """Returns `leaf_digest` of every leaf by its name."""
    leaves = named(tree)
    if any(_spans_processes(leaf) for leaf in leaves.values()):
        # One at a time, so that no process has all of a large state.
        return {name: leaf_digest(whole(leaf)) for name, leaf in leaves.items()}
    if sum(np.size(leaf) for leaf in leaves.values()) < FEW_VALUES:
        return {name: leaf_digest(leaf) for name, leaf in leaves.items()}
    with ThreadPoolExecutor(threads()) as pool:
        return dict(zip(leaves, pool.map(leaf_digest, leaves.values())))


def _spans_processes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def leaf_digest(leaf: Any) -> str:
    """Returns the sha256 over dtype, shape and bytes of one array."""
    array = np.ascontiguousarray(leaf)
    digester = hashlib.sha256(f"{array.dtype.str}{np.shape(leaf)}".encode())
    digester.update(array.reshape(-1).view(np.uint8).data)
    return digester.hexdigest()
