"""Run a group of data-parallel workers, go on from the last checkpoint after a failure, or give up.

Ray Train (V2) runs the group (ray_train.py). A run without Ray has a group of one, which is this process: to start Ray
Train takes longer than the training of a small pool. Both write the same bytes.

Some errors a retry would meet again: a loss that is not finite, a damaged input. They end the group at once. A Parquet
file that cannot be read is not among them: the read may have been cut short, and the next one may succeed. A file that
is really damaged ends the group when its retries are used up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
import torch

from elfs_ray.runtime.progress import say
from elfs_ray.runtime.resources import GIB, Request
from elfs_ray.storage import filesystem

FINAL_ERRORS = (FloatingPointError, ValueError)  # a diverged loss, a damaged input: the same in every try
FAILURE_FILE = "failure.txt"


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of a group, and the folder of its checkpoints: `folder`/`name`.

    A request for a range of workers makes the group elastic. With max_failures=-1 it never gives up.
    """

    folder: str
    name: str
    request: Request
    max_failures: int

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources of each worker by Ray's names."""
        request = self.request
        memory = {"memory": int(request.memory_gib * GIB)} if request.memory_gib else {}
        return {"CPU": request.cpus, **({"GPU": request.gpus} if request.gpus else {}), **memory}

    @property
    def failure_file(self) -> str:
        """Return the path of the file that holds the message of a final error."""
        return filesystem.join(self.folder, FAILURE_FILE)

    @property
    def checkpoints(self) -> str:
        """Return the folder of the group's checkpoints."""
        return filesystem.join(self.folder, self.name)


class Job(Protocol):
    """The inputs of every worker; `data` refers to what is in the object store, or without Ray is that itself."""

    @property
    def data(self) -> list[Any]: ...


def run_workers(group: WorkerGroup, worker: Callable[[Any], None], make_job: Callable[[], Job]) -> None:
    """Call `worker(make_job())` in every worker of a group until it has returned in all of them.

    make_job: called again when the group has left its nodes, or a node was lost with what `data` refers to.

    Raises RuntimeError with the worker's message after a final error or too many failures.
    """
    if not ray.is_initialized():
        _run_here(group, worker, make_job)
        return
    # Late: the import takes two seconds.
    from elfs_ray.stages.training.ray_train import run_on_ray_train

    run_on_ray_train(group, worker, make_job)


def is_final(error: Exception) -> bool:
    """Return whether a retry would meet the error again."""
    return isinstance(error, FINAL_ERRORS) and not isinstance(error, pa.ArrowException)  # some of which are ValueErrors


def gave_up(group: WorkerGroup, cause: str) -> RuntimeError:
    """Return the error of a group that has used up its retries."""
    return RuntimeError(f"training gave up after {group.max_failures} retries: {cause}")


def _run_here(group: WorkerGroup, worker: Callable[[Any], None], make_job: Callable[[], Job]) -> None:
    """Run a group of one worker in this process, with as many threads as the worker would have CPUs."""
    job, failures = make_job(), 0
    threads_before = torch.get_num_threads()
    torch.set_num_threads(group.request.cpus)
    try:
        while True:
            try:
                # The caller of a library expects torch's generator as it was.
                with torch.random.fork_rng(devices=[]):
                    worker(job)
                return
            except Exception as error:
                if is_final(error):
                    raise RuntimeError(f"training stopped: {error}") from error
                if failures == group.max_failures:
                    raise gave_up(group, str(error)) from error
                failures += 1
                say(f"training goes on from its last checkpoint after {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads_before)
