"""Progress that a person can follow: one line that renews itself in a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

TERMINAL_INTERVAL_S = 0.2
LOG_INTERVAL_S = 10.0

# Called with (name, unit, done, total, rate, whether it goes on) whenever a line could be printed.
Listener = Callable[[str, str, int, int, float, bool], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Tell `listener` of all progress from now on; once, however often it is given."""
    if listener not in _listeners:
        _listeners.append(listener)


class Progress:
    """Counts what a stage has done; prints done/total, share, rate and time left.

    with Progress("embed", total=3925, unit="images") as progress:
        progress.advance(512)
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        self._name, self._total, self._unit = name, total, unit
        self._done = self._found_done = self._rated_from = done
        self._note = ""
        self._in_terminal = sys.stderr.isatty()
        self._start_s = self._printed_s = time.monotonic()
        self._rated_from_s: float | None = None
        self._printed: tuple[int, str] | None = None

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done; `note` is shown behind the figures from now on."""
        self.update(self._done + amount, note)

    def update(self, done: int, note: str = "") -> None:
        """Set how much is done."""
        if self._rated_from_s is None and done > self._done:
            # Rates count from the first progress on: what came before it was the start of workers.
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
        if error is None and (self._in_terminal or self._printed != (self._done, self._note)):
            self._print(end="\n")
        elif error is not None and self._in_terminal:
            sys.stderr.write("\n")
        self._tell(running=False)

    def _tell(self, running: bool) -> None:
        for listener in _listeners:
            listener(self._name, self._unit, self._done, self._total, self._rate(), running)

    def _rate(self) -> float:
        """Done a second since the first progress; over the whole time when all was done at once."""
        now_s = time.monotonic()
        if self._rated_from_s is not None and self._done > self._rated_from and now_s > self._rated_from_s:
            return (self._done - self._rated_from) / (now_s - self._rated_from_s)
        return (self._done - self._found_done) / max(now_s - self._start_s, 1e-9)

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
        sys.stderr.write(f"\r\x1b[2K{line}{end}" if self._in_terminal else f"{line}{end}")
        sys.stderr.flush()


def say(line: str) -> None:
    """Print one line for the person who watches."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """7.2 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """1 image, 2,000 images."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
