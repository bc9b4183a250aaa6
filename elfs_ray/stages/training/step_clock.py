"""Measure the time that an epoch spends waiting for data and recording."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

_EVENTS_EVERY = 16
T = TypeVar("T")


class StepClock:
    """Measures one epoch, which begins when the clock is made, or the rest of one after its first `earlier_s`."""

    def __init__(self, device: torch.device, earlier_s: float = 0.0) -> None:
        self._device, self._earlier_s = device, earlier_s
        self._start_s = time.perf_counter()
        self._waiting_s = self._recording_s = 0.0
        self._num_batches = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def next_step(self, steps: Iterator[T]) -> T:
        """Return the reader's next step."""
        start_s = time.perf_counter()
        step = next(steps)
        self._waiting_s += time.perf_counter() - start_s
        return step

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Time the recording of one batch."""
        self._num_batches += 1
        if self._device.type == "cpu":
            start_s = time.perf_counter()
            yield
            self._recording_s += time.perf_counter() - start_s
        # The host only queues the recording of a batch on the GPU. CUDA events measure it there; reading an event
        # waits for the GPU, so `finish` does that once. Timing every 16th batch keeps the events few.
        elif self._num_batches % _EVENTS_EVERY == 1:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            yield

    @property
    def seconds(self) -> float:
        """Return the seconds of the epoch so far."""
        return self._earlier_s + time.perf_counter() - self._start_s

    def finish(self) -> dict[str, float]:
        """Return the seconds of the epoch and the shares of the time spent waiting for data and recording."""
        if self._events:
            torch.cuda.synchronize(self._device)
            timed_s = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._recording_s = timed_s / len(self._events) * self._num_batches
        seconds = time.perf_counter() - self._start_s
        return {
            "seconds": self._earlier_s + seconds,
            "data_wait_share": self._waiting_s / seconds,
            "recorder_share": self._recording_s / seconds,
        }
