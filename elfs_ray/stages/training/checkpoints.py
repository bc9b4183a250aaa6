"""Save and load the checkpoints of a worker group on Ray Train (V2), or of one that is this process.

If Ray Train's list of checkpoints is broken or lost (ray_train.py), the newest intact checkpoint is loaded. Either kind
of group goes on from a checkpoint of the other.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.storage import filesystem

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.pt"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints
NAME_FORMAT = "checkpoint_%Y-%m-%d_%H-%M-%S.%f"  # of Ray Train's folders, so that the last name is the newest
NUM_PARTS = "num_parts"
PARTS = "parts"
# A report waits until Ray Train's controller has polled. In a small pool, whose epochs take a fraction of a second,
# that would be most of the run; at 3% it is not felt, and a loss still costs little.
MAX_REPORT_SHARE = 0.03
MAX_UNREPORTED_S = 60.0


class CheckpointReporter:
    """Reports the epochs of a worker group with their checkpoints, spending at most 3% of the time on it.

    Most epochs take far longer than a report and are all reported; short ones, of a small pool or on a GPU, may be
    skipped. After a lost worker, training repeats the unreported epochs: one epoch, or those of the last minute.
    """

    def __init__(self, folder: str, member: GroupMember) -> None:
        self._folder, self._member = folder, member
        self._cost_s, self._ended_s = 0.0, time.monotonic()

    def end_epoch(self, metrics: dict[str, Any], make_state: Callable[[], dict[str, Any]], *, is_last: bool) -> None:
        """Report the epoch if a report is due or if it is the last one. All workers must call this together.

        is_last: the group trains no further epoch, as training ends or the group leaves. `make_state` returns the
        content of the checkpoint, plain data and tensors; it is called on rank 0 only, and only for a report.
        """
        if not (self._is_due() or is_last):
            return
        start_s = time.monotonic()
        self._report(metrics, {STATE_FILE: make_state()} if self._member.rank == 0 else {})
        self._ended_s = time.monotonic()
        self._cost_s = self._ended_s - start_s

    def save_within_epoch(
        self, metrics: dict[str, Any], make_state: Callable[[], dict[str, Any]], part: dict[str, Any]
    ) -> None:
        """Report a checkpoint at once. All workers must call this together; `make_state` is called on rank 0 only.

        part: what this worker alone knows, such as its records; plain data and tensors.
        """
        contents = {part_file(self._member.rank): part}
        if self._member.rank == 0:
            contents[STATE_FILE] = {NUM_PARTS: self._member.world_size, **make_state()}
        self._report(metrics, contents)

    def _report(self, metrics: dict[str, Any], contents: dict[str, Any]) -> None:
        """Report an epoch with the files of this worker; Ray Train puts those of all workers into one folder."""
        if not self._member.is_in_ray_train:
            _replace_checkpoint(self._folder, contents)
            return
        import ray.train

        if not contents:
            ray.train.report(metrics)  # every rank must report: Ray Train waits for all of them
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                torch.save(content, os.path.join(folder, name))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _is_due(self) -> bool:
        """Return True if this epoch must be reported."""
        trained_s = time.monotonic() - self._ended_s
        due = self._cost_s <= MAX_REPORT_SHARE * (trained_s + self._cost_s) or trained_s >= MAX_UNREPORTED_S
        # Clocks differ between workers, and a report in which not all take part never ends: rank 0 decides for all.
        return bool(self._member.from_rank_0(due))


def _replace_checkpoint(folder: str, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint as Ray Train does, and then delete the older ones."""
    name = datetime.now().strftime(NAME_FORMAT)
    for file, content in contents.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        filesystem.write_bytes(filesystem.join(folder, name, file), buffer.getvalue())
    # Ray Train would go on from the checkpoint that it has listed last.
    filesystem.delete(filesystem.join(folder, SNAPSHOT_FILE))
    for info in filesystem.list_dirs(folder):
        if info.base_name != name:
            filesystem.delete(filesystem.join(folder, info.base_name))


def part_file(rank: int) -> str:
    """Return the name of the file that holds what one worker alone knew when it saved within an epoch."""
    return f"part-{rank:05d}.pt"


def load_checkpoint(folder: str, member: GroupMember) -> dict[str, Any] | None:
    """Return the state in the newest intact checkpoint, with its tensors on the CPU; None if there is none.

    Must be called in a worker; all workers of a group get the same state, but for `parts`: the parts that were saved
    within an epoch are dealt out, each to one worker. `folder` holds the group's checkpoints, including those that Ray
    Train no longer lists.
    """
    if member.is_in_ray_train:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as local:
                state = _load(lambda name: Path(local, name).read_bytes(), member)
                if state is not None:
                    return state
    # Ray Train names the folders of checkpoints by time, so the last name is the newest.
    for name in sorted((info.base_name for info in filesystem.list_dirs(folder)), reverse=True):
        state = _load(partial(_read_from, filesystem.join(folder, name)), member)
        if state is not None:
            return state
    return None


def _read_from(folder: str, name: str) -> bytes:
    return filesystem.read_bytes(filesystem.join(folder, name))


def _load(read: Callable[[str], bytes], member: GroupMember) -> dict[str, Any] | None:
    """Return the state of a checkpoint, whose files `read` reads by their names; None if any of them is not intact."""
    state = _load_plain(read, STATE_FILE)
    if state is None:
        return None
    parts = []
    # Every worker reads all parts, so that all agree whether the checkpoint is intact.
    for number in range(state.get(NUM_PARTS, 0)):
        part = _load_plain(read, part_file(number))
        if part is None:
            return None
        if number % member.world_size == member.rank:  # an elastic group may have fewer workers than parts, or more
            parts.append(part)
    return {**state, PARTS: parts}


def _load_plain(read: Callable[[str], bytes], name: str) -> dict[str, Any] | None:
    """Return the plain data that torch.save wrote, or None for a file that is missing or truncated."""
    try:
        data = io.BytesIO(read(name))
    except FileNotFoundError:
        return None
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception:  # which one torch raises depends on where the file ends
        return None
