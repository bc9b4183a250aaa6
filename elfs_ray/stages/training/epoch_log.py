"""What training and pretraining tell of their epochs: progress, metrics on disk and for Prometheus, checkpoints."""

import json
import time
from collections.abc import Callable
from typing import Any

import ray
import torch

from elfs_ray.runtime.metrics import report_epoch
from elfs_ray.stages.training.checkpoints import CheckpointReporter
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

HISTORY_DIR = "history"
REPORT_INTERVAL_S = 0.5


class EpochLog:
    """Told of steps and epochs by every worker of a stage's group; rank 0 passes on what it is told.

    `board` is a remote_progress that counts images.
    """

    def __init__(
        self,
        stage: str,
        run_dir: RunDir,
        board: Any,
        num_samples: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ):
        self._stage, self._run_dir, self._board = stage, run_dir, board
        self._num_samples, self._rank = num_samples, rank
        self._checkpoints = CheckpointReporter(rank, world_size, device)
        self._shown_s = 0.0

    def end_step(self, epoch: int, num_seen: int) -> None:
        """Show how far the epoch is, in samples; often enough for a person."""
        if self._rank == 0 and time.monotonic() - self._shown_s > REPORT_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._board.write.remote(epoch * self._num_samples + min(num_seen, self._num_samples), "")

    def end_epoch(
        self,
        epoch: int,
        metrics: dict[str, Any],
        note: str,
        make_state: Callable[[int], dict[str, Any]],
        *,
        num_epochs: int,
        is_last: bool,
    ) -> None:
        """Keep the metrics, then a checkpoint where it is due (checkpoints.py), then show the note.

        `make_state` makes what is in it, given the epoch to go on with: `num_epochs` after the last.
        """
        next_epoch = num_epochs if is_last else epoch + 1
        if self._rank == 0:
            filesystem.write_bytes(_history_file(self._run_dir, self._stage, epoch), json.dumps(metrics).encode())
            report_epoch(self._stage, metrics)
        self._checkpoints.end_epoch(metrics, lambda: make_state(next_epoch), is_last=is_last)
        if self._rank == 0:
            ray.get(self._board.write.remote(next_epoch * self._num_samples, note))


def read_metrics(run_dir: RunDir, stage: str, epoch: int) -> dict[str, Any]:
    """The metrics of an epoch."""
    return json.loads(filesystem.read_bytes(_history_file(run_dir, stage, epoch)))


def _history_file(run_dir: RunDir, stage: str, epoch: int) -> str:
    return run_dir.path(stage, HISTORY_DIR, f"{schema.epoch_dir(epoch)}.json")
