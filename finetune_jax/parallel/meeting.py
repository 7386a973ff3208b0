"""The processes of a run meet at the address of process 0 before jax starts.

jax's coordinator cannot be asked first whose it is: a process of another run that connects
to it ends both runs. So the address is that of a short meeting, in which process 0 tells
the others where its coordinator will be. Mistakes are found there, and named.
"""

import contextlib
import json
import socket
import time
from typing import Any

from finetune_jax.core.errors import Problem, UserError

KEY = "config.parallel.coordinator"
# Seconds between two attempts to reach process 0, and for the first line of a connection.
RETRY_S, HELLO_S = 0.2, 5.0


def meet(address: str, count: int, index: int, seconds: float) -> str:
    """Returns the address of jax's coordinator, once all processes have come.

    Args:
        address: HOST:PORT of process 0.
        count: Number of processes.
        index: Index of this process.
        seconds: Seconds in which all must come.

    Raises:
        UserError: The address cannot be used, or not all processes have come.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise UserError(Problem(KEY, f"{address!r} is not HOST:PORT"))
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        text = f"the host {host!r} is unknown here ({error}); give an IP address"
        raise UserError(Problem(KEY, text)) from error
    until = time.monotonic() + seconds
    if index:
        return _come(host, int(port), {"count": count, "index": index}, until, seconds)
    local = "127.0.0.1" if is_loopback(host) else ""
    try:
        server = socket.create_server((local, int(port)), family=family)
    except OSError as error:
        text = f"port {port} is taken, maybe by another run ({error}); give another"
        raise UserError(Problem(KEY, text)) from error
    with server, contextlib.ExitStack() as open_until_told:
        guests = _guests(server, count, until, seconds, open_until_told)
        place = f"[{host}]" if ":" in host else host
        found = f"{place}:{free_port(family)}"
        for guest in guests.values():
            _tell(guest, {"address": found})
    return found


def _guests(
    server: socket.socket,
    count: int,
    until: float,
    seconds: float,
    stack: contextlib.ExitStack,
) -> dict[int, socket.socket]:
    """Returns the connection of each other process.

    Raises:
        UserError: Some have not come in time; names them.
    """
    guests: dict[int, socket.socket] = {}
    while len(guests) < count - 1:
        server.settimeout(max(until - time.monotonic(), 0.001))
        try:
            guest = stack.enter_context(server.accept()[0])
        except TimeoutError as error:
            missing = [str(i) for i in range(1, count) if i not in guests]
            text = (
                f"{count}, but process {', '.join(missing)} has not come within "
                f"{seconds:g} s (config.parallel.join_timeout_s); start each process, with "
                "its own index"
            )
            for waiting in guests.values():
                _tell(waiting, {"error": f"config.parallel.processes: {text}"})
            raise UserError(Problem("config.parallel.processes", text)) from error
        hello = _line(guest, HELLO_S)
        if hello is None:
            continue  # A scanner of ports, or a process that has been killed.
        wrong, index = None, int(hello.get("index") or 0)
        if hello.get("count") != count:
            wrong = f"process 0 waits for {count} processes, not {hello.get('count')}"
        elif not 0 < index < count:
            wrong = f"{index} is no index of {count} processes"
        elif index in guests:
            wrong = f"process {index} has come already"
        if wrong is not None:
            _tell(guest, {"error": f"{KEY}: {wrong}; another run may use the address"})
            continue
        guests[index] = guest
    return guests


def _come(
    host: str, port: int, hello: dict[str, int], until: float, seconds: float
) -> str:
    """Returns what process 0 tells this process.

    Raises:
        UserError: Process 0 does not answer, or does not want this process.
    """
    while True:
        answer, why = None, "no answer"
        try:
            with socket.create_connection((host, port), timeout=HELLO_S) as connection:
                _tell(connection, hello)
                # Process 0 names those that are missing a bit after the limit.
                left = max(until - time.monotonic(), 0.0) + HELLO_S
                answer = _line(connection, left)
        except OSError as error:
            why = str(error)
        if answer is not None and "error" in answer:
            raise UserError(answer["error"])
        if answer is not None:
            return answer["address"]
        if time.monotonic() > until:
            text = (
                f"nobody answers at {host}:{port} ({why}); process {hello['index']} has "
                f"tried for {seconds:g} s. Process 0 must run on that host, and the port "
                "must be open between the hosts."
            )
            raise UserError(Problem(KEY, text))
        time.sleep(RETRY_S)


def _tell(connection: socket.socket, value: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # It may be gone.
        connection.sendall(json.dumps(value).encode() + b"\n")


def _line(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """Returns the object in the next line; None if there is none in time."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            found = json.loads(file.readline(10_000))
    except (OSError, ValueError):
        return None
    is_known = isinstance(found, dict) and type(found.get("index", 0)) is int
    return found if is_known else None


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine, reached without the network."""
    return host in ("127.0.0.1", "localhost", "::1")


def free_port(family: int = socket.AF_INET) -> int:
    """Returns a free port."""
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
