"""Share what a worker group reads through the object store, and notice if a lost node takes it away.

Ray restores a lost object by repeating the tasks that made it. These need a CPU, and a group may hold all of them: its
workers would wait for ever. So what a group reads is never restored. The workers notice that it is lost, and leave, and
it is loaded again while no worker holds a CPU (ray_train.py).
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from elfs_ray.runtime.cluster import OUT_OF_MEMORY_RETRIES
from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.progress import say
from elfs_ray.runtime.tasks import get_result
from elfs_ray.stages.training.group_member import GroupMember

# What ends a task through no fault of its own.
ACCIDENTS = (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


def share(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the reference of `function(*arguments)`, which a task has computed and Ray will not restore.

    Without Ray, return what the function returns. Raises the exception of a task that failed, after retries if its node
    or its memory was lost.
    """

    if not ray.is_initialized():
        return function(*arguments)

    def compute(*values: Any) -> tuple[None, Any]:
        return None, function(*values)

    # Two returns: the first shows whether the task has succeeded, without a copy of the second.
    remote = ray.remote(num_cpus=1, num_returns=2, max_retries=0, **placement())(compute)
    retries = 0
    while True:
        done, result = remote.remote(*arguments)
        try:
            get_result(done)
            return result
        except ACCIDENTS as error:
            if retries == OUT_OF_MEMORY_RETRIES:
                raise
            say(f"what the workers read was lost while it was loaded, and is loaded again: {type(error).__name__}")
            time.sleep(1 << retries)
            retries += 1


def hold(references: list[ray.ObjectRef], member: GroupMember) -> list[Any] | None:
    """Return what the references refer to, once every worker has it; None on all workers if some cannot get it.

    Every worker must call this. As long as one keeps the result, its node keeps its copy.
    """
    try:
        held = ray.get(references)
    except ObjectLostError:
        held = None
    return held if not any(member.sum_over_workers(float(held is None))) else None
