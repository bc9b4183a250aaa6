"""Do in this process what Ray's tasks and actors do: a small pool on one machine is done before they have started.

runtime/tasks.py calls this where no Ray is connected.
"""

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from types import SimpleNamespace
from typing import Any

from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def like_workers() -> Iterator[None]:
    """Let tasks of this process compute with one thread each and without showing warnings, as Ray's workers do.

    With another number of threads, sums would round differently.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_num_threads(before)


def run_in_threads(
    function: Callable[..., Any], arguments: Iterable[tuple], num_threads: int
) -> Iterator[tuple[int, Any]]:
    """Yield (position, result) of `function(*arguments)` as each ends, as `cluster.run_tasks` does.

    If one raises an exception, those that have begun end first. If the caller is interrupted, so are they: a training
    may take minutes.
    """
    running: dict[Future, int] = {}
    busy: set[int] = set()  # threads by their ids

    def call(*arguments: Any) -> Any:
        busy.add(threading.get_ident())
        try:
            return function(*arguments)
        finally:
            busy.remove(threading.get_ident())

    # OpenMP counts its threads in each thread apart.
    with ThreadPoolExecutor(num_threads, initializer=partial(threadpool_limits, 1)) as threads:
        try:
            for position, each in enumerate(arguments):
                # One runs and one waits for each thread, so that none is idle while the caller handles a result.
                if len(running) >= 2 * num_threads:
                    yield _next_result(running)
                running[threads.submit(call, *each)] = position
            while running:
                yield _next_result(running)
        except KeyboardInterrupt:
            for thread in list(busy):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
            raise
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _next_result(running: dict[Future, int]) -> tuple[int, Any]:
    done = min(wait(running, return_when=FIRST_COMPLETED).done, key=running.__getitem__)
    return running.pop(done), done.result()


class Actor:
    """An object that is called as a Ray actor is: `actor.method.remote(...)` returns what the method returns.

    It does one call at a time, whichever threads call it.
    """

    def __init__(self, instance: Any) -> None:
        self._instance, self._lock = instance, threading.Lock()

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = getattr(self._instance, name)

        def call(*arguments: Any) -> Any:
            with self._lock:
                return method(*arguments)

        return SimpleNamespace(remote=call)
