"""Time by stage, for reports."""

import time


class Clock:
    """Milliseconds spent in each stage, summed over its laps.

    Example:
        >>> clock = Clock()
        >>> clock.lap("solve")
        >>> list(clock.milliseconds)
        ['solve']
    """

    def __init__(self):
        self.milliseconds: dict[str, float] = {}
        self._last = time.perf_counter()

    @property
    def report(self) -> dict:
        """What reports say: milliseconds by stage, and seconds in all."""
        return {"milliseconds": self.milliseconds, "seconds": sum(self.milliseconds.values()) / 1000}

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap towards `stage`."""
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (now - self._last)
        self._last = now
