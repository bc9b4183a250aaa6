"""Run a group of data-parallel workers on Ray Train (V2): start it, restart it after a loss, and give up for good.

A worker that dies or fails is replaced with its whole group, which goes on from the last checkpoint. Ray Train starts a
group again after any exception and has none that it takes for final. So the first worker to meet an error that a retry
would meet again leaves its message in a file, and the group that is started again returns without work.

A Parquet file that cannot be read is no such error: a read may have been torn, and the next one is whole. One that is
damaged ends the group once its retries are used up.

Ray Train keeps in a file which checkpoints there are, and rewrites it in place: a kill or a full disk may leave half of
it. Such a file is dropped, and the workers take the newest checkpoint that is whole (checkpoints.py).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from elfs_ray.runtime.cluster import call_interruptibly
from elfs_ray.runtime.resources import GIB, Request
from elfs_ray.storage import filesystem

FINAL_ERRORS = (FloatingPointError, ValueError)
FAILURE_FILE = "failure.txt"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"  # Ray Train's
RESIZE_INTERVAL_S = 60.0  # between looks at whether an elastic group could have another size
# A worker may not report again before the controller has looked for its last report, by itself every 2 s. Set by the
# environment, it is left alone.
POLL_VARIABLE, POLL_INTERVAL_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", 0.2


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of a group, and the folder of its checkpoints: `folder`/`name`.

    A group that can begin with fewer workers than its most follows what the cluster has. With `max_failures` of -1 it
    never gives up.
    """

    folder: str
    name: str
    request: Request
    max_failures: int

    @property
    def resources(self) -> dict[str, float]:
        """Return what a worker holds, in Ray's names."""
        request = self.request
        memory = {"memory": int(request.memory_gib * GIB)} if request.memory_gib else {}
        return {"CPU": request.cpus, **({"GPU": request.gpus} if request.gpus else {}), **memory}

    @property
    def failure_file(self) -> str:
        """Return the path of the file with the message of a final error."""
        return filesystem.join(self.folder, FAILURE_FILE)

    @property
    def checkpoints(self) -> str:
        """Return the folder of its checkpoints."""
        return filesystem.join(self.folder, self.name)


def run_workers(group: WorkerGroup, worker: Callable[[Any], None], job: Any) -> None:
    """Call `worker(job)` in every worker of a group until it returns in all of them.

    Raises RuntimeError with the worker's message for a final error, and once there were more failures than allowed.
    """
    os.environ.setdefault(POLL_VARIABLE, str(POLL_INTERVAL_S))
    fewest, most = group.request.fewest, group.request.most
    scaling: dict[str, Any] = {  # a type checker sees the older ScalingConfig, which knows no ranges
        "num_workers": fewest if fewest == most else (fewest, most),
        "elastic_resize_monitor_interval_s": RESIZE_INTERVAL_S,
    }
    store, path = filesystem.resolve(group.folder)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"group": group, "worker": worker, "job": job},
        torch_config=TorchConfig(backend="nccl" if group.request.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            use_gpu=bool(group.request.gpus),
            resources_per_worker=group.resources,
            **scaling,
        ),
        run_config=ray.train.RunConfig(
            name=group.name,
            storage_path=path,
            storage_filesystem=store,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=group.max_failures),
        ),
    )
    filesystem.delete(group.failure_file)
    _drop_broken_snapshot(group.checkpoints)
    try:
        call_interruptibly(trainer.fit)
    except ray.train.WorkerGroupError as error:
        if not filesystem.exists(group.failure_file):
            cause = "; ".join(dict.fromkeys(str(cause) for cause in error.worker_failures.values()))
            raise RuntimeError(f"training gave up after {group.max_failures} retries: {cause}") from error
    if filesystem.exists(group.failure_file):
        raise RuntimeError(f"training stopped: {filesystem.read_bytes(group.failure_file).decode()}")


def _drop_broken_snapshot(folder: str) -> None:
    """Delete Ray Train's list of checkpoints where it cannot be read, or names checkpoints that are not there."""
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


def _work(loop_config: dict[str, Any]) -> None:
    """Run one worker; return at once where an earlier group met a final error."""
    group: WorkerGroup = loop_config["group"]
    if filesystem.exists(group.failure_file):
        return
    try:
        torch.set_num_threads(group.request.cpus)
        loop_config["worker"](loop_config["job"])
    except pa.ArrowException:  # some of which are ValueErrors
        raise
    except FINAL_ERRORS as error:
        filesystem.write_bytes(group.failure_file, str(error).encode())
        raise
