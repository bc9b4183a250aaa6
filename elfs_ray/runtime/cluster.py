"""What every stage needs of Ray: a connection, the device to use, tasks run a few at a time."""

import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elfs_ray.config import ConfigError
from elfs_ray.runtime.progress import Progress, count

# Before a worker imports numpy or torch: one thread for each CPU that it was given, not one for each of the machine's.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Every step of a network on a CPU asks for its activations anew. In huge pages that is a fortieth of the page faults,
# and a seventh less time. A C library other than glibc ignores it.
_HUGE_PAGES = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
TASKS_PER_CPU = 2
OUT_OF_MEMORY_RETRIES = 7  # of a task, each after twice the time: two minutes; Ray by itself would try for ever


def connect(address: str | None, *, show_worker_logs: bool = False, **init_options: Any) -> None:
    """Connect to Ray, starting one on this machine where there is none; nothing happens when already connected.

    Ray's own messages below errors are left to its log files, so that progress can be read. `init_options` are further
    ones of ray.init.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(OUT_OF_MEMORY_RETRIES))
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        log_to_driver=show_worker_logs,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": _ONE_THREAD | _HUGE_PAGES},
        **init_options,
    )
    if threading.current_thread() is threading.main_thread():
        # Ray's core has put a handler of its own below Python's, which aborts; a job is stopped by this signal.
        signal.signal(signal.SIGTERM, on_sigterm if callable(on_sigterm) else signal.getsignal(signal.SIGTERM))


@dataclass(frozen=True)
class Devices:
    """What stages can run on now, and `where` that is, for people. `may_grow`: nodes may come while a stage waits."""

    num_cpus: int
    num_gpus: int
    where: str
    node_cpus: int
    node_memory_bytes: int | None = None
    may_grow: bool = False

    def resolve(self, device: str, key: str) -> str:
        """Turn auto, cpu or cuda into cpu or cuda. Raises ConfigError for a GPU where there can be none."""
        if device == "cuda" and not self.num_gpus and not self.may_grow:
            raise ConfigError(f"{key}=cuda, but there is no GPU {self.where}: add one, or set {key}=cpu")
        if device == "auto":
            return "cuda" if self.num_gpus else "cpu"
        return device

    def describe(self) -> str:
        """Return a line such as: 8 CPUs and 1 GPU that the Ray cluster has now."""
        return f"{count(self.num_cpus, 'CPU')} and {count(self.num_gpus, 'GPU')} {self.where}"


def find_devices(address: str | None) -> Devices:
    """The devices of the Ray cluster at `address` or RAY_ADDRESS; without either, or for "local", of this machine.

    Starts nothing. Raises ConfigError where no cluster answers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        return devices_of_cluster()
    if address == "local":
        import torch

        num_cpus = len(os.sched_getaffinity(0))
        return Devices(num_cpus, torch.cuda.device_count(), "of this machine", num_cpus)
    try:
        connect(address)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at ray_address={address}: {error}") from error
    return devices_of_cluster()


def devices_of_cluster() -> Devices:
    """Return the devices of the cluster that this process is connected to."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Ray has no public way to tell whether this process started the cluster, which then is this machine and stays so,
    # or joined one, which may have an autoscaler.
    driver: Any = ray._private.worker._global_node
    return Devices(
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        num_gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        where="that the Ray cluster has now",
        node_cpus=int(max(node.get("CPU", 0) for node in nodes)),
        node_memory_bytes=int(max(node.get("memory", 0) for node in nodes)),
        may_grow=not driver.is_head(),
    )


def num_cpus() -> int:
    """Return the CPUs that the cluster has now; at least 1, as a task that waits brings nodes where it can grow."""
    return max(1, devices_of_cluster().num_cpus)


def num_gpus() -> int:
    """Return the GPUs that the cluster has now; at least 1 where it may grow."""
    devices = devices_of_cluster()
    return devices.num_gpus or int(devices.may_grow)


def resolve_device(device: str, key: str) -> str:
    """`Devices.resolve` on what the cluster has now."""
    return devices_of_cluster().resolve(device, key)


def run_tasks(
    function: Callable[..., Any], arguments: Iterable[tuple], *, num_gpus_each: float = 0, num_cpus_each: float = 1
) -> Iterator[tuple[int, Any]]:
    """Run `function(*arguments)` as Ray tasks, a few for each CPU in flight; yield (position, result) as they end.

    Raises what the first failed task raised.
    """
    remote = ray.remote(num_cpus=num_cpus_each, num_gpus=num_gpus_each, max_retries=3)(function)
    in_flight: dict[ray.ObjectRef, int] = {}
    for position, argument in enumerate(arguments):
        # Counted anew each time: the tasks that wait make a cluster grow, and its new CPUs take more of them.
        if len(in_flight) >= TASKS_PER_CPU * num_cpus():
            yield _next_result(in_flight)
        in_flight[remote.remote(*argument)] = position
    while in_flight:
        yield _next_result(in_flight)


def _next_result(in_flight: dict[ray.ObjectRef, int]) -> tuple[int, Any]:
    (done,), _ = ray.wait(list(in_flight), num_returns=1)
    return in_flight.pop(done), get_result(done)


def get_result(reference: ray.ObjectRef) -> Any:
    """ray.get, but what a task raised as it was raised there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def call_interruptibly(function: Callable[[], Any]) -> Any:
    """Call `function` in a thread of its own and return or raise what it does, so that Ctrl-C reaches the caller.

    In the main thread, Ray Train would take the signal over and end the process without a word.
    """
    outcome: concurrent.futures.Future = concurrent.futures.Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome.result()


class _Board:
    """Holds how far remote workers are; an actor beside the driver."""

    def __init__(self) -> None:
        self._state: tuple[int, str] = (0, "")

    def write(self, done: int, note: str) -> None:
        # What was noted stays until there is something new: a reader that looks now and then misses none for good.
        self._state = (done, note or self._state[1])

    def read(self) -> tuple[int, str]:
        return self._state


@contextlib.contextmanager
def remote_progress(progress: Progress) -> Iterator[Any]:
    """Show what remote workers report: yields an actor with `write.remote(done, note)`, read twice a second."""
    # On the driver's node: one on a node that is lost would take the stage with it.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(ray.exceptions.RayError):
                progress.update(*ray.get(board.read.remote()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield board
        progress.update(*ray.get(board.read.remote()))
    finally:
        stop.set()
        watcher.join()
        ray.kill(board)
