"""Checkpoints of a worker group on Ray Train (V2): reported as epochs end, as often as is cheap, and loaded again.

Ray Train's list of checkpoints may be broken or lost (worker_group.py): then the newest that is whole is taken.
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
MAX_REPORT_SHARE = 0.03  # of the time
MAX_UNREPORTED_S = 60.0


class CheckpointReporter:
    """Reports epochs of a worker group, each with a checkpoint: so many that 3% of the time goes there at most.

    A report writes the checkpoint, and soon after another waits until Ray Train has looked. Most epochs take far longer
    and are all reported; those of a small pool, or on a GPU, may not. What was not reported is done again after a loss:
    an epoch, or what began in the last minute.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._cost_s, self._ended_s = 0.0, time.monotonic()

    def end_epoch(self, metrics: dict[str, Any], make_state: Callable[[], dict[str, Any]], *, is_last: bool) -> None:
        """Report the epoch that has ended, where it is due or the last; all workers must call it together.

        `make_state` is called on rank 0 alone, and only for a report; it returns plain data and tensors, which
        load_checkpoint then returns.
        """
        if not (self._is_due() or is_last):
            return
        start_s = time.monotonic()
        if self._member.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                torch.save(make_state(), os.path.join(folder, STATE_FILE))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            ray.train.report(metrics)
        self._ended_s = time.monotonic()
        self._cost_s = self._ended_s - start_s

    def _is_due(self) -> bool:
        """Return whether to report; rank 0's clock decides for all workers."""
        trained_s = time.monotonic() - self._ended_s
        due = self._cost_s <= MAX_REPORT_SHARE * (trained_s + self._cost_s) or trained_s >= MAX_UNREPORTED_S
        if self._member.world_size == 1:
            return due
        of_rank_0 = torch.tensor([due], dtype=torch.uint8, device=self._member.device)
        distributed.broadcast(of_rank_0, src=0)
        return bool(of_rank_0.item())


def load_checkpoint(folder: str) -> dict[str, Any] | None:
    """Return the state in the last checkpoint that is whole, plain data alone, on the CPU; None where there is none.

    It must be called in a worker; all workers of a group get the same. `folder` holds the checkpoints, among them those
    that Ray Train has forgotten.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as local:
            state = _load_plain(Path(local, STATE_FILE).read_bytes)
            if state is not None:
                return state
    for name in sorted((info.base_name for info in filesystem.list_dirs(folder)), reverse=True):
        path = filesystem.join(folder, name, STATE_FILE)
        if filesystem.exists(path) and (state := _load_plain(partial(filesystem.read_bytes, path))) is not None:
            return state
    return None


def _load_plain(read: Callable[[], bytes]) -> dict[str, Any] | None:
    """Load plain data that torch.save wrote; None for half a file, on which torch fails in many ways."""
    data = io.BytesIO(read())
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception:
        return None
