"""Where the seconds of an attempt go."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Clock:
    """Seconds of this attempt, and what they went into.

    Attributes:
        compile_s: Tracing and compiling.
        train_s: Updates, without compiling and evaluation.
        wait_s: The part of `train_s` in which the device waited for data.
        updates: Updates made.
    """

    compile_s: float = 0.0
    train_s: float = 0.0
    wait_s: float = 0.0
    updates: int = 0

    def since(self, then: "Clock") -> dict[str, float]:
        """Returns the metrics of the updates since an earlier reading."""
        updates = max(self.updates - then.updates, 1)
        seconds = max(self.train_s - then.train_s, 1e-9)
        return {
            "time/step_s": seconds / updates,
            "time/data_wait": (self.wait_s - then.wait_s) / seconds,
        }
