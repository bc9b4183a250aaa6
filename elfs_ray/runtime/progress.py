"""Show progress: in a terminal one line that is rewritten in place, in a log file a line every ten seconds."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

TERMINAL_INTERVAL_S = 0.2
LOG_INTERVAL_S = 10.0
_ERASE_LINE = "\r\x1b[2K"  # go to the start of the line and erase it

# Called with (name, unit, done, total, units a second, whether it is still running) whenever a line may be printed.
Listener = Callable[[str, str, int, int, float, bool], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener` for all progress from now on. Adding a listener twice has no effect."""
    if listener not in _listeners:
        _listeners.append(listener)


class Progress:
    """A progress line: work done and in all, percentage, rate and time left.

    done: work that an earlier run has done. It counts as done, but not in the rate.

    with Progress("embed", total=3925, unit="images") as progress:
        progress.advance(512)
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        self._name, self._total, self._unit = name, total, unit
        self._done = self._done_before = self._rated_from = done
        self._note = ""
        self._in_terminal = sys.stderr.isatty()
        self._start_s = self._printed_s = time.monotonic()
        self._rated_from_s: float | None = None
        self._printed: tuple[int, str] | None = None

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done; `note` is shown at the end of the line from now on."""
        self.update(self._done + amount, note)

    def update(self, done: int, note: str = "") -> None:
        """Set how much is done; `note` as in `advance`."""
        if self._rated_from_s is None and done > self._done:
            # The rate is measured from the first progress: before it, workers were starting, which would make the rate
            # too low and the time left too long.
            self._rated_from, self._rated_from_s = done, time.monotonic()
        self._done, self._note = done, note or self._note
        interval = TERMINAL_INTERVAL_S if self._in_terminal else LOG_INTERVAL_S
        if time.monotonic() - self._printed_s >= interval:
            self._print(end="" if self._in_terminal else "\n")
            self._tell(running=True)

    def __enter__(self) -> "Progress":
        self._tell(running=True)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In a log, the line of the end may have been printed by the last update.
        if error is None and (self._in_terminal or self._printed != (self._done, self._note)):
            self._print(end="\n")
        elif error is not None and self._in_terminal:
            # The message of the error must not be written behind the progress.
            _write("\n")
        self._tell(running=False)

    def _tell(self, running: bool) -> None:
        for listener in _listeners:
            listener(self._name, self._unit, self._done, self._total, self._rate(), running)

    def _rate(self) -> float:
        """Return units a second since the first progress, or over the whole time if all was done at once."""
        now_s = time.monotonic()
        if self._rated_from_s is not None and self._done > self._rated_from and now_s > self._rated_from_s:
            return (self._done - self._rated_from) / (now_s - self._rated_from_s)
        return (self._done - self._done_before) / max(now_s - self._start_s, 1e-9)

    def _print(self, end: str) -> None:
        self._printed_s = time.monotonic()
        self._printed = (self._done, self._note)
        rate = self._rate()
        share = self._done / self._total if self._total else 1.0
        line = f"{self._name:<9}{self._done:>11,}/{self._total:,} {self._unit} {share:>4.0%}"
        if self._done >= self._total:
            line += f"  {_format_rate(rate)}/s  in {format_duration(self._printed_s - self._start_s)}"
        elif rate > 0:
            line += f"  {_format_rate(rate)}/s  {format_duration((self._total - self._done) / rate)} left"
        else:
            line += f"  starting, {format_duration(self._printed_s - self._start_s)}"
        line += f"  {self._note}" if self._note else ""
        # The line is erased, as the new one may be shorter.
        _write(f"{_ERASE_LINE}{line}{end}" if self._in_terminal else f"{line}{end}")


def say(line: str) -> None:
    """Print one line to stderr, in a terminal in place of a line of progress. Results go to stdout."""
    _write(f"{_ERASE_LINE if sys.stderr.isatty() else ''}{line}\n")


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # Whoever read the log is gone, or its disk is full: no reason to end a run of hours.
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send what is written to a stream from now on nowhere, also what Python flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def format_duration(seconds: float) -> str:
    """Return a duration as 7.2 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """Return a number with its noun, as 1 image or 2,000 images; `nouns` is the plural if it needs more than an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
