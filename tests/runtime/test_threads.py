"""Tasks and actors without Ray: results as they end, few arguments at a time, errors as they were raised."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from elfs_ray.runtime.threads import Actor, like_workers, run_in_threads


def test_every_result_comes_with_its_position():
    results = dict(run_in_threads(lambda a, b: a * b, [(number, 3) for number in range(20)], 4))
    assert results == {number: 3 * number for number in range(20)}


def test_results_come_as_they_end():
    second_came = threading.Event()
    results = run_in_threads(lambda waits: not waits or second_came.wait(10), [(True,), (False,)], 2)
    assert next(results) == (1, True)
    second_came.set()
    assert next(results) == (0, True)


def test_arguments_are_taken_a_few_at_a_time():
    taken = []

    def arguments() -> Iterator[tuple[int]]:
        for number in range(100):
            taken.append(number)
            yield (number,)

    results = run_in_threads(lambda number: number, arguments(), 2)
    next(results)
    assert len(taken) <= 5
    assert len(list(results)) == 99


def test_an_error_is_raised_as_it_was_and_stops_what_has_not_begun():
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(f"image {number}")

    with pytest.raises(ValueError, match="image 0"):
        list(run_in_threads(fail, [(number,) for number in range(100)], 1))
    assert len(begun) <= 3


def test_an_interrupt_ends_what_has_begun_and_what_has_not():
    begun, ended_by = threading.Barrier(3), []

    def train(number: int) -> None:
        try:
            begun.wait(10)
            while True:
                time.sleep(0.01)
        except BaseException as error:
            ended_by.append((number, type(error)))
            raise

    def interrupt() -> None:
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    before = threading.active_count()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_in_threads(train, [(number,) for number in range(4)], 2))
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(ended_by) == [(0, KeyboardInterrupt), (1, KeyboardInterrupt)]


def test_an_object_is_called_as_an_actor():
    actor = Actor([3, 1, 2])
    assert actor.index.remote(2) == 2
    actor.sort.remote()
    assert actor.index.remote(2) == 1


def test_each_thread_computes_with_one_thread_and_the_limit_ends():
    """Libraries count threads in their own ways: torch for the process, OpenMP in each thread."""
    before = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()]
    torch_before = torch.get_num_threads()
    torch.set_num_threads(3)

    def threads_here(_: int) -> set[int]:
        np.ones((2, 2)) @ np.ones((2, 2))
        return {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())}

    try:
        with like_workers():
            assert [counts for _, counts in run_in_threads(threads_here, [(0,), (1,)], 2)] == [{1}, {1}]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(torch_before)
    assert [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()] == before


def test_an_actor_does_one_call_at_a_time():
    class Counter:
        inside = most = 0

        def call(self) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.01)
            self.inside -= 1

    counter = Counter()
    actor = Actor(counter)
    list(run_in_threads(lambda: actor.call.remote(), [()] * 8, 4))
    assert counter.most == 1
