"""The folder of a sweep: a workdir for each member, claims, failures, and the index.

runs/NAME/KEY/                 workdir of a member
          claims/KEY/          claim.N, failure.N.json, pruned.json
          logs/KEY.N.txt       what attempt N printed
          by_arm/CASE/ARM/...  links to the workdirs, by names for people
          sweep.json           definition and members
          table.{csv,md,tex}   results, with comparisons.json and report/index.html
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.config import resolve
from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json, write_text
from finetune_jax.core.paths import user_path
from finetune_jax.report.manifest import code_digest, package_versions
from finetune_jax.report.tables import first_of
from finetune_jax.report.workdir import make_folder, read_json, read_manifest
from finetune_jax.sweeps.definition import Sweep, folder_name
from finetune_jax.sweeps.members import Member, as_plain, member_key
from finetune_jax.sweeps.schedule import Outcome, Wanted, tune_metric
from finetune_jax.sweeps.search.pruning import curve_of

_KEY = re.compile(r"[0-9a-f]{12}")
_FAILURE = re.compile(r"failure\.(\d+)\.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt of a member that failed.

    Attributes:
        number: Number of its claim.
        error: Last line of the error.
        log: Path of the log.
        again: Whether another attempt may succeed.
        at: Time at which it failed.
    """

    number: int
    error: str
    log: str
    again: bool
    at: str


class SweepFolder:
    """The folder of a sweep."""

    def __init__(self, root: pathlib.Path, sweep: Sweep, *, address: str = ""):
        """Takes the folder, which need not be there, the sweep, and its FILE[:ARG]."""
        self.root = root.absolute()
        file, colon, argument = address.partition(":")
        relative = os.path.relpath(user_path(file), self.root) if file else ""
        self.address = f"{relative}{colon}{argument}"
        self.sweep = sweep
        self._ended: dict[str, Outcome] = {}

    def workdir(self, key: str) -> pathlib.Path:
        """Returns the workdir of a member."""
        return self.root / key

    @property
    def index(self) -> pathlib.Path:
        """File that tells the definition and the members."""
        return self.root / "sweep.json"

    @property
    def claims(self) -> pathlib.Path:
        """Folder of the claims of all members."""
        return self.root / "claims"

    def log(self, key: str, number: int) -> pathlib.Path:
        """Returns the file of what an attempt prints."""
        return self.root / "logs" / f"{key}.{number}.txt"

    def make(self) -> None:
        """Makes the folder.

        Raises:
            UserError: It cannot be made.
        """
        for folder in (self.root, self.claims, self.root / "logs"):
            make_folder(folder)

    def outcome(self, key: str) -> Outcome | None:
        """Returns how a member ended; None if it has not."""
        if key in self._ended:
            return self._ended[key]
        found = self._outcome(key)
        # Failures may be retried, results stay.
        if found is not None and found.state != "failed":
            self._ended[key] = found
        return found

    def _outcome(self, key: str) -> Outcome | None:
        result = read_json(self.workdir(key) / "result.json")
        if result is not None:
            curve: dict[int, float] = {}
            if self.sweep.search is not None:
                curve = curve_of(self.workdir(key), self.sweep.search.metric)
            return Outcome(state="complete", result=result, curve=curve)
        pruned = read_json(self.claims / key / "pruned.json")
        if pruned is not None:
            curve = {int(step): value for step, value in pruned["curve"].items()}
            return Outcome(state="pruned", result=pruned, curve=curve)
        failures = self.failures(key)
        if failures and (
            len(failures) >= self.sweep.attempts or not failures[-1].again
        ):
            return Outcome(state="failed", result={"failed": failures[-1].error})
        return None

    def failures(self, key: str) -> list[Failure]:
        """Returns the attempts of a member that failed, in order."""
        found = []
        for path in _listed(self.claims / key):
            if matched := _FAILURE.fullmatch(path.name):
                found.append(Failure(number=int(matched[1]), **(read_json(path) or {})))
        return sorted(found, key=lambda failure: failure.number)

    def failed(self, key: str, number: int, error: str, *, again: bool) -> None:
        """Notes that an attempt failed."""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        log = str(self.log(key, number))
        values = {"error": error, "log": log, "again": again, "at": now}
        write_json(self.claims / key / f"failure.{number}.json", values)

    def pruned(
        self, key: str, curve: Mapping[int, float], result: Mapping[str, Any]
    ) -> None:
        """Notes that a member was pruned, with its metrics so far by step."""
        values = {**result, "curve": {str(k): v for k, v in curve.items()}}
        write_json(self.claims / key / "pruned.json", values)

    def retry(self, keys: Iterable[str]) -> int:
        """Forgets the failures of members; returns the number of these members."""
        count = 0
        for key in keys:
            failures = self.failures(key)
            for failure in failures:
                path = self.claims / key / f"failure.{failure.number}.json"
                path.rename(path.with_suffix(".retried"))
            count += bool(failures)
        return count

    def write_index(self, name: str, wanted: Wanted) -> None:
        """Writes `sweep.json`, and links to the workdirs by names for people."""
        sweep, members = self.sweep, wanted.members
        # An arm that comes to the config of another one has the same run.
        names = {member.key: [member.to_json()] for member in members}
        for member in wanted.labelled:
            if (other := member.to_json()) not in names[member.key]:
                names[member.key].append(other)
        arms = sweep.all_arms if sweep.search is None else {}
        trained = [m for m in members if m.stage != "source"]
        index = {
            "name": name,
            "address": self.address,
            "metric": sweep.metric,
            "baseline": sweep.the_baseline if arms else None,
            "tune_by": tune_metric(sweep, trained[0]) if trained else sweep.tune_by,
            "keep": sweep.keep,
            "arms": {name: as_plain(arm.overrides) for name, arm in arms.items()},
            "cases": {name: as_plain(of) for name, of in sweep.cases.items()},
            "seeds": [dict(seed) for seed in sweep.all_seeds],
            "members": {
                key: {**one, "also": more} for key, (one, *more) in names.items()
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        with contextlib.suppress(FileNotFoundError):
            if self.index.read_text() == text:
                return
        write_text(self.index, text, by_many=True)
        links = {self._link(member) for member in wanted.labelled}
        for place in (self.root / "by_arm").rglob("*"):
            if place.is_symlink() and place not in links:  # Of a removed arm.
                place.unlink(missing_ok=True)

    def owner_lines(self, name: str) -> list[str]:
        """Returns a line if the file of the sweep has moved since its runs began.

        Args:
            name: Name of the sweep.

        Raises:
            UserError: The runs in the folder are of another sweep.
        """
        then = read_json(self.index) or {"name": name}
        address = then.get("address") or ""
        if address == self.address or (not address and then["name"] == name):
            return []
        file = self.root / address.partition(":")[0]
        if address and not file.exists():
            return [f"the runs in {self.root} are of {address}, which is gone"]
        of = f" of {file.resolve()}" if address else ""
        raise UserError(
            f"--dir: {self.root} has the runs of another sweep, {then['name']!r}{of}; "
            "give another --dir"
        )

    def _link(self, member: Member) -> pathlib.Path:
        """Links the workdir of a member below `by_arm/`, and returns the link."""
        values = list(dict(member.seed).values())
        values = values[:1] if len(set(values)) == 1 else values
        seed = f"seed{'_'.join(map(str, values))}"
        tuned = member.key if member.stage == "tune" else seed
        parts = [member.case, member.arm, *(["tuning"] if tuned != seed else []), tuned]
        place = self.root.joinpath("by_arm", *(folder_name(p) for p in parts if p))
        target = os.path.relpath(self.workdir(member.key), place.parent)
        with contextlib.suppress(OSError):  # A file system without links has none.
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_symlink() and os.readlink(place) != target:
                place.unlink()
            if not place.is_symlink():
                place.symlink_to(target)
        return place

    def adopt(self, wanted: Wanted) -> list[str]:
        """Links members that have run elsewhere; returns lines about them.

        They are looked for beside this folder: finished runs, and members of other
        sweeps. Those of other code run again, and sources without checkpoints.

        Args:
            wanted: Those of its members without a workdir are looked for.
        """
        missing, lines = dict[str, Member](), []
        for member in wanted.members:
            workdir = self.workdir(member.key)
            if workdir.is_symlink() and not workdir.exists():
                workdir.unlink(missing_ok=True)
                lines.append(f"{member.label}: the run it was found in is gone")
            if not workdir.exists():
                missing[member.key] = member
        for key, place in _elsewhere(self.root, list(missing)):
            if key not in missing or not self._starts_alike(missing[key], place):
                continue
            label = missing[key].label
            if identity(place) != identity(None):
                lines.append(f"{label}: {place} ran with other code; runs again")
                continue
            if key in wanted.sources and not _listed(place / "checkpoints"):
                lines.append(f"{label}: {place} has no checkpoints; runs again")
                continue
            del missing[key]
            try:
                self.workdir(key).symlink_to(os.path.relpath(place, self.root))
            except FileExistsError:  # Another worker was faster.
                continue
            lines.append(f"{label}: finished in {place}")
        return lines

    def _starts_alike(self, member: Member, place: pathlib.Path) -> bool:
        """Returns whether a run elsewhere started from the sources that a member has."""
        return all(
            self.workdir(key).resolve() == (place.parent / key).resolve()
            for key in member.needs
        )

    def changes(self, wanted: Wanted) -> list[str]:
        """Returns lines about finished runs that do not fit the sweep as it is now.

        These are runs of other code, packages, data or weights, and those that belong to
        no arm.
        """
        now, lines, members = identity(None), [], wanted.members
        others: dict[str, list[str]] = {"code": [], "packages": []}
        for member in members:
            outcome = self.outcome(member.key)
            if outcome is None or outcome.state != "complete":
                continue
            then = identity(self.workdir(member.key))
            for name, labels in others.items():
                if then[name] != now[name]:
                    labels.append(member.label)
        for name, labels in others.items():
            if labels:
                few = first_of(labels, separator="; ")
                lines.append(
                    f"{len(labels)} finished members ran with other {name} than that of "
                    f"now ({few}); `retry --changed` runs them again"
                )
        for what, group in self._other_inputs(members):
            few = first_of([member.label for member in group], separator="; ")
            lines.append(
                f"{few} name the same {what}, but "
                "read other content than one another; `retry --changed` runs all of "
                "them again"
            )
        if wanted.is_all and (count := len(self._of_no_arm(members))):
            s, do = ("", "belongs") if count == 1 else ("s", "belong")
            lines.append(
                f"{count} finished run{s} in the folder {do} to no arm of the sweep: "
                "arms were removed or changed"
            )
        return lines

    def _of_no_arm(self, members: Sequence[Member]) -> list[pathlib.Path]:
        """Returns workdirs of finished runs that are no members, as of removed arms."""
        keys = {member.key for member in members}
        return [
            folder
            for folder in _listed(self.root)
            if _KEY.fullmatch(folder.name)
            and folder.name not in keys
            and (folder / "result.json").is_file()
        ]

    def _other_inputs(
        self, members: Sequence[Member]
    ) -> list[tuple[str, list[Member]]]:
        """Returns groups of finished members that read other content from one place.

        Each group has the place: 'config.data', or the address of weights.
        """
        groups: dict[tuple[str, str], dict[str, list[Member]]] = {}
        for member in members:
            outcome = self.outcome(member.key)
            if outcome is None or outcome.state != "complete":
                continue
            manifest = read_manifest(self.workdir(member.key)) or {}
            data = repr((member.config.data, dict(member.seed)["order"]))
            found = {("config.data", data): str(manifest.get("data_fingerprint"))}
            for path, sha256 in (manifest.get("weights_sha256") or {}).items():
                found[f"weights {path}", ""] = str(sha256)
            for place, content in found.items():
                groups.setdefault(place, {}).setdefault(content, []).append(member)
        return [
            (what, [member for own in by_content.values() for member in own])
            for (what, _), by_content in groups.items()
            if len(by_content) > 1
        ]

    def set_aside(self, members: Sequence[Member]) -> int:
        """Moves members that have ended to `aside/`, if code, packages or inputs changed.

        If runs read other data or weights from the same place, all of them are moved.

        Returns:
            The number of these members, which run again when workers are started.
        """
        now, count = identity(None), 0
        mixed = [m.key for _, group in self._other_inputs(members) for m in group]
        for member in members:
            workdir = self.workdir(member.key)
            outcome = self.outcome(member.key)
            if outcome is None or outcome.state == "failed":
                continue
            if identity(workdir) == now and member.key not in mixed:
                continue
            count += 1
            self._ended.pop(member.key, None)
            (self.claims / member.key / "pruned.json").unlink(missing_ok=True)
            if workdir.is_symlink():
                workdir.unlink()
                continue
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            place = self.root / "aside" / f"{member.key}-{stamp}"
            place.parent.mkdir(exist_ok=True)
            workdir.rename(place)
        return count

    def drop_states_of(self, key: str) -> None:
        """Removes the checkpoints of a member."""
        shutil.rmtree(self.workdir(key) / "checkpoints", ignore_errors=True)

    def drop_states(self, keys: Iterable[str]) -> None:
        """Removes the checkpoints of members that have run in this folder."""
        for key in keys:
            workdir = self.workdir(key)
            if not workdir.is_symlink() and (workdir / "result.json").is_file():
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)


def identity(workdir: pathlib.Path | None) -> dict[str, Any]:
    """Returns code and packages of the run in a workdir; None are those of now."""
    if workdir is None:
        return {"code": code_digest(), "packages": package_versions()}
    manifest = read_manifest(workdir) or {}
    return {"code": manifest.get("code_sha256"), "packages": manifest.get("packages")}


def threads_of(folder: SweepFolder, threads: int, *, is_decided: bool = True) -> int:
    """Returns the CPU threads of the sweep's workers, which the first worker decides.

    Args:
        folder: Folder of the sweep, made if `is_decided`.
        threads: Threads that the first worker would choose.
        is_decided: Whether this decides if no worker has; otherwise nothing is written.

    Raises:
        UserError: The file that has them cannot be read.
    """
    if folder.sweep.threads is not None:
        threads = folder.sweep.threads
    path = folder.root / "threads"
    if not is_decided and not path.exists():
        return threads
    try:
        if is_decided:
            with path.open("x") as file:
                file.write(f"{threads}\n")
            return threads
    except FileExistsError:
        pass
    text = ""
    for _ in range(50):  # Its writer has made it, and writes it now.
        if (text := path.read_text()).endswith("\n"):
            break
        time.sleep(0.1)
    if not text.strip().isdigit():
        raise UserError(f"{path}: {text!r} is no number of threads; remove the file")
    found = int(text)
    if folder.sweep.threads not in (None, found):
        raise UserError(
            f"Sweep.threads: {folder.sweep.threads}, but the sweep in {folder.root} began "
            f"with {found}, on which the last bits depend; set {found}, or give another "
            "--dir"
        )
    return found


def _elsewhere(
    root: pathlib.Path, keys: Sequence[str]
) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields keys and workdirs of finished runs beside the folder of a sweep."""
    if not keys:
        return
    for folder in _listed(root.parent):
        if folder == root or not folder.is_dir():
            continue
        if (folder / "sweep.json").is_file():
            for key in keys:
                if (folder / key / "result.json").is_file():
                    yield key, folder / key
        elif (folder / "result.json").is_file():
            key = _key_of(folder)
            if key is not None and key in keys:
                yield key, folder


def _key_of(workdir: pathlib.Path) -> str | None:
    """Returns the key of the config of a plain run; None if it cannot be read."""
    try:
        config, problems = resolve(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return None if problems else member_key(config)


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
