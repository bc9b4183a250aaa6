"""Strike a run of chaos.py: kill its processes or driver, remove a node, fill its disk, silence its store.

A strike returns what it hit, or None if there was no target at that moment.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray names a process after the class or task that it runs.
TRAIN_WORKER = re.compile(r"ray::.*TrainWorker")
ACTOR = re.compile(r"ray::(_Shard|_ListShard|MapWorker)")
TASK = re.compile(r"ray::(?!IDLE|.*(TrainWorker|TrainController|_Board|_Shard|_ListShard|MapWorker|StatsActor|Agent))")
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
DISK_FULL_S = 12.0  # at most: usually the driver ends sooner
STORE_SILENT_S = 15.0  # at most
EXIT_CODES = {"sigkill": -signal.SIGKILL, "ctrl-c": 130, "sigterm": 143}


@dataclass
class Rig:
    """The targets of strikes. None where the driver starts its own Ray, or writes to no small disk or no store."""

    driver: subprocess.Popen
    cluster: Any
    nodes: list[Any]
    disk: Path | None
    store: subprocess.Popen | None
    rng: random.Random

    def processes(self, title: re.Pattern[str]) -> list[int]:
        """Return Ray's worker processes whose title matches."""
        # Only descendants of this process: others on this machine may use Ray, too.
        return sorted(pid for pid, name in _descendants(os.getpid()) if title.match(name))


def kill_process(rig: Rig, title: re.Pattern[str]) -> str | None:
    """Kill a random worker process whose title matches."""
    pids = rig.processes(title)
    if not pids:
        return None
    pid = rig.rng.choice(pids)
    name = _title(pid)
    os.kill(pid, signal.SIGKILL)
    return name


def remove_node(rig: Rig) -> str | None:
    """Remove a node other than the head without warning, and add another one."""
    if rig.cluster is None:
        return None
    node = rig.nodes.pop(rig.rng.randrange(len(rig.nodes)))
    rig.cluster.remove_node(node, allow_graceful=False)
    rig.nodes.append(rig.cluster.add_node(wait=False, **NODE))
    return f"node {node.node_id[:8]}"


def stop_driver(rig: Rig, how: int) -> str | None:
    """Send a signal to the driver's whole process group, as a terminal does; SIGKILL to the driver alone."""
    if rig.driver.poll() is not None:
        return None
    if how == signal.SIGKILL:
        rig.driver.kill()
    else:
        os.killpg(rig.driver.pid, how)
    rig.driver.wait(timeout=60)
    return f"pid {rig.driver.pid}"


def fill_disk(rig: Rig) -> str | None:
    """Fill the disk to the last byte until the driver ends, at most for DISK_FULL_S."""
    if rig.disk is None:
        return None
    filler = rig.disk / "filler"
    try:
        with filler.open("wb", buffering=0) as sink:
            while sink.write(b"\0" * (64 << 10)):
                pass
    except OSError:
        pass
    num_bytes = filler.stat().st_size
    deadline = time.monotonic() + DISK_FULL_S
    while rig.driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        _top_up(filler)
    filler.unlink()
    return f"{num_bytes:,} bytes"


def silence_store(rig: Rig) -> str | None:
    """Stop the object store for some seconds: it accepts connections and does not answer."""
    if rig.store is None:
        return None
    seconds = round(rig.rng.uniform(3, STORE_SILENT_S), 1)
    os.kill(rig.store.pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(rig.store.pid, signal.SIGCONT)
    return f"{seconds} s"


def _top_up(filler: Path) -> None:
    """Fill the space that the run has freed by deleting files."""
    try:
        with filler.open("ab", buffering=0) as sink:
            while sink.write(b"\0" * 4096):
                pass
    except OSError:
        pass


STRIKES: dict[str, Callable[[Rig], str | None]] = {
    "worker": lambda rig: kill_process(rig, TASK),
    "actor": lambda rig: kill_process(rig, ACTOR),
    "train worker": lambda rig: kill_process(rig, TRAIN_WORKER),
    "node": remove_node,
    "sigkill": lambda rig: stop_driver(rig, signal.SIGKILL),
    "ctrl-c": lambda rig: stop_driver(rig, signal.SIGINT),
    "sigterm": lambda rig: stop_driver(rig, signal.SIGTERM),
    "full disk": fill_disk,
    "silent store": silence_store,
}
# The stages in which a kind of strike has a target; every stage for those not listed.
STAGES = {
    "worker": ("index", "cluster", "select"),
    "actor": ("embed", "cluster"),
    "train worker": ("train",),
}


def left_behind(session: int) -> list[str]:
    """Return the titles of processes that still run in a driver's session."""
    titles = []
    for pid, _, session_of_process, state in _processes():
        if session_of_process == session and state not in "ZX":  # zombie, dead
            titles.append(_title(pid))
    return titles


def _descendants(root: int) -> Iterator[tuple[int, str]]:
    """Yield (pid, title) of every descendant of a process."""
    parents = {pid: parent for pid, parent, _, _ in _processes()}
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and pid != root:
            yield pid, _title(pid)


def _processes() -> Iterator[tuple[int, int, int, str]]:
    """Yield (pid, parent, session, state) of every process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # A process's name is in parentheses and may contain spaces: the other fields follow it.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            yield int(folder.name), int(fields[1]), int(fields[3]), fields[0]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
