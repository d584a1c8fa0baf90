"""Time by stage, for reports."""

import time
from collections.abc import Mapping


class Clock:
    """Milliseconds spent in each stage, summed over its laps.

    Args:
        earlier: milliseconds by stage that were spent before; None is nothing.

    Example:
        >>> clock = Clock()
        >>> clock.lap("solve")
        >>> list(clock.milliseconds)
        ['solve']
    """

    def __init__(self, earlier: Mapping[str, float] | None = None):
        self.milliseconds: dict[str, float] = dict(earlier or {})
        self._last = time.perf_counter()

    @property
    def report(self) -> dict:
        """What reports say: milliseconds by stage, and seconds in all."""
        return {"milliseconds": self.milliseconds, "seconds": sum(self.milliseconds.values()) / 1000}

    def skip(self) -> None:
        """Counts the time since the last lap towards nothing."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap towards `stage`."""
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (now - self._last)
        self._last = now
