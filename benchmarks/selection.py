"""Measure selection by rank from scores on disk vs. NumPy's argsort in memory and Ray Data's sort.

    python benchmarks/selection.py [--quick]

A tenth of the pool is kept after the hardest 40%. All read the same Parquet files and return the sample ids to keep:
ours from histograms, one file at a time in each of two workers, NumPy by a stable argsort of all scores, Ray Data by
its distributed sort. Memory is the peak of all processes, with Ray's object store, beyond their memory when idle. Not
called select.py, because a script's folder comes first on the path: that would hide Python's module of the same name.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from helpers.processes import family, memory_of
from helpers.reporting import command_line, emit, peak_bytes

from elfs_ray.config import SelectConfig
from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.select.run import IDS_PER_FILE, write_scores
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.selection import Budget, Selection, choose
from elfs_ray.storage import schema

KEPT, HARD_FRACTION = 0.1, 0.4
SCORE = "aum"
SORT_ROWS = 10_000_000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="10 million rows; under 45 s on 2 cores")
    quick = parser.parse_args().quick
    connect("local", num_cpus=2, object_store_memory=1 << 30)
    seconds = {}
    for num_rows in (10_000_000,) if quick else (1_000_000, 10_000_000, 100_000_000):
        seconds[num_rows] = measure(num_rows)
    if quick:
        return
    smallest, largest = min(seconds), max(seconds)
    name = f"time for {largest:,} rows, relative to {smallest:,}"
    emit(name, seconds[largest] / seconds[smallest], "times", "rows", largest / smallest, less_is_better=True)


def measure(num_rows: int) -> float:
    """Measure ours vs. both baselines. Return our seconds."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_pool(folder, num_rows)
        pool = ScoredPool(tuple(files), SCORE, "low", num_rows, 1)
        for _ in range(2):  # so that the workers have imported everything
            select_ids(replace(pool, files=tuple(files[:2]), num_ids=min(num_rows, 2 * IDS_PER_FILE)))
        idle = memory_of_ray()
        with Peak(memory_of_ray) as ours:
            kept = select_ids(pool)
        our_bytes = max(ours.peak_bytes - idle, 1)
        argsort_s, argsort_bytes, expected = in_a_process(by_argsort, files)
        assert np.array_equal(np.sort(np.concatenate(kept)), np.sort(expected)), "ours and NumPy keep different samples"
        name, mib = f"select a tenth of {num_rows:,} rows", 2**20
        emit(name, ours.seconds, "s", "argsort", argsort_s, less_is_better=True)
        emit(f"memory to {name}", our_bytes / mib, "MiB", "argsort", argsort_bytes / mib, less_is_better=True)
        if num_rows <= SORT_ROWS:
            with Peak(memory_of_ray) as sort:
                by_ray_data(files)
            emit(name, ours.seconds, "s", "Ray Data's sort", sort.seconds, less_is_better=True)
            sort_bytes = max(sort.peak_bytes - idle, 1)
            emit(f"memory to {name}", our_bytes / mib, "MiB", "Ray Data's sort", sort_bytes / mib, less_is_better=True)
    return ours.seconds


def write_pool(folder: str, num_rows: int) -> list[str]:
    """Write scores/ as the stage select does, with three of its columns."""
    ranges = [(first, min(first + IDS_PER_FILE, num_rows)) for first in range(0, num_rows, IDS_PER_FILE)]
    files = [os.path.join(folder, schema.range_file(first, end - 1)) for first, end in ranges]
    for _ in run_tasks(write_file, [(path, *ids) for path, ids in zip(files, ranges, strict=True)]):
        pass
    return files


def write_file(path: str, first: int, end: int) -> None:
    """Write scores like the sums of 200 epochs' margins: most samples are near the maximum."""
    rng = np.random.default_rng(first)
    scores = (200 * (2 * rng.beta(3, 1, end - first) - 1)).astype(np.float32)
    labels = rng.integers(0, 1000, end - first).astype(np.int32)
    columns = {schema.SAMPLE_ID: np.arange(first, end), schema.PSEUDO_LABEL: labels, SCORE: scores}
    write_scores(path, pa.table(columns))


def window(num_rows: int) -> tuple[int, int]:
    start = int(HARD_FRACTION * num_rows)
    return start, start + int(KEPT * num_rows)


def select_ids(pool: ScoredPool) -> list[np.ndarray]:
    """Find both cuts as the stage does, then collect the ids between them in a second pass."""
    budget = Budget(int(KEPT * pool.num_ids), HARD_FRACTION)
    (selection,) = choose(pool, SelectConfig(method="double_end", hard_fraction=HARD_FRACTION), 0, [budget])
    return list(pool.map_shares(kept_ids, selection))


def kept_ids(pool: ScoredPool, files: Sequence[str], selection: Selection) -> np.ndarray:
    parts = (pool.read(path) for path in files)
    return np.concatenate([rows.sample_ids[selection.mask(pool, rows)] for rows in parts])


def by_argsort(files: Sequence[str]) -> np.ndarray:
    """Select by an argsort of all scores in memory."""
    # A stable sort breaks ties by id, as ours does.
    scores, sample_ids = [
        np.concatenate([pq.read_table(f, columns=[c])[c].to_numpy() for f in files]) for c in (SCORE, schema.SAMPLE_ID)
    ]
    start, end = window(scores.size)
    return sample_ids[np.argsort(scores, kind="stable")[start:end]]


def by_ray_data(files: Sequence[str]) -> int:
    """Sort with Ray Data, and count the rows."""
    # Ray Data cannot cut by rank: it must sort all rows, of which those between two ranks would then be read.
    table = ray.data.read_parquet(list(files), columns=[schema.SAMPLE_ID, SCORE])
    return table.sort([SCORE, schema.SAMPLE_ID]).materialize().count()


def in_a_process(function: Callable[..., np.ndarray], *arguments: object) -> tuple[float, int, np.ndarray]:
    """Call a function in a separate process. Return (seconds, peak bytes beyond those when idle, result)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call_and_send, args=(sender, function, arguments))
    process.start()
    sender.close()  # otherwise recv would wait for ever if the process died
    result = receiver.recv()
    process.join()
    return result


def _call_and_send(sender, function: Callable[..., np.ndarray], arguments: tuple) -> None:
    idle = peak_bytes()
    start_s = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - start_s
    sender.send((seconds, peak_bytes() - idle, result))


class Peak:
    """Measure the seconds of a block, and the maximum of `measure`, called four times a second and at the end."""

    def __init__(self, measure: Callable[[], int]) -> None:
        self._measure, self._done = measure, threading.Event()
        self.peak_bytes, self.seconds = 0, 0.0

    def __enter__(self) -> "Peak":
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start_s
        self.peak_bytes = max(self.peak_bytes, self._measure())
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self.peak_bytes = max(self.peak_bytes, self._measure())


def memory_of_ray() -> int:
    """Return the private memory of this process and its descendants, such as Ray's workers, and of the object store."""
    return memory_of(family())


if __name__ == "__main__":
    main()
