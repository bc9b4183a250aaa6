"""Measure a block of work of this process and its descendants, such as Ray's workers: seconds, CPU seconds, memory."""

import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

_INTERVAL_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """A process: its title, which of Ray's workers is that of their task or actor, and what it has used so far.

    started: its start, by which processes that had the same number one after the other differ.
    """

    pid: int
    started: int
    title: str
    private_bytes: int
    shared_bytes: int
    cpu_s: float


class Watch:
    """Measure the seconds of a block, the CPU seconds of all processes, and their largest memory, read once a second.

    peak_bytes: of all together, with Ray's object store once; peaks: the private memory (without the object store,
    which all map) of the driver and of each kind of worker, by the name of its task or actor. A process that ends
    between two readings has up to a second more than is counted.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, 0
        self.peaks: dict[str, int] = defaultdict(int)
        self._cpu_s: dict[tuple[int, int], float] = {}
        self._before: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._before = {process[:2]: process.cpu_s for process in family()}
        self._thread.start()
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start_s
        self._stop.set()
        self._thread.join()
        self._read()

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU seconds so far."""
        return sum(taken - self._before.get(process, 0.0) for process, taken in list(self._cpu_s.items()))

    @property
    def largest_worker(self) -> tuple[str, int]:
        """Return the task or actor of the worker with the most memory, and its bytes."""
        workers = [(name, peak) for name, peak in self.peaks.items() if name != "driver"]
        return max(workers, key=lambda item: item[1], default=("", 0))

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._read()

    def _read(self) -> None:
        processes = family()
        for process in processes:
            self._cpu_s[process[:2]] = process.cpu_s
            name = "driver" if process.pid == os.getpid() else process.title.removeprefix("ray::")
            if process.pid == os.getpid() or process.title.startswith("ray::"):
                self.peaks[name] = max(self.peaks[name], process.private_bytes)
        self.peak_bytes = max(self.peak_bytes, memory_of(processes))


def memory_of(processes: list[Process]) -> int:
    """Return the private memory of some processes, and that of the object store."""
    # Every process maps the same object store: it counts once.
    return sum(process.private_bytes for process in processes) + max(process.shared_bytes for process in processes)


def family() -> list[Process]:
    """Return this process and its descendants."""
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            text = _read_text(folder / "stat")
            # The name, in brackets, may hold spaces and brackets itself.
            stats[int(folder.name)] = text.rpartition(")")[2].split() if text else []
    parents = {pid: int(fields[1]) for pid, fields in stats.items() if fields}
    members = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= children
    processes = (_process(pid, stats[pid]) for pid in members)
    return [process for process in processes if process is not None]


def _process(pid: int, stat: list[str]) -> Process | None:
    """Return a process from its line in /proc, None if it has ended."""
    folder = Path(f"/proc/{pid}")
    lines = (line.split(":", 1) for line in _read_text(folder / "status").splitlines())
    sizes = {name: int(value.split()[0]) * 1024 for name, value in lines if name.startswith(("Rss", "VmSwap"))}
    if not sizes:
        return None
    title = _read_text(folder / "cmdline").split("\0")[0]
    cpu_s = (int(stat[11]) + int(stat[12])) / _TICKS_PER_S
    private = sizes["RssAnon"] + sizes["VmSwap"]
    return Process(pid, int(stat[19]), title, private, sizes["RssShmem"], cpu_s)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""
