"""Log the epochs of training and pretraining: progress, metrics on disk and for Prometheus, checkpoints."""

import json
import time
from collections.abc import Callable
from typing import Any

import ray

from elfs_ray.runtime.metrics import report_epoch
from elfs_ray.stages.stage import Stage
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR, CheckpointReporter, load_checkpoint
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

HISTORY_DIR = "history"
REPORT_INTERVAL_S = 0.5


class EpochLog:
    """Logs the epochs of a stage; every worker of the group calls it, and rank 0 writes.

    `board` is an actor of `remote_progress` that counts images.
    """

    def __init__(
        self, stage: Stage, run_dir: RunDir, board: Any, member: GroupMember, *, num_samples: int, num_epochs: int
    ):
        self._stage, self._run_dir, self._board, self._member = stage, run_dir, board, member
        self._num_samples, self._num_epochs = num_samples, num_epochs
        self._checkpoints = CheckpointReporter(member)
        self._shown_s = 0.0

    def epochs_left(self, load_state: Callable[[dict[str, Any]], None]) -> range:
        """Load the last checkpoint, if there is one, and return the epochs that are left to train."""
        state = load_checkpoint(self._run_dir.path(self._stage.name, CHECKPOINTS_DIR))
        if state is None:
            return range(self._num_epochs)
        load_state(state)
        return range(state["next_epoch"], self._num_epochs)

    def end_step(self, epoch: int, num_seen: int) -> None:
        """Show the progress within an epoch: `num_seen` samples."""
        # A small pool takes hundreds of steps a second, more than the board need hear of.
        if self._member.rank == 0 and time.monotonic() - self._shown_s > REPORT_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._board.write.remote(epoch * self._num_samples + min(num_seen, self._num_samples), "")

    def end_epoch(self, metrics: dict[str, Any], note: str, make_state: Callable[[], dict[str, Any]]) -> None:
        """Write the metrics, report a checkpoint if one is due (checkpoints.py), then show the epoch.

        `note` is the stage's part of the line that is shown; `make_state` returns the content of the checkpoint.
        """
        epoch, is_rank_0 = metrics["epoch"], self._member.rank == 0
        next_epoch = epoch + 1
        # The metrics are written before the checkpoint: a run that resumes after this epoch does not write them again.
        if is_rank_0:
            filesystem.write_bytes(_history_file(self._run_dir, self._stage.name, epoch), json.dumps(metrics).encode())
            report_epoch(self._stage.name, self._stage.epoch_gauges, metrics)
        self._checkpoints.end_epoch(
            metrics,
            lambda: {"next_epoch": next_epoch, **make_state()},
            is_last=next_epoch == self._num_epochs,
        )
        if is_rank_0:
            line = (
                f"epoch {next_epoch}/{self._num_epochs}, loss {metrics['loss']:.3f}, {note}, "
                f"{metrics['images_per_s']:,.0f} images/s, {metrics['data_wait_share']:.0%} waiting for data"
            )
            # Waited for, unlike in `end_step`: after the last epoch the worker may exit before the message is sent.
            ray.get(self._board.write.remote(next_epoch * self._num_samples, line))


def read_metrics(run_dir: RunDir, stage: str, epoch: int) -> dict[str, Any]:
    """Return the metrics of an epoch."""
    return json.loads(filesystem.read_bytes(_history_file(run_dir, stage, epoch)))


def _history_file(run_dir: RunDir, stage: str, epoch: int) -> str:
    return run_dir.path(stage, HISTORY_DIR, f"{schema.epoch_dir(epoch)}.json")
