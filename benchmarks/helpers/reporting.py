"""Report measurements as lines of JSON, time contestants in turns, and measure the memory of processes."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def emit(
    name: str, value: float, unit: str, reference: str, reference_value: float, *, less_is_better: bool = False
) -> None:
    """Print one line of JSON, whose ratio is above 1 where ours is better."""
    ratio = reference_value / value if less_is_better else value / reference_value
    line = {"name": name, "value": value, "unit": unit, "reference": reference, "reference_value": reference_value}
    rounded = {key: float(f"{item:.4g}") if isinstance(item, float) else item for key, item in line.items()}
    print(json.dumps({**rounded, "ratio": float(f"{ratio:.4g}")}), flush=True)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each contestant. Each is called once a round, after a round to warm up."""
    # In turns, because a machine slows down and recovers in the course of minutes: that must affect all of them alike.
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start_s = clock()
            call()
            if turn > 0:
                seconds[name].append(clock() - start_s)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(pid: int | str = "self") -> int:
    """Return the largest resident memory that a process has had."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def processes_titled(title: str) -> list[int]:
    """Return the processes whose command line begins with `title`: Ray's workers have that of their actor or task."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(title.encode()):
                pids.append(int(folder.name))
        except OSError:  # the process has ended
            continue
    return pids
