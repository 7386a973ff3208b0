"""Metrics of updates: read one call later, so that the device never waits, and logged."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import LatestUpdate
from finetune_jax.training.progress import Clock
from finetune_jax.training.step import NORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRecord:
    """One update and its metrics.

    Attributes:
        step: Step of the state after it.
        phase: Name of the phase.
        metrics: Metrics, with the norms by stage.
        rate: Learning rate.
        update: Number of the update whose examples it took.
        batch: Returns its arrays [k, b, ...] on the host, as the step takes them.
    """

    step: int
    phase: str
    metrics: Mapping[str, Any]
    rate: np.float32
    update: int
    batch: Callable[[], Mapping[str, np.ndarray]]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return all(math.isfinite(float(self.metrics[k])) for k in ("loss", "grad_norm"))

    def line(self) -> dict[str, Any]:
        """Returns the line of the metrics log."""
        found: dict[str, Any] = {"step": self.step, "phase": self.phase}
        for name, value in self.metrics.items():
            if name != NORMS:
                found[f"train/{name}"] = float(value)
        return found | {"train/learning_rate": float(self.rate)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallMetrics:
    """The updates of one call, whose metrics are still on the device.

    Attributes:
        step: Step of the state before them.
        updates: Number of updates.
        phase: Name of the phase.
        metrics: Metrics of each update, on the device; those of a single update have no
            axis for updates.
        rates: Learning rates.
        fixed: Number of the update whose examples all of them took; None if each took
            its own.
        batch: Returns the arrays of one of them on the host.
    """

    step: int
    updates: int
    phase: str
    metrics: Mapping[str, Any]
    rates: np.ndarray
    fixed: int | None
    batch: Callable[[int], Mapping[str, np.ndarray]]

    def read(self, every: int) -> Iterator[UpdateRecord]:
        """Yields the updates that are not finite, or whose step `every` divides."""
        metrics = jax.device_get(self.metrics)
        if not np.ndim(metrics["loss"]):
            metrics = jax.tree.map(lambda value: np.asarray(value)[None], metrics)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
        for index in range(self.updates):
            step = self.step + index + 1
            if finite[index] and step % every:
                continue
            yield UpdateRecord(
                step=step,
                phase=self.phase,
                metrics=jax.tree.map(lambda values, i=index: values[i], metrics),
                rate=self.rates[index],
                update=step - 1 if self.fixed is None else self.fixed,
                batch=functools.partial(self.batch, index),
            )

    def latest(self) -> LatestUpdate:
        """Returns loss and rate of the last update."""
        last = self.updates - 1
        loss = np.ravel(jax.device_get(self.metrics["loss"]))[last]
        return LatestUpdate(
            step=self.step + self.updates,
            loss=float(loss),
            rate=float(self.rates[last]),
        )


@dataclasses.dataclass(kw_only=True)
class UpdateLog:
    """Logs the metrics of each call when the next one runs.

    Attributes:
        log: Log of the metrics.
        every: Steps between two logged updates.
        clock: Clock of the run.
        refuse: Handles an update that is not finite; returns whether the state must be
            rolled back.
        latest: The latest update that was read; None before the first.
    """

    log: MetricsLog
    every: int
    clock: Clock
    refuse: Callable[[UpdateRecord], bool]
    latest: LatestUpdate | None = None
    _unread: CallMetrics | None = None
    _logged: Clock = dataclasses.field(default_factory=Clock)

    def add(self, call: CallMetrics) -> None:
        """Keeps the metrics of a call to be read later."""
        self._unread = call

    def read(self) -> bool:
        """Logs the call added last; returns whether the state must be rolled back.

        Raises:
            NotFinite: Loss or gradient is not finite, and the policy is to stop.
        """
        if self._unread is None:
            return False
        unread, self._unread = self._unread, None
        times = self.clock.since(self._logged)
        for record in unread.read(self.every):
            if record.is_finite:
                self.log.write(record.line() | times)
                self._logged = dataclasses.replace(self.clock)
            elif self.refuse(record):
                return True
        self.latest = unread.latest()
        return False
