"""What the benchmarks share: a line of JSON for each measurement, contestants that take turns, peaks of memory."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def emit(
    name: str, value: float, unit: str, reference: str, reference_value: float, *, less_is_better: bool = False
) -> None:
    """One line of JSON; ratio > 1 where ours is better."""
    ratio = reference_value / value if less_is_better else value / reference_value
    line = {"name": name, "value": value, "unit": unit, "reference": reference, "reference_value": reference_value}
    rounded = {key: float(f"{item:.4g}") if isinstance(item, float) else item for key, item in line.items()}
    print(json.dumps({**rounded, "ratio": float(f"{ratio:.4g}")}), flush=True)


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, all of them called once a round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start_s = time.perf_counter()
            call()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(pid: int | str = "self") -> int:
    """The largest resident memory that a process has had."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def processes_titled(title: str) -> list[int]:
    """Processes whose command line begins so: Ray's workers bear the name of their actor or task."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
