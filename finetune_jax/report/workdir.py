"""The folder of a run: which run it holds, and files that are whole or not there."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.parallel import processes

# Most characters of the config's argument in the name of a workdir.
_LONGEST_ARGUMENT = 40
# Seconds in which all processes must see a file of process 0.
_SHARED_WITHIN_S = 30.0


def new_workdir(config_address: str, seed: object) -> pathlib.Path:
    """Makes and returns `runs/CONFIG[-ARG]-seedN-DATE-TIME`, a folder of its own.

    Runs that start in the same second get -2, -3, ...: only one process makes a folder.

    Args:
        config_address: FILE[:ARG] of `--config`.
        seed: Seed of the run, or a seed for each source of randomness.

    Raises:
        UserError: It cannot be made.
    """
    file, _, argument = config_address.partition(":")
    argument = re.sub(r"[^\w.=+-]+", "-", argument)[:_LONGEST_ARGUMENT].strip("-.")
    seeds = sorted(set(seed.values())) if isinstance(seed, Mapping) else [seed]
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parts = [pathlib.Path(file).stem, argument, f"seed{'_'.join(map(str, seeds))}", now]
    name = "-".join(filter(None, parts))
    make_folder(pathlib.Path("runs"))
    count = 1
    while True:
        path = pathlib.Path("runs") / (name if count == 1 else f"{name}-{count}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            count += 1
        except OSError as error:
            raise UserError(f"--workdir: {path} cannot be made: {error}") from error


def origin(config: Config, workdir: pathlib.Path | None) -> pathlib.Path | None:
    """Returns the workdir that has the plug-ins and the fitted state of a run.

    It is that of the run itself, or of the run that a new one goes on from.
    """
    if config.extend is None or (workdir and (workdir / "config.json").is_file()):
        return workdir
    return user_path(config.extend, "config.extend")


def make_folder(workdir: pathlib.Path) -> None:
    """Makes a workdir.

    Raises:
        UserError: It cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be made: {error}") from error


class InUse(UserError):
    """Another process runs in a workdir."""


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir; ends with the process at last.

    Process 0 of several has the lock.

    Raises:
        UserError: Another process runs in it, or it is not shared by all processes.
    """
    if not processes.is_first():
        _check_shared(workdir, processes.agreed("lock", str))
        yield
        return
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InUse(
                f"--workdir: process {file.read().strip() or '(unknown)'} runs in "
                f"{workdir}. Wait for it, stop it, or give another --workdir."
            ) from error
        file.truncate(0)
        holder = f"{os.getpid()} on {os.uname().nodename}"
        file.write(f"{holder}\n")
        file.flush()
        os.fsync(file.fileno())
        processes.agreed("lock", lambda: holder)
        yield


def _check_shared(workdir: pathlib.Path, holder: str) -> None:
    """Checks that this process sees the lock of process 0.

    Raises:
        UserError: It does not; a network file system got some seconds.
    """
    until = time.monotonic() + _SHARED_WITHIN_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_text().strip() == holder:
                return
        time.sleep(0.2)
    raise UserError(
        f"--workdir: {workdir} on {os.uname().nodename} (process {processes.index()}) is "
        f"not the folder that process 0 ({holder}) has locked; give a folder on a file "
        "system that all processes share"
    )


def read_json(path: pathlib.Path) -> dict | None:
    """Returns the object in a JSON file of a run, or None where there is no file.

    Raises:
        UserError: The file cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def _read_of_run(workdir: pathlib.Path, name: str) -> dict:
    if (found := read_json(workdir / name)) is None:
        raise UserError(f"--workdir: {workdir} holds no run (no {name} in it)")
    return found


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the config of the run in a workdir.

    Raises:
        UserError: The folder holds no run.
    """
    found = _read_of_run(workdir, "config.json")
    return configs.from_json(json.dumps(found), str(workdir / "config.json"))


def read_recorded_config(workdir: pathlib.Path) -> Config:
    """Returns the config of the run in a workdir as its manifest has it.

    Raises:
        UserError: The folder holds no run, or its manifest no config.
    """
    path = workdir / "manifest.json"
    found = _read_of_run(workdir, path.name)
    if not isinstance(found.get("config"), dict) or "seed" not in found:
        raise UserError(f"{path}: has no config or no seed; older versions wrote none")
    plain = {**found["config"], "seed": found["seed"]}
    return configs.from_json(json.dumps(plain), str(path))


def read_manifest(workdir: pathlib.Path) -> dict | None:
    """Returns the manifest of the run in a workdir, or None where there is none yet."""
    return read_json(workdir / "manifest.json")


def check_same_inputs(workdir: pathlib.Path, inputs: dict) -> None:
    """Checks that a run taken up again reads what it began with.

    Args:
        workdir: Workdir of the run.
        inputs: Entries of the manifest about data and weights, as they are today.

    Raises:
        UserError: Data or weights have changed since.
    """
    then = read_manifest(workdir) or {}
    changed = [key for key in inputs if key in then and then[key] != inputs[key]]
    if changed:
        raise UserError(
            f"--workdir: {workdir} began with other inputs ({', '.join(changed)} in "
            "its manifest.json differ). Bring them back, or give another --workdir."
        )


def check_same_run(workdir: pathlib.Path, config: Config) -> bool:
    """Returns whether the workdir holds this run already.

    Raises:
        UserError: It holds another; lists the differences. Nothing is written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir} is a file, not a folder")
    if not (workdir / "config.json").is_file():
        return False
    found = configs.differences(config, read_config(workdir))
    if found:
        raise UserError(
            *[f"{line} there" for line in found],
            header=f"--workdir: {workdir} holds another run:",
            advice="Give another --workdir, or the config of that run to resume it.",
        )
    return True
