"""The processes of a run: how many there are, and what they tell one another.

A run is one process unless `parallel.joining` has joined several. The functions of this
module then have no effect and no cost. With several processes each of them is called by
all processes, in the same order, from the main thread; messages go through the key-value
store of jax's coordinator, which is process 0. The module does not import jax, which reads
environment variables that are set before.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from finetune_jax.parallel import watch

# Seconds of one request to the store, which is repeated: a longer one could not be ended.
SLICE_S = 10.0
_NUMBERS = itertools.count()


def joined() -> Any:
    """Returns jax's state of the joined processes; None before jax is imported."""
    module = sys.modules.get("jax._src.distributed")
    return None if module is None else module.global_state


def index() -> int:
    """Returns the index of this process, from 0."""
    state = joined()
    return 0 if state is None else state.process_id


def count() -> int:
    """Returns the number of processes of the run."""
    state = joined()
    return 1 if state is None else state.num_processes


def is_first() -> bool:
    """Returns whether this process is the one that writes files and talks to a person."""
    return index() == 0


def agreed(name: str, decide: Callable[[], Any]) -> Any:
    """Returns the decision of process 0 in all processes, as JSON brings it over.

    If `decide` raises, process 0 ends, and so do the others.

    Args:
        name: Name of the decision, for messages.
        decide: Called by process 0 alone.
    """
    if count() == 1:
        return decide()
    number = next(_NUMBERS)
    if is_first():
        found = decide()
        _tell(f"decision/{number}", name, found)
        return found
    return _heard(f"decision/{number}", name, 0)


def gathered(name: str, value: Any) -> list[Any]:
    """Returns a value of each process, as JSON brings it over, by the process's index.

    Args:
        name: Name of the value, for messages.
        value: Value of this process.
    """
    if count() == 1:
        return [value]
    number = next(_NUMBERS)
    _tell(f"value/{number}/{index()}", name, value)
    return [_heard(f"value/{number}/{other}", name, other) for other in range(count())]


def wait_for_all(name: str) -> None:
    """Returns once all processes have called it."""
    gathered(name, None)


def differing(name: str, values: dict[str, str]) -> list[str]:
    """Returns a line for each value that is not the same in all processes.

    Args:
        name: Name of the comparison, for messages.
        values: Digests or other short texts by what they are, such as 'config'.
    """
    if count() == 1:
        return []
    found = gathered(name, values)
    lines = []
    for what in dict.fromkeys(key for value in found for key in value):
        by_value: dict[str, list[int]] = {}
        for process, value in enumerate(found):
            by_value.setdefault(str(value.get(what)), []).append(process)
        if len(by_value) > 1:
            groups = sorted(by_value.items(), key=lambda group: -len(group[1]))
            parts = [f"{_processes(who)}: {value[:60]}" for value, who in groups]
            lines.append(f"{what}: {'; '.join(parts)}")
    return lines


def _processes(numbers: Sequence[int]) -> str:
    """Returns 'process 1', or 'processes 0, 2'."""
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _tell(key: str, name: str, value: Any) -> None:
    text = json.dumps({"name": name, "value": value})
    joined().client.key_value_set(key, text)


def _heard(key: str, name: str, sender: int) -> Any:
    """Returns the value that a process has told, once it has."""
    client = joined().client
    with watch.doing(f"waiting for process {sender}: {name}", watch.WAITING):
        while True:
            began = time.monotonic()
            try:
                text = client.blocking_key_value_get(key, int(SLICE_S * 1000))
                break
            except Exception as error:  # The type of a timeout differs by version.
                is_timeout = "DEADLINE_EXCEEDED" in str(error)
                if not is_timeout or time.monotonic() - began < SLICE_S / 2:
                    raise
    found = json.loads(text)
    if found["name"] != name:
        raise AssertionError(
            f"process {sender} is at {found['name']!r}, process {index()} at {name!r}"
        )
    return found["value"]
