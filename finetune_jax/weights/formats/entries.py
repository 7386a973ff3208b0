"""Entries of a training checkpoint, and the choice of the model's weights among them."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import UserError, listed
from finetune_jax.core.registry import closest

KEY = "config.init.entry"
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# Names of averaged weights; raw weights are the default if a file has both.
_AVERAGED = re.compile(r"(.*[^a-z])?(ema|swa|avg|averaged?|shadow|polyak)([^a-z].*)?")
# Names of training state, which is never the model's.
_OF_TRAINING = re.compile(r".*(optim|sched|scaler|callback|loops).*|amp")
# Counter of torch's averaged weights.
_COUNT = "n_averaged"
# Prefixes that DataParallel and torch.compile add to every name.
_WRAPPED = ("module.", "_orig_mod.")
_DEPTH = 4
_SHOWN = 5


class Unfit(Exception):
    """A fault of a weight file, without the name of the file and without advice."""


@dataclasses.dataclass(frozen=True)
class Opaque:
    """An object in a file, of which only the class or the function is known.

    Attributes:
        kind: Full name of the class, such as 'argparse.Namespace'.
    """

    kind: str

    @property
    def is_tensor(self) -> bool:
        """Whether this is a tensor of torch, such as a sparse or a quantised one."""
        return self.kind.startswith(("torch._utils._rebuild", "torch._tensor._rebuild"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """The state dict of a checkpoint.

    Attributes:
        tensors: Tensors by name.
        notes: Lines about the entry and about ignored contents.
    """

    tensors: dict[str, Any]
    notes: tuple[str, ...]


def choose_entry(
    top: Any, entry: str | None, is_plain: Callable[[Any], bool]
) -> Chosen:
    """Returns the one state dict of a checkpoint, without the prefixes of wrappers.

    Args:
        top: Contents of the file.
        entry: Name of the entry, such as 'model_ema' or 'teacher.backbone'. None takes
            the usual one.
        is_plain: Whether a value is a tensor that can be read.

    Raises:
        Unfit: The file has no state dict, or several.
        UserError: The file has no such entry.
    """
    if not isinstance(top, dict):
        raise Unfit(_told_top(top))

    def is_tensor(value: Any) -> bool:
        return is_plain(value) or (isinstance(value, Opaque) and value.is_tensor)

    entries = _entries(top, is_tensor)
    own = {name: value for name, value in top.items() if is_tensor(value)}
    if entry is not None:
        tensors, notes = _asked(top, entries, entry, is_tensor)
    else:
        tensors, notes = _usual(top, own, entries)
    found = {name: value for name, value in tensors.items() if is_tensor(value)}
    if odd := {n: value for n, value in found.items() if isinstance(value, Opaque)}:
        raise Unfit(_told_odd(odd))
    found, prefix = _unwrapped(found)
    if prefix:
        notes.append(f"left out the prefix {prefix!r} of all names")
    if left := _objects((top, tensors)):
        shown = listed((f"{n[:100]!r} ({kind})" for n, kind in left), _SHOWN)
        number = "1 object" if len(left) == 1 else f"{len(left)} objects"
        notes.append(f"left out {number} other than tensors: {shown}")
    return Chosen(tensors=found, notes=tuple(notes))


def under(tensors: Mapping[str, Any], entry: str) -> dict[str, Any]:
    """Returns the tensors whose names begin with an entry, without this beginning.

    >>> under({"teacher.fc.bias": 1, "teachers": 2}, "teacher")
    {'fc.bias': 1}
    """
    for sign in (".", "/"):
        begin = entry.rstrip("./") + sign
        found = {
            name.removeprefix(begin): value
            for name, value in tensors.items()
            if name.startswith(begin) and name != begin
        }
        if found:
            return found
    return {}


def no_entry(entry: str, known: Sequence[str], where: str) -> UserError:
    """Returns the error that an entry is not in a file.

    Args:
        entry: Requested name.
        known: Names of the entries of the file.
        where: Path of the file.
    """
    names = ", ".join(map(repr, known[:20])) or "none: its tensors have no entries"
    return UserError(
        f"{KEY}: {entry!r} is not in {where}{closest(entry, known)}; its entries: {names}"
    )


def beginnings(names: Sequence[str]) -> list[str]:
    """Returns the first parts of names, such as 'student' and 'teacher'."""
    return sorted({re.split(r"[./]", name)[0] for name in names})


def _entries(top: Mapping, is_tensor: Callable[[Any], bool]) -> dict[str, dict]:
    """Returns the dicts of tensors inside a dict, by their path."""
    found, seen, level = {}, {id(top)}, {"": top}
    for _ in range(_DEPTH):
        below = {}
        for path, values in level.items():
            for name, value in values.items():
                if not isinstance(value, dict) or id(value) in seen:
                    continue
                seen.add(id(value))
                full = f"{path}.{name}" if path else name
                is_state = any(map(is_tensor, value.values()))
                (found if is_state else below)[full] = value
        level = below
    return found


def _usual(
    top: Mapping[str, Any], own: Mapping[str, Any], entries: Mapping[str, dict]
) -> tuple[Mapping[str, Any], list[str]]:
    """Returns the default entry, and lines about it."""
    of_model = [n for n in entries if not _OF_TRAINING.fullmatch(_start(n))]
    raw = [n for n in of_model if not is_averaged(n)]
    is_usual = {n: n.rpartition(".")[2] in WRAPPERS for n in raw}
    usual = [n for n in raw if is_usual[n] and "." not in n]
    usual = usual or [n for n in raw if is_usual[n]]
    # If the dict has an unknown name, the tensors outside of it may be the model, too.
    found = usual or ([] if own else raw or of_model)
    if len(found) > 1 or (not found and own and of_model):
        keys = ", ".join(repr(name[:100]) for name in sorted(top)[:20])
        ways = [f"{KEY}={name[:100]!r}" for name in (found or of_model)[:_SHOWN]]
        raise Unfit(
            f"it holds several dicts of tensors; its keys are [{keys}]; "
            f"{' or '.join(ways)} takes one of them"
        )
    if found:
        return entries[found[0]], [_told_usual(found[0], of_model)]
    if not own:
        raise Unfit(_told_empty(top))
    return top, []


def _told_usual(name: str, of_model: Sequence[str]) -> str:
    others = [other[:100] for other in of_model if other != name]
    if not others:
        only = ", the averaged weights: it has no others" if is_averaged(name) else ""
        return f"took {name[:100]!r}{only}"
    averaged = [other for other in others if is_averaged(other)]
    what = "the averaged weights" if averaged else "this one"
    return (
        f"took {name[:100]!r}; it also has {', '.join(map(repr, others[:_SHOWN]))}: "
        f"{KEY}={(averaged or others)[0]!r} takes {what}"
    )


def is_averaged(name: str) -> bool:
    """Returns whether a name is that of averaged weights.

    >>> is_averaged("state_dict_ema"), is_averaged("schema")
    (True, False)
    """
    return bool(_AVERAGED.fullmatch(_start(name)))


def _start(name: str) -> str:
    # The names in a file can have any length.
    return name[:200].casefold()


def _asked(
    top: Mapping[str, Any],
    entries: Mapping[str, dict],
    entry: str,
    is_tensor: Callable[[Any], bool],
) -> tuple[Mapping[str, Any], list[str]]:
    """Returns the requested entry, and a line about it."""
    note = [f"took {entry!r}, as {KEY} says"]
    if entry in entries:
        return entries[entry], note
    inside = [n for n in entries if n.startswith(f"{entry}.")]
    if len(inside) == 1:
        return entries[inside[0]], [f"took {inside[0]!r}, as {KEY}={entry!r} says"]
    # The entry, after the path of a dict if any, is a beginning of tensors' names.
    found, known = {}, [*entries]
    for path, state in {"": top, **entries}.items():
        tensors = {n: v for n, v in state.items() if is_tensor(v)}
        known += beginnings([*tensors])
        rest = entry.removeprefix(f"{path}.") if path else entry
        for names in (tensors, _unwrapped(tensors)[0]):
            if inner := under(names, rest):
                found[path] = inner
    if len(found) > 1:
        ways = " or ".join(f"{KEY}={f'{path}.{entry}'!r}" for path in found if path)
        raise UserError(
            f"{KEY}: {entry!r} is in several dicts of the file; write {ways}"
        )
    if found:
        ((path, tensors),) = found.items()
        inside = f" (in {path!r})" if path and not entry.startswith(path) else ""
        return tensors, [f"took {entry!r}{inside}, as {KEY} says"]
    raise no_entry(entry, list(dict.fromkeys(known)), "the file")


def _unwrapped(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns tensors without the prefixes of wrappers, and these prefixes."""
    found, left = {n: t for n, t in tensors.items() if n != _COUNT}, ""
    for prefix in _WRAPPED * 2:
        if found and all(n.startswith(prefix) and n != prefix for n in found):
            found = {n.removeprefix(prefix): t for n, t in found.items()}
            left += prefix
    return found, left


def _objects(containers: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Returns the names and types of the objects in dicts and in the dicts inside."""
    found, seen = {}, set()
    for container in containers:
        for name, value in container.items():
            inner: Sequence[Any] = ()
            if isinstance(value, dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                inner = [*(value.values() if isinstance(value, dict) else value)]
            for one in (value, *inner):
                if isinstance(one, Opaque) and not one.is_tensor:
                    found.setdefault(name, one.kind)
    return list(found.items())


def _told_top(top: Any) -> str:
    if isinstance(top, Opaque):
        return (
            f"it holds one object, of {top.kind!r}, and no dict of tensors: a whole "
            "pickled model? Code in a file is never run"
        )
    kind = type(top).__name__.lstrip("_").lower()
    return f"it holds one {kind} and no dict of tensors"


def _told_empty(top: Mapping[str, Any]) -> str:
    keys = ", ".join(repr(name[:100]) for name in sorted(top)[:20])
    told = f"it holds no dict of tensors; its keys are [{keys}]"
    if {"state", "param_groups"} <= set(top):
        told += "; it is the state of an optimizer"
    if objects := _objects([top]):
        name, kind = objects[0]
        told += (
            f"; {name[:100]!r} is an object of {kind!r}, which is not made: code in a "
            "file is never run"
        )
    return told


def _told_odd(odd: Mapping[str, Opaque]) -> str:
    name, value = next(iter(odd.items()))
    known = {"sparse": "sparse", "_qtensor": "quantised", "nested": "nested"}
    kinds = [told for part, told in known.items() if part in value.kind]
    return (
        f"it holds something other than plain tensors: {name[:100]!r} is "
        f"{f'a {kinds[0]} tensor' if kinds else 'one of another kind'} ({value.kind})"
    )
