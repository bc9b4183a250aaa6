"""Log the epochs of training and pretraining: progress, metrics on disk and for Prometheus, checkpoints."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from elfs_ray.runtime.metrics import report_epoch
from elfs_ray.runtime.tasks import get_result
from elfs_ray.stages.stage import Stage
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR, CheckpointReporter, load_checkpoint
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.notice import LeftOnNotice, Notice
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

HISTORY_DIR = "history"
NEXT_STEP = "next_step"  # in a checkpoint within an epoch
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
        self._folder = run_dir.path(stage.name, CHECKPOINTS_DIR)
        self._checkpoints, self._notice = CheckpointReporter(self._folder, member), Notice(member)
        self._shown_s = 0.0

    def epochs_left(self, load_state: Callable[[dict[str, Any]], None]) -> Iterator[tuple[int, int]]:
        """Load the last checkpoint, if there is one; yield each epoch that is left to train, with its first step."""
        state = load_checkpoint(self._folder, self._member)
        first_epoch, first_step = 0, 0
        if state is not None:
            load_state(state)
            first_epoch, first_step = state["next_epoch"], state.get(NEXT_STEP, 0)
        for epoch in range(first_epoch, self._num_epochs):
            yield epoch, first_step
            first_step = 0

    def end_step(self, epoch: int, num_seen: int) -> None:
        """Show the progress within an epoch: `num_seen` samples."""
        # A small pool takes hundreds of steps a second, more than the board need hear of.
        if self._member.rank == 0 and time.monotonic() - self._shown_s > REPORT_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._board.write.remote(epoch * self._num_samples + min(num_seen, self._num_samples), "")

    def must_leave(self) -> bool:
        """Return True if the group must call `leave` now; every worker must ask after every step."""
        return self._notice.is_here()

    def leave(
        self, epoch: int, next_step: int, make_state: Callable[[], dict[str, Any]], part: dict[str, Any] | None = None
    ) -> NoReturn:
        """Save a checkpoint before step `next_step` of an epoch, with each worker's part; raise LeftOnNotice."""
        self._checkpoints.save_within_epoch(
            {"epoch": epoch}, lambda: {"next_epoch": epoch, NEXT_STEP: next_step, **make_state()}, part or {}
        )
        raise LeftOnNotice

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
            get_result(self._board.write.remote(next_epoch * self._num_samples, line))


def read_metrics(run_dir: RunDir, stage: str, epoch: int) -> dict[str, Any]:
    """Return the metrics of an epoch."""
    return json.loads(filesystem.read_bytes(_history_file(run_dir, stage, epoch)))


def _history_file(run_dir: RunDir, stage: str, epoch: int) -> str:
    return run_dir.path(stage, HISTORY_DIR, f"{schema.epoch_dir(epoch)}.json")
