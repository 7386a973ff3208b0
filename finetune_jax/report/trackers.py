"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_text
from finetune_jax.parallel import processes


class Tracker(Protocol):
    """Takes what is written to `metrics.jsonl`, line by line."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line."""
        ...

    def close(self) -> None:
        """Writes what is still to be written."""
        ...


class TensorBoard:
    """Event files that TensorBoard shows."""

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        """Opens a file in a folder.

        Args:
            folder: Folder of the run's event files; each attempt of the run adds one.
            first_step: First step; entries of earlier attempts from this step on are void.
        """
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as error:
            raise _missing("tensorboard") from error
        folder.mkdir(exist_ok=True)
        # Not its SummaryWriter, which keeps events back for two minutes; a kill would
        # lose what the log has. The name tells attempts of one second apart.
        self._file = EventsWriter(str(folder / "events"), f".{first_step:010}")
        # Generated modules, whose contents have no static types.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        log = self._events.SessionLog
        start = log(status=log.START)
        self._write(step=first_step, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line."""
        scalars = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._write(step=step, summary=self._summaries.Summary(value=scalars))

    def _write(self, **content: Any) -> None:
        self._file.write_event(self._events.Event(wall_time=time.time(), **content))
        self._file.flush()

    def close(self) -> None:
        """Writes what is still to be written."""
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline needs no account."""

    def __init__(
        self,
        report: Mapping[str, Any],
        workdir: pathlib.Path,
        config: Mapping[str, Any],
    ):
        """Begins the run, or goes on with it.

        Args:
            report: The section `config.report`, with project, group and tags.
            workdir: Names the run, and keeps its files.
            config: Config for the run's page.
        """
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        name_file = workdir / "wandb_id"
        if not name_file.is_file():
            write_text(name_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=report["wandb"],
                group=report["group"],
                tags=list(report["tags"]),
                name=" ".join([*report["tags"], workdir.name]),
                id=name_file.read_text(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"config.report.wandb: {error}. `wandb login` gives a key; "
                "WANDB_MODE=offline needs none."
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Writes what is still to be written."""
        self._run.finish()


def _missing(extra: str) -> UserError:
    return UserError(
        f"config.report.{extra} needs a package that is not installed: "
        f"python -m pip install 'finetune_jax[{extra}]'"
    )


def make_trackers(
    report: Mapping[str, Any],
    config: Callable[[], Mapping[str, Any]],
    *,
    workdir: pathlib.Path,
    first_step: int,
) -> list[Tracker]:
    """Returns the trackers that `config.report` asks for; only process 0 has any.

    Args:
        report: The section `config.report`.
        config: Returns the whole config, plain.
        workdir: Workdir of the run.
        first_step: The first step that has not been logged.

    Raises:
        UserError: A package is not installed.
    """
    trackers: list[Tracker] = []
    if not processes.is_first():
        return trackers
    if report["tensorboard"]:
        folder = workdir / "tensorboard"
        trackers.append(TensorBoard(folder, first_step=first_step))
    if report["wandb"]:
        trackers.append(WeightsAndBiases(report, workdir, config()))
    return trackers
