"""Run functions and objects as Ray's tasks and actors, a few at a time; return results, errors and interruptions.

Where no Ray is connected (pipeline/connection.py decides), they are threads and objects of this process (threads.py).
"""

import concurrent.futures
import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elfs_ray.runtime.cluster import devices_of_cluster, num_cpus
from elfs_ray.runtime.placement import is_chosen, placement
from elfs_ray.runtime.threads import Actor, like_workers, run_in_threads

# One runs and one waits on each CPU, so that no CPU is idle while the driver handles a result.
TASKS_PER_CPU = 2


def task_settings() -> AbstractContextManager[None]:
    """Return the context in which to run tasks: without Ray, this process must compute as its workers would."""
    return contextlib.nullcontext() if ray.is_initialized() else like_workers()


def run_tasks(
    function: Callable[..., Any], arguments: Iterable[tuple], *, num_gpus_each: float = 0, num_cpus_each: float = 1
) -> Iterator[tuple[int, Any]]:
    """Run `function(*arguments)` as Ray tasks, a few at a time for each CPU; yield (position, result) as each ends.

    position: that of the arguments. Results come in the order in which tasks end. Raises the exception of the first
    task that fails.

    Memory: the references of the tasks in flight; results stay with Ray until they are yielded.
    """
    if not ray.is_initialized():
        yield from run_in_threads(function, arguments, max(1, int(num_cpus() // num_cpus_each)))
        return
    remote = _remote(function, num_gpus_each, num_cpus=num_cpus_each, max_retries=3, **placement())
    in_flight: dict[ray.ObjectRef, int] = {}
    for position, argument in enumerate(arguments):
        # The CPUs are counted anew each time: waiting tasks make a cluster grow, and new CPUs can take more tasks.
        if len(in_flight) >= TASKS_PER_CPU * num_cpus():
            yield _next_result(in_flight)
        in_flight[remote.remote(*argument)] = position
    while in_flight:
        yield _next_result(in_flight)


def _remote(function: Callable[..., Any], num_gpus: float, **options: Any) -> Any:
    """Return the function as a Ray task, whose worker takes further tasks on its GPU if there is no other one.

    By default Ray ends a worker after each task on a GPU, and the next one spends seconds on a process, its imports and
    CUDA, and compiles anew. A worker cannot change to another GPU, so where a node has several, or one that has may
    come, the default stays.
    """
    devices = devices_of_cluster()
    if num_gpus and devices.num_gpus == 1 and not devices.may_grow:
        return ray.remote(num_gpus=num_gpus, max_calls=0, **options)(_freeing_memory(function))
    return ray.remote(num_gpus=num_gpus, **options)(function)


def _freeing_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that also frees the GPU memory that torch would keep for later in an idle worker."""

    def call(*arguments: Any) -> Any:
        import torch

        try:
            return function(*arguments)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    call.__name__ = function.__name__  # Ray shows it
    return call


def _next_result(in_flight: dict[ray.ObjectRef, int]) -> tuple[int, Any]:
    (done,), _ = ray.wait(list(in_flight), num_returns=1)
    return in_flight.pop(done), get_result(done)


def start_task(function: Callable[..., Any], *arguments: Any, num_returns: int = 1, num_cpus: int = 1) -> Any:
    """Start a Ray task; return the reference of its result, or a list with one for each of its `num_returns` results.

    Without Ray, return what the function returns.
    """
    if not ray.is_initialized():
        return function(*arguments)
    remote: Any = ray.remote(num_cpus=num_cpus, max_retries=3, num_returns=num_returns, **placement())(function)
    return remote.remote(*arguments)


def start_actor(kind: type, *arguments: Any, **options: Any) -> Any:
    """Start a Ray actor that is started again if its node is lost; without Ray, return an object that is called alike.

    options: those of ray.remote.
    """
    if not ray.is_initialized():
        return Actor(kind(*arguments))
    remote: Any = ray.remote(**options, **placement(), max_restarts=-1, max_task_retries=-1)(kind)
    return remote.remote(*arguments)


def end_actor(actor: Any) -> None:
    """End an actor, to free its memory and devices."""
    if not isinstance(actor, Actor):
        ray.kill(actor)


def put(value: Any) -> Any:
    """Return what to give to tasks for a value that many of them take, so that it is sent to each machine once."""
    return ray.put(value) if ray.is_initialized() else value


def get_result(reference: Any) -> Any:
    """Return ray.get of a reference, but raise the exception of a failed task as the task raised it.

    ray.get itself raises a RayTaskError whose message is the whole remote traceback. What is no reference, as tasks
    return without Ray, is returned as it is.
    """
    if not isinstance(reference, ray.ObjectRef):
        return reference
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def call_interruptibly(function: Callable[[], Any]) -> Any:
    """Call `function` in another thread, so that Ctrl-C reaches the caller; return its result or raise its exception.

    In the main thread, Ray Train would handle the signal itself and end the process without a message.
    """
    outcome: concurrent.futures.Future = concurrent.futures.Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome.result()


def on_every_machine(function: Callable[[], Any]) -> list[Any]:
    """Return the results of a function on every machine for workers, or on this one where it is alone.

    These are the machines with CPUs that placement.py chooses.
    """
    if not devices_of_cluster().may_grow:
        return [function()]
    alive = [node for node in ray.nodes() if node["Alive"] and is_chosen(node["Labels"])]
    nodes = [node["NodeID"] for node in alive if node["Resources"].get("CPU", 0)]
    remote = ray.remote(num_cpus=0)(function)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    calls = [remote.options(scheduling_strategy=place).remote() for place in places]
    # A cluster that has no worker yet will have machines like this one, as far as anybody knows.
    return [get_result(call) for call in calls] or [function()]
