"""`metrics.jsonl`: a line each time something was measured."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.core.files import write_text
from finetune_jax.parallel import processes
from finetune_jax.report.trackers import Tracker


class MetricsLog:
    """Appends lines; a resumed run first drops those written after its checkpoint.

    With several processes process 0 alone writes; all of them count the lines.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        keep_lines: int,
        trackers: Sequence[Tracker] = (),
    ):
        """Opens the file and keeps its first lines.

        Args:
            path: Made if it is not there.
            keep_lines: Lines that the checkpoint knows of.
            trackers: Are told every line, too.
        """
        self._trackers = trackers
        self._path, self._file = path, None
        self.lines: int = processes.agreed("log", lambda: self._open(keep_lines))

    def _open(self, keep_lines: int) -> int:
        """Opens the file, and returns the number of lines that it keeps."""
        kept = read_lines(self._path)[:keep_lines]
        write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a")
        return len(kept)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends a line; a number that is not finite becomes null."""
        self.lines += 1
        if self._file is None:
            return
        plain = {
            key: None if isinstance(v, float) and not math.isfinite(v) else v
            for key, v in values.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        numbers = {
            key: float(value)
            for key, value in values.items()
            if key != "step" and type(value) in (int, float)
        }
        for tracker in self._trackers:
            tracker.write(int(values["step"]), numbers)

    def close(self) -> None:
        """Closes the file, and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_lines(path: pathlib.Path) -> list[str]:
    """Returns the whole lines of a file; one that a kill cut short is left out."""
    if not path.is_file():
        return []
    return path.read_text().split("\n")[:-1]


def read_metrics(path: pathlib.Path) -> list[dict]:
    """Returns the lines of `metrics.jsonl` as dicts."""
    return [json.loads(line) for line in read_lines(path)]
