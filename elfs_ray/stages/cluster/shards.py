"""Hold the pool's embeddings in shards on Ray actors, for k-means (methods/kmeans/points.py, Points).

Each worker reads its files of embeddings/ once and returns sums, never rows. The sums are exact, so any number of
workers gives the same bytes. A lost worker starts again, reads its files and repeats its part of one iteration.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.config import ClusterConfig
from elfs_ray.methods.kmeans.assignment import FASTEST_ENGINE, add_rows, squared_distances_to
from elfs_ray.methods.kmeans.points import ArrayPoints, PartialSums, smallest_ids
from elfs_ray.methods.numeric.exact_arithmetic import to_fixed_point
from elfs_ray.runtime.cluster import devices_of_cluster
from elfs_ray.runtime.resources import GIB
from elfs_ray.runtime.tasks import end_actor, get_result, put, start_actor, start_task
from elfs_ray.stages.cluster import request_shards
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

LABELS_DIR = "labels"
FAN_IN = 8  # partial sums that one task adds up
MAX_BYTES_TO_DRIVER = 64 << 20

T = TypeVar("T")


class ShardedPoints:
    """The embeddings, with some files of them on each of several actors.

    Driver memory: the sums of one iteration.
    """

    def __init__(self, config: ClusterConfig, run_dir: RunDir):
        self._engine = FASTEST_ENGINE if config.engine == "auto" else config.engine
        self._request = request_shards(config, devices_of_cluster())
        self._shares = _share_out(run_dir.counted_files(schema.EMBEDDINGS), self._request.most)
        self._shards: list[Any] = []
        sizes = self._on_all("size")
        self.count = sum(count for count, _ in sizes)
        self.dim = max(dim for _, dim in sizes)

    @property
    def num_shards(self) -> int:
        return len(self._shares)

    def on_sample(self, function: Callable[[torch.Tensor], T], num_rows: int, seed: int) -> T:
        return self.on_rows(function, self.sample_ids(num_rows, seed))

    def sample_ids(self, num_rows: int, seed: int) -> np.ndarray:
        """Return the ids (m,) int64, ascending, of the sample that `on_sample` takes."""
        return np.sort(smallest_ids(self._on_all("smallest_hashes", num_rows, seed), num_rows))

    def on_rows(self, function: Callable[[torch.Tensor], T], sample_ids: np.ndarray) -> T:
        """Return the result of `function` for the embeddings (m, d) of some samples, in the order of their ids."""
        rows = [shard.rows_among.remote(sample_ids) for shard in self._workers()]
        # Called on a worker, so that the rows never come to the driver.
        return get_result(self._workers()[0].on_rows.remote(function, *rows))

    def assign(self, centroids: np.ndarray) -> PartialSums:
        reference = put(centroids)
        return self._total([shard.assign.remote(reference) for shard in self._workers()], centroids.nbytes)

    def write_labels(self, run_dir: RunDir, centroids: np.ndarray) -> np.ndarray:
        """Write clusters/pseudo_labels/ with each sample's nearest centroid. Returns the cluster sizes (k,) int64."""
        return sum(self._on_all("write_labels", run_dir, put(centroids)))

    def means_of_labels(self, run_dir: RunDir, num_clusters: int) -> np.ndarray:
        """Return the mean embedding of each label in cluster/labels/, (k, d) float32; 0 for a label of no sample."""
        calls = [shard.sum_labels.remote(run_dir, num_clusters) for shard in self._workers()]
        totals = self._total(calls, num_clusters * self.dim * 4)
        return to_fixed_point(totals.sums / np.maximum(totals.counts, 1)[:, None])

    def write_labels_and_distances(self, run_dir: RunDir, centroids: np.ndarray) -> np.ndarray:
        """Write clusters/pseudo_labels/ with the labels of cluster/labels/. Returns the cluster sizes (k,) int64."""
        return sum(self._on_all("write_labels_and_distances", run_dir, put(centroids)))

    def release(self) -> None:
        """End the workers, to free their memory and devices; the next call starts them again."""
        for shard in self._shards:
            end_actor(shard)
        self._shards = []

    def _workers(self) -> list[Any]:
        if not self._shards:
            request = self._request
            memory = int((request.memory_gib or 0) * GIB)
            options: dict[str, Any] = {"num_cpus": request.cpus, "num_gpus": request.gpus, "memory": memory}
            self._shards = [
                start_actor(_Shard, files, request.device, self._engine, **options) for files in self._shares
            ]
        return self._shards

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        # All calls are made before the first result is awaited, so that the workers run at the same time.
        calls = [getattr(shard, method).remote(*arguments) for shard in self._workers()]
        return [get_result(call) for call in calls]

    def _total(self, sums: list[Any], centroid_bytes: int) -> PartialSums:
        """Return the total of the shards' sums, added up on the driver if they are small, else by a tree of tasks."""
        if len(sums) * 2 * centroid_bytes > MAX_BYTES_TO_DRIVER:
            while len(sums) > 1:
                # Without a CPU of its own: the shards may hold all of them, and would wait for this task forever.
                sums = [start_task(_add, *sums[i : i + FAN_IN], num_cpus=0) for i in range(0, len(sums), FAN_IN)]
        return _add(*(get_result(partial) for partial in sums))


class _Shard:
    """Some files of embeddings/, named with their numbers of rows, in the memory of one actor."""

    def __init__(self, files: list[tuple[str, int]], device: str, engine: str):
        torch.set_num_threads(1)
        self._device, self._engine = device, engine
        self._files = [path for path, _ in files]
        self._names = [filesystem.basename(path) for path in self._files]
        self._ends = np.cumsum([rows for _, rows in files]).tolist()

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        return read_embeddings(self._files, self._ends[-1])

    @property
    def _embeddings(self) -> np.ndarray:
        return self._table[0]

    @property
    def _sample_ids(self) -> np.ndarray:
        return self._table[1]

    @cached_property
    def _points(self) -> ArrayPoints:
        # Read by the first call and not when the actor starts: the driver gets the error of a call as it was raised,
        # but of a failed start only that the actor died.
        return ArrayPoints(self._embeddings, self._sample_ids, device=self._device, engine=self._engine)

    def size(self) -> tuple[int, int]:
        return self._points.count, self._points.dim

    def smallest_hashes(self, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return self._points.smallest_hashes(num, seed)

    def rows_among(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, embeddings) of those ids that this shard holds."""
        held_ids = sample_ids[np.isin(sample_ids, self._sample_ids)]
        return held_ids, self._points.rows(held_ids)

    def on_rows(self, function: Callable[[torch.Tensor], T], *parts: tuple[np.ndarray, np.ndarray]) -> T:
        """Return the result of `function` for the rows of all parts, in the order of their ids."""
        ids = np.concatenate([part[0] for part in parts])
        rows = np.concatenate([part[1] for part in parts])
        return function(torch.from_numpy(rows[np.argsort(ids)]))

    def assign(self, centroids: np.ndarray) -> PartialSums:
        return self._points.assign(centroids)

    def write_labels(self, run_dir: RunDir, centroids: np.ndarray) -> np.ndarray:
        labels, distances = self._points.label(centroids)
        self._write(run_dir, labels, distances)
        return np.bincount(labels, minlength=len(centroids))

    def sum_labels(self, run_dir: RunDir, num_clusters: int) -> PartialSums:
        labels = torch.from_numpy(self._read_labels(run_dir).astype(np.int64))
        sums = torch.zeros((num_clusters, self._points.dim), dtype=torch.float64)
        add_rows(sums, torch.from_numpy(self._embeddings), labels)
        counts = torch.bincount(labels, minlength=num_clusters).numpy()
        return PartialSums(sums.numpy(), counts, np.zeros(num_clusters))

    def write_labels_and_distances(self, run_dir: RunDir, centroids: np.ndarray) -> np.ndarray:
        labels = self._read_labels(run_dir)
        rows = torch.from_numpy(self._embeddings)
        squared = squared_distances_to(rows, centroids, torch.from_numpy(labels.astype(np.int64)))
        self._write(run_dir, labels, np.sqrt(squared.numpy()).astype(np.float32))
        return np.bincount(labels, minlength=len(centroids))

    def _read_labels(self, run_dir: RunDir) -> np.ndarray:
        """Return the labels in cluster/labels/ of this shard's samples, in the samples' order."""
        tables = [filesystem.read_table(run_dir.path("cluster", LABELS_DIR, name)) for name in self._names]
        sample_ids = np.concatenate([table[schema.SAMPLE_ID].to_numpy() for table in tables])
        assert (sample_ids == self._sample_ids).all(), "labels of other samples than the embeddings'"
        return np.concatenate([table[schema.PSEUDO_LABEL].to_numpy() for table in tables])

    def _write(self, run_dir: RunDir, labels: np.ndarray, distances: np.ndarray) -> None:
        start = 0
        for name, end in zip(self._names, self._ends, strict=True):
            columns = [self._sample_ids[start:end], labels[start:end], distances[start:end]]
            table = pa.table(columns, schema=schema.PSEUDO_LABELS_SCHEMA)
            filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, name), table)
            start = end


def read_embeddings(files: list[str], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (embeddings (n, d) float16, sample_ids (n,)) of some files with n = `num_rows` rows in all.

    Memory besides these: one file.
    """
    # Filled in place, since to join the files' arrays at the end would take the memory twice.
    embeddings, sample_ids = np.empty((0, 0), np.float16), np.empty(num_rows, np.int64)
    end = 0
    for path in files:
        table = filesystem.read_table(path)
        rows = schema.matrix_of(table, schema.EMBEDDING)
        if not end:
            embeddings = np.empty((num_rows, rows.shape[1]), np.float16)
        assert rows.shape[1] == embeddings.shape[1], f"{path} has embeddings of another length than the files before it"
        start, end = end, end + len(rows)
        embeddings[start:end] = rows
        sample_ids[start:end] = table[schema.SAMPLE_ID].to_numpy()
    assert end == num_rows, f"{files[0]} and those after it hold {end} rows, not {num_rows}"
    return embeddings, sample_ids


def write_label_file(run_dir: RunDir, name: str, sample_ids: np.ndarray, labels: np.ndarray) -> None:
    """Write a file of cluster/labels/, which holds labels until their distances are known.

    `name` is that of the file in embeddings/ with the same samples.
    """
    table = pa.table({schema.SAMPLE_ID: sample_ids, schema.PSEUDO_LABEL: labels.astype(np.int32)})
    filesystem.write_table(run_dir.path("cluster", LABELS_DIR, name), table)


def _share_out(files: list[tuple[str, int]], num_workers: int) -> list[list[tuple[str, int]]]:
    """Return the files, named with their numbers of rows, in one run for each worker with about as many rows in each.

    Workers that would get no file have no run.
    """
    rows = np.array([count for _, count in files])
    # A file goes to the worker in whose share of all rows its middle row lies.
    middles = np.cumsum(rows) - rows / 2
    worker = np.minimum((middles / max(rows.sum(), 1) * num_workers).astype(int), num_workers - 1)
    shares = [[file for file, w in zip(files, worker, strict=True) if w == number] for number in range(num_workers)]
    return [share for share in shares if share]


def _add(*parts: PartialSums) -> PartialSums:
    total = PartialSums(parts[0].sums.copy(), parts[0].counts.copy(), parts[0].squared_norms.copy())
    for part in parts[1:]:
        total += part
    return total
