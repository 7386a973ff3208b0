"""Files of a folder: which of them count, and lines about those that are not used."""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Collection, Iterable

from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.core.paths import printable, user_path
from finetune_jax.data.reading.threads import in_threads

# Names that operating systems, network disks and programs leave behind, case-folded.
_LITTER = frozenset(
    (
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r",
        "$recycle.bin", "system volume information", "found.000", "lost+found",
        "__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder",
        "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",
        "~snapshot", "__pycache__",
    )
)  # fmt: skip
# Hidden files, locks of office programs, backups of editors, marks of downloads.
_LITTER_FORMS = re.compile(r"\..*|~\$.*|.*~|.*:zone\.identifier", re.DOTALL)
_NAMED = 3
# Splits by the names of their files or folders.
SPLITS = {
    "train": "train", "training": "train", "dev": "validation", "val": "validation",
    "valid": "validation", "validation": "validation", "test": "test",
}  # fmt: skip


def is_litter(name: str) -> bool:
    """Returns whether a file or folder is hidden or left behind by a system."""
    folded = name.casefold()
    return folded in _LITTER or _LITTER_FORMS.fullmatch(folded) is not None


@dataclasses.dataclass(frozen=True)
class FileNotes:
    """Notes about files of a data set or of inputs that are left out, and problems.

    Attributes:
        reasons: Reason by file that is left out.
        litter: Hidden files and folders, and those of the system.
        problems: Lines about folders that cannot be opened, and what callers add.
    """

    reasons: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict)
    litter: set[pathlib.Path] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, path: pathlib.Path, reason: str) -> None:
        """Notes that a file is not used."""
        self.reasons[path] = reason

    def lines(self, where: str) -> tuple[str, ...]:
        """Returns a line about files by suffix and reason, and one about litter.

        Args:
            where: The folder, for the beginning of a line.
        """
        found = []
        if self.reasons:
            by_reason: dict[str, list[str]] = {}
            for path, reason in sorted(self.reasons.items()):
                by_reason.setdefault(reason, []).append(path.suffix.lower())
            parts = [f"{_counted(s)} ({reason})" for reason, s in by_reason.items()]
            count = len(self.reasons)
            files = "1 file" if count == 1 else f"{count:,} files"
            found.append(f"{where}: {files} not used: {'; '.join(parts)}")
        if self.litter:
            names = [path.name for path in sorted(self.litter)]
            shown = ", ".join(map(repr, list(dict.fromkeys(names))[:_NAMED]))
            more = ", ..." if len(set(names)) > _NAMED else ""
            count = len(names)
            found.append(
                f"{where}: {count} hidden or system "
                f"{'entry' if count == 1 else 'entries'} not used: {shown}{more}"
            )
        return tuple(map(printable, found))


def _counted(suffixes: list[str]) -> str:
    counts = collections.Counter(suffixes).most_common()
    return ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in counts)


def visible(folder: pathlib.Path, notes: FileNotes) -> list[pathlib.Path]:
    """Returns the files and folders in a folder without litter, sorted.

    Args:
        folder: The folder.
        notes: Gets the litter, and a line if the folder cannot be opened.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        notes.problems.append(f"{folder}: cannot be opened: {error}")
        return []
    notes.litter.update(path for path in inside if is_litter(path.name))
    return [path for path in inside if not is_litter(path.name)]


def files_below(folder: pathlib.Path, notes: FileNotes) -> list[pathlib.Path]:
    """Returns all visible files below a folder; links are followed, circles are not.

    Args:
        folder: The folder.
        notes: Gets the litter, and a line for every folder that cannot be opened.
    """
    found, seen = [], set()

    def refused(error: OSError) -> None:
        notes.problems.append(f"{error.filename}: cannot be opened: {error.strerror}")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=refused):
        here = pathlib.Path(place)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        litter = filter(is_litter, (*folders, *files))
        notes.litter.update(here / name for name in litter)
        folders[:] = [name for name in folders if not is_litter(name)]
        found += [here / name for name in files if not is_litter(name)]
    return sorted(found)


def data_place(
    directory: str | None, needed: str, kinds: str = "folder"
) -> pathlib.Path:
    """Returns the file or folder `config.data.dir`.

    Args:
        directory: `config.data.dir`.
        needed: Message if that is None.
        kinds: 'file', 'folder' or 'file or folder', whichever it may be.

    Raises:
        DataMissing: None is given, or it is not there.
    """
    if directory is None:
        raise DataMissing(f"config.data.dir: {needed}")
    place = user_path(directory, "config.data.dir")
    is_there = {"file": place.is_file, "folder": place.is_dir}
    if not any(is_there[kind]() for kind in kinds.split(" or ")):
        raise DataMissing(f"config.data.dir: no {kinds} {directory!r}")
    return place


def digest_of_files(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> str:
    """Returns a digest of files below a folder, of their names and their content.

    Raises:
        UserError: Lists the files that cannot be read.
    """
    paths = sorted(paths)
    lines = [
        f"{path.relative_to(root).as_posix()!a} {digest}"
        for path, digest in zip(paths, in_threads(_digest_of, paths))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_of(path: pathlib.Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def not_used(directory: str | None, used: Collection[pathlib.Path]) -> tuple[str, ...]:
    """Returns lines about the files in `config.data.dir` that no split is read from.

    Args:
        directory: The folder; None, a file or a missing folder gives no lines.
        used: Files that are read.
    """
    place = None if directory is None else user_path(directory, "config.data.dir")
    if place is None or not place.is_dir():
        return ()
    notes = FileNotes()
    for path in visible(place, notes):
        if path.is_dir():
            for file in files_below(path, notes):
                notes.add(file, "in subfolders")
        elif path not in used:
            notes.add(path, "no files of a split")
    return notes.lines(str(directory))
