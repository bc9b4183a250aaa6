"""Run a group of workers on Ray Train (V2), restart it after a failure, or give up.

If a worker dies or fails, Ray Train restarts the whole group, which resumes from the last checkpoint. If a machine is
about to be taken away, the group saves and leaves (notice.py), and is started again here: a worker that only returned
would end training, and one that failed would use up a retry. Ray Train retries after every exception and knows no final
one. So a worker that meets an error which a retry would meet again writes its message to a file, and the restarted
group returns without working.

What the workers read is in the object store, on one node at first. If that node dies before the others have a copy, the
workers return and it is loaded again (shared_data.py).
"""

import json
import os
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.progress import say
from elfs_ray.runtime.tasks import call_interruptibly
from elfs_ray.stages.training.checkpoints import SNAPSHOT_FILE
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.notice import LeftOnNotice
from elfs_ray.stages.training.shared_data import hold
from elfs_ray.stages.training.worker_group import Job, WorkerGroup, gave_up, is_final
from elfs_ray.storage import filesystem

# What workers return if the group must start again with another job: they have saved and left their nodes, or a node
# was lost with what they read.
LEFT, LOST = "left", "lost"
REASONS = {
    LEFT: "the workers have saved and left, as a node is about to be taken away; they go on when there is room",
    LOST: "a node was lost with what the workers read; it is loaded again, and they go on from their last checkpoint",
}
RESIZE_INTERVAL_S = 60.0  # an elastic group loses the epoch in progress when it resizes
# A report blocks until the controller has polled for the one before it, by default every 2 s: longer than an epoch of a
# small pool. A value from the user's environment is kept.
POLL_VARIABLE, POLL_INTERVAL_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", 0.2
# Ray Train looks for notices every 5 s by default, and some clouds give 30 s or less.
NOTICE_VARIABLE, NOTICE_INTERVAL_S = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", 1.0


def run_on_ray_train(group: WorkerGroup, worker: Callable[[Any], None], make_job: Callable[[], Job]) -> None:
    """Do what `run_workers` of worker_group.py says."""
    os.environ.setdefault(POLL_VARIABLE, str(POLL_INTERVAL_S))
    os.environ.setdefault(NOTICE_VARIABLE, str(NOTICE_INTERVAL_S))
    # A message of an earlier run would end this one before it has tried.
    filesystem.delete(group.failure_file)
    _drop_broken_snapshot(group.checkpoints)
    try:
        while reason := call_interruptibly(_make_trainer(group, worker, make_job()).fit).return_value:
            say(REASONS[reason])
    except ray.train.WorkerGroupError as error:
        if not filesystem.exists(group.failure_file):
            cause = "; ".join(dict.fromkeys(str(cause) for cause in error.worker_failures.values()))
            raise gave_up(group, cause) from error
    if filesystem.exists(group.failure_file):
        raise RuntimeError(f"training stopped: {filesystem.read_bytes(group.failure_file).decode()}")


def _make_trainer(group: WorkerGroup, worker: Callable[[Any], None], job: Any) -> TorchTrainer:
    """Return Ray Train's trainer of a group, which resumes from the last checkpoint in the group's folder."""
    fewest, most = group.request.fewest, group.request.most
    # Without types, because type checkers see Ray Train V1, whose workers return nothing and whose ScalingConfig has no
    # ranges.
    work: Any = _work
    scaling: dict[str, Any] = {
        "num_workers": fewest if fewest == most else (fewest, most),
        "elastic_resize_monitor_interval_s": RESIZE_INTERVAL_S,
    }
    store, path = filesystem.resolve(group.folder)
    return TorchTrainer(
        work,
        train_loop_config={"group": group, "worker": worker, "job": job},
        torch_config=TorchConfig(backend="nccl" if group.request.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            use_gpu=bool(group.request.gpus),
            resources_per_worker=group.resources,
            **placement(),
            **scaling,
        ),
        run_config=ray.train.RunConfig(
            name=group.name,
            storage_path=path,
            storage_filesystem=store,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),  # only the last is ever loaded
            failure_config=ray.train.FailureConfig(max_failures=group.max_failures),
        ),
    )


def _drop_broken_snapshot(folder: str) -> None:
    """Delete Ray Train's list of checkpoints if it is unreadable or names checkpoints that do not exist.

    Ray Train rewrites the list in place, so a kill or a full disk may leave half of it, and then every start fails.
    Without the list, workers load the newest intact checkpoint (checkpoints.py).
    """
    path = filesystem.join(folder, SNAPSHOT_FILE)
    try:
        listed = json.loads(filesystem.read_bytes(path))["checkpoint_results"]
        names = [result["checkpoint_dir_name"] for result in listed]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        names = [""]
    if not all(name and filesystem.exists(filesystem.join(folder, name)) for name in names):
        filesystem.delete(path)


def _work(loop_config: dict[str, Any]) -> str | None:
    """Run one worker; return at once if an earlier group met a final error.

    Returns LEFT or LOST if the group must go on with another job.
    """
    group: WorkerGroup = loop_config["group"]
    if filesystem.exists(group.failure_file):
        return None
    try:
        torch.set_num_threads(group.request.cpus)
        job: Job = loop_config["job"]
        held = hold(job.data, GroupMember.current())
        if held is None:
            return LOST
        loop_config["worker"](job)
        return None
    except LeftOnNotice:
        return LEFT
    except Exception as error:
        if is_final(error):
            filesystem.write_bytes(group.failure_file, str(error).encode())
        raise
