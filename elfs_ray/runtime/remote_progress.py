"""Show the progress of remote workers, which write it to an actor beside the driver."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.threads import Actor


class _Board:
    """An actor on the driver's node that holds the progress of remote workers."""

    def __init__(self) -> None:
        self._state: tuple[int, str] = (0, "")

    def write(self, done: int, note: str) -> None:
        # An empty note keeps the last one: the driver reads twice a second and would miss a note that was replaced.
        self._state = (done, note or self._state[1])

    def read(self) -> tuple[int, str]:
        return self._state


class _Line:
    """Show the progress of a worker in this process at once, where a board would be read twice a second."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, done: int, note: str) -> None:
        self._progress.update(done, note)


@contextlib.contextmanager
def remote_progress(progress: Progress) -> Iterator[Any]:
    """Show the progress of remote workers: yield an actor on which they call `write.remote(done, note)`.

    The actor is read twice a second. Without Ray, workers of this process show theirs at once.
    """
    if not ray.is_initialized():
        yield Actor(_Line(progress))
        return
    # On the driver's node: with an actor on a worker's node, losing that node would fail the stage.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            # A progress line that is not shown must not fail a stage.
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
