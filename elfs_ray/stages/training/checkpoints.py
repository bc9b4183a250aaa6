"""Save and load the checkpoints of a worker group on Ray Train (V2).

If Ray Train's list of checkpoints is broken or lost (worker_group.py), the newest intact checkpoint is loaded.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import distributed

from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.storage import filesystem

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.pt"
# A report waits until Ray Train's controller has polled. In a small pool, whose epochs take a fraction of a second,
# that would be most of the run; at 3% it is not felt, and a loss still costs little.
MAX_REPORT_SHARE = 0.03
MAX_UNREPORTED_S = 60.0


class CheckpointReporter:
    """Reports the epochs of a worker group with their checkpoints, spending at most 3% of the time on it.

    Most epochs take far longer than a report and are all reported; short ones, of a small pool or on a GPU, may be
    skipped. After a lost worker, training repeats the unreported epochs: one epoch, or those of the last minute.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._cost_s, self._ended_s = 0.0, time.monotonic()

    def end_epoch(self, metrics: dict[str, Any], make_state: Callable[[], dict[str, Any]], *, is_last: bool) -> None:
        """Report the epoch if a report is due or if it is the last one. All workers must call this together.

        `make_state` returns the content of the checkpoint, plain data and tensors; it is called on rank 0 only, and
        only for a report.
        """
        if not (self._is_due() or is_last):
            return
        start_s = time.monotonic()
        if self._member.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                torch.save(make_state(), os.path.join(folder, STATE_FILE))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            ray.train.report(metrics)  # every rank must report: Ray Train waits for all of them
        self._ended_s = time.monotonic()
        self._cost_s = self._ended_s - start_s

    def _is_due(self) -> bool:
        """Return True if this epoch must be reported."""
        trained_s = time.monotonic() - self._ended_s
        due = self._cost_s <= MAX_REPORT_SHARE * (trained_s + self._cost_s) or trained_s >= MAX_UNREPORTED_S
        if self._member.world_size == 1:
            return due
        # Clocks differ between workers, and a report in which not all take part never ends: rank 0 decides for all.
        decision = torch.tensor([due], dtype=torch.uint8, device=self._member.device)
        distributed.broadcast(decision, src=0)
        return bool(decision.item())


def load_checkpoint(folder: str) -> dict[str, Any] | None:
    """Return the state in the newest intact checkpoint, with its tensors on the CPU; None if there is none.

    Must be called in a worker; all workers of a group get the same state. `folder` holds the group's checkpoints,
    including those that Ray Train no longer lists.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as local:
            state = _load_plain(Path(local, STATE_FILE).read_bytes)
            if state is not None:
                return state
    # Ray Train names the folders of checkpoints by time, so the last name is the newest.
    for name in sorted((info.base_name for info in filesystem.list_dirs(folder)), reverse=True):
        path = filesystem.join(folder, name, STATE_FILE)
        if filesystem.exists(path) and (state := _load_plain(partial(filesystem.read_bytes, path))) is not None:
            return state
    return None


def _load_plain(read: Callable[[], bytes]) -> dict[str, Any] | None:
    """Return the plain data that torch.save wrote, or None for a truncated file."""
    data = io.BytesIO(read())
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception:  # which one torch raises depends on where the file ends
        return None
