"""Measure what the workers of a stage spend their time on."""

import time
from collections.abc import Mapping

WAIT, READ, COPY, RESIZE, ENCODE, WRITE = (
    "waiting",
    "reading and decoding",
    "copying",
    "resizing",
    "encoding",
    "writing",
)


class Clock:
    """A stopwatch: each lap gives the time since the last one to an activity. `seconds`: activity to seconds so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, activity: str) -> None:
        now_s = time.perf_counter()
        self.add({activity: now_s - self._last_s})
        self._last_s = now_s

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another clock has measured."""
        for activity, spent_s in seconds.items():
            self.seconds[activity] = self.seconds.get(activity, 0.0) + spent_s

    def take(self) -> dict[str, float]:
        """Return `seconds`, and start again from nothing."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def skip(self) -> None:
        """Give the time since the last lap to nothing."""
        self._last_s = time.perf_counter()


def describe_shares(seconds: Mapping[str, float]) -> str:
    """Return text such as "81% encoding, 16% reading and decoding, 3% writing", without what rounds to 0%."""
    total = sum(seconds.values())
    largest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.0%} {name}" for name, spent in largest_first if (share := spent / total) >= 0.005)
