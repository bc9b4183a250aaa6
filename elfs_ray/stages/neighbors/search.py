"""Search for the nearest neighbours of every sample, exactly or by an inverted file.

A task finds the neighbours of the samples of some files among all files, which it reads a few at a time. A resumed run
skips the files that exist.

Exact search costs 2·n²·d operations. Above 200,000 samples CPUs use faiss's inverted file instead, in shards on
actors, around the centroids of a spherical k-means on a sample. It looks into as many lists as the requested recall
takes, measured on a sample, and into more where these hold too few. A search for near-duplicates alone takes far fewer
lists: its recall is measured by made-up copies of samples, each at a similarity of 0.9.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from elfs_ray.config import ClusterConfig
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors
from elfs_ray.methods.neighbors.inverted import InvertedFile, choose_nprobe, merge_neighbors, search_lists
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.runtime.cluster import devices_of_cluster, get_result, num_cpus, run_tasks
from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.cluster.shards import read_embeddings
from elfs_ray.stages.neighbors import searches_on_gpus
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_EXACT_ON_CPU = 200_000
MAX_QUERIES = 1 << 18  # samples of a task: a task that is lost is done again
MIN_TASKS_PER_WORKER = 4  # so that workers end at about the same time
SHARD_BYTES = 256 << 20  # embeddings that a task holds besides its queries
COPY_SIMILARITY = 0.9
RECALL_QUERIES = 1000  # the standard error of a recall of 95% is then 0.7%
LISTS_PER_ROOT = 4  # times the square root of the samples
LIST_ROWS = 39  # faiss's own lower bound of training rows a list
LIST_ITERATIONS = 10
# Of the inverted file's shards and of the tasks that query them: one waits while the other works, so that a whole CPU
# for each would leave half of the CPUs idle.
CPUS_OF_A_TURN = 0.5
_LIST_STREAM, _QUERY_STREAM = 1, 2

Files = list[tuple[str, int]]  # paths with their rows


def find_neighbors(
    config: ClusterConfig, run_dir: RunDir, num_neighbors: int, seed: int, *, copies_alone: bool = False
) -> dict[str, Any]:
    """Write neighbors/. Returns the kind of search and, for the inverted file, its nprobe and measured recall.

    copies_alone: whether only neighbours that are near-duplicates must be among those of the inverted file.
    Raises ValueError if num_neighbors is not below the number of samples.
    """
    devices = devices_of_cluster()
    on_gpus = searches_on_gpus(config, devices)
    files = run_dir.counted_files(schema.EMBEDDINGS)
    num_samples = _num_rows(files)
    if num_neighbors >= num_samples:
        raise ValueError(
            f"cluster.num_neighbors={num_neighbors} of {num_samples} samples: it must be below the number of samples"
        )
    search = config.neighbor_search
    if search == "auto":
        search = "exact" if on_gpus or num_samples <= MAX_EXACT_ON_CPU else "ivf"

    done = {filesystem.basename(path) for path in run_dir.table_files(schema.NEIGHBORS)}
    num_workers = max(1, devices.num_gpus if on_gpus else devices.num_cpus)
    groups = _group(files, min(MAX_QUERIES, -(-num_samples // (MIN_TASKS_PER_WORKER * num_workers))))
    pending = [group for group in groups if any(filesystem.basename(path) not in done for path, _ in group)]
    metrics: dict[str, Any] = {"search": search, "num_neighbors": num_neighbors}
    with Progress("neighbors", num_samples, "neighbours found") as progress:
        if search == "exact":
            shards = ray.put(_group(files, _shard_rows(files)))
            device = "cuda" if on_gpus else "cpu"
            searches: list[tuple] = [(shards, run_dir, group, num_neighbors, device) for group in pending]
            results = run_tasks(_exact, searches, num_gpus_each=int(on_gpus))
        else:
            lists, centroids, measured = _build_lists(config, files, num_neighbors, seed, copies_alone)
            metrics |= {"num_lists": len(centroids), "nprobe": measured[-1]["nprobe"]}
            metrics |= {"recall": measured[-1]["recall"], "recall_measured": measured}
            shared = ray.put(centroids)
            searches = [(shared, lists, run_dir, group, metrics["nprobe"], num_neighbors) for group in pending]
            results = run_tasks(_approximate, searches, num_cpus_each=CPUS_OF_A_TURN)
        progress.advance(num_samples - sum(map(_num_rows, pending)))
        for _, count in results:
            progress.advance(count)
    return metrics


def _num_rows(files: Files) -> int:
    return sum(rows for _, rows in files)


def _group(files: Files, max_rows: int) -> list[Files]:
    """Return groups of consecutive files with up to `max_rows` rows in all, or with a single larger file."""
    groups: list[Files] = []
    room = 0
    for path, count in files:
        if not groups or count > room:
            groups.append([])
            room = max_rows
        groups[-1].append((path, count))
        room -= count
    return groups


def _shard_rows(files: Files) -> int:
    """Return the number of rows in about 256 MiB of embeddings."""
    row_bytes = 2 * filesystem.read_schema(files[0][0]).field(schema.EMBEDDING).type.list_size
    return max(1, SHARD_BYTES // row_bytes)


def _read(files: Files) -> tuple[np.ndarray, np.ndarray]:
    """Return (embeddings (n, d) float16, sample_ids (n,)) of some files."""
    return read_embeddings([path for path, _ in files], _num_rows(files))


def _exact(shards: list[Files], run_dir: RunDir, group: Files, num_neighbors: int, device: str) -> int:
    """Write the neighbours of the samples of a group of files by exact search. Returns the number of samples."""
    queries, query_ids = _read(group)
    neighbors = nearest_neighbors(queries, query_ids, map(_read, shards), num_neighbors, device=device)
    return _write(run_dir, group, query_ids, neighbors)


def _approximate(
    centroids: np.ndarray, lists: list[Any], run_dir: RunDir, group: Files, nprobe: int, num_neighbors: int
) -> int:
    """Write the neighbours of the samples of a group of files by the inverted file. Returns the number of samples."""
    torch.set_num_threads(1)
    queries, query_ids = _read(group)
    search = partial(_ask, lists, num_neighbors)
    return _write(run_dir, group, query_ids, search_lists(search, queries, query_ids, centroids, nprobe))


def _ask(shards: list[Any], k: int, *queries_ids_lists: np.ndarray) -> Neighbors:
    """Return the nearest neighbours in all shards of the inverted file."""
    # Stored once, not once for each shard that is called with them.
    shared = [ray.put(array) for array in queries_ids_lists]
    return merge_neighbors(ray.get([shard.search.remote(*shared, k) for shard in shards]))


class _ListShard:
    """The samples of some files in the inverted file. Memory: n·(4·d + 24) bytes."""

    def __init__(self, files: Files, centroids: np.ndarray):
        torch.set_num_threads(1)
        self._index = InvertedFile(centroids, *_read(files))

    def search(self, queries: np.ndarray, query_ids: np.ndarray, lists: np.ndarray, k: int) -> Neighbors:
        return self._index.search(queries, query_ids, lists, k)


def _build_lists(
    config: ClusterConfig, files: Files, num_neighbors: int, seed: int, copies_alone: bool
) -> tuple[list[Any], np.ndarray, list[dict[str, float]]]:
    """Return the actors that hold the inverted file, its centroids, and the recall of each nprobe that was tried.

    The last nprobe is the one to use.
    """
    prepare = ray.remote(num_cpus=1, **placement())(_prepare)
    centroids, queries, query_ids, exact = get_result(prepare.remote(files, num_neighbors, seed, copies_alone))
    # With half a CPU each, so many leave at least half of the CPUs to the tasks that query them.
    num_workers = min(config.num_workers or max(1, num_cpus() // 2), num_cpus())
    actor = ray.remote(num_cpus=CPUS_OF_A_TURN, max_restarts=-1, max_task_retries=-1, **placement())(_ListShard)
    shared = ray.put(centroids)
    lists: list[Any] = [actor.remote(share, shared) for share in _group(files, -(-_num_rows(files) // num_workers))]

    def search(nprobe: int) -> Neighbors:
        return search_lists(partial(_ask, lists, num_neighbors), queries, query_ids, centroids, nprobe)

    _, measured = choose_nprobe(search, exact, len(centroids), config.neighbor_recall)
    return lists, centroids, measured


def _prepare(
    files: Files, num_neighbors: int, seed: int, copies_alone: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Neighbors]:
    """Return the centroids of the lists, and queries, their ids and the neighbours to find, to measure recall.

    The centroids come from a k-means on a sample of the pool. There are no more lists than that sample has distinct
    embeddings.
    """
    torch.set_num_threads(1)
    num_samples = _num_rows(files)
    num_lists = max(1, min(LISTS_PER_ROOT * math.isqrt(num_samples), num_samples // LIST_ROWS))
    shards = _group(files, _shard_rows(files))
    shares = {_LIST_STREAM: LIST_ROWS * num_lists / num_samples, _QUERY_STREAM: RECALL_QUERIES / num_samples}
    (rows, ids), (queries, query_ids) = _samples(map(_read, shards), shares, seed)
    rows, ids = _distinct(rows, ids)
    points = ArrayPoints(rows, ids)
    num_lists = min(num_lists, len(rows))
    fit = kmeans(points, num_lists, seed=seed, max_iterations=LIST_ITERATIONS, spherical=True)
    # Of unit length in float16 they are searched like samples: exactly.
    centroids = fit.centroids.astype(np.float16)
    if copies_alone:
        originals = Neighbors(query_ids[:, None], np.full((len(query_ids), 1), COPY_SIMILARITY, np.float32))
        return centroids, _made_up_copies(queries, seed), np.full(len(queries), -1), originals
    return centroids, queries, query_ids, nearest_neighbors(queries, query_ids, map(_read, shards), num_neighbors)


def _made_up_copies(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Return unit vectors (n, d) float16 at a similarity of 0.9 to embeddings, in random directions from them."""
    rows = embeddings.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(rows.shape)
    noise -= (noise * rows).sum(1, keepdims=True) * rows / np.square(rows).sum(1, keepdims=True)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (COPY_SIMILARITY * rows + math.sqrt(1 - COPY_SIMILARITY**2) * noise).astype(np.float16)


def _samples(
    shards: Iterator[tuple[np.ndarray, np.ndarray]], shares: dict[int, float], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return a random sample of (embeddings, ids) for each stream of random numbers, of about its share of the pool.

    A sample is chosen by the hash of its id, so the result does not depend on the division into shards.
    """
    sampled: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {stream: [] for stream in shares}
    for embeddings, sample_ids in shards:
        for stream, share in shares.items():
            chosen = hash_uniform(seed, stream, sample_ids) < share
            sampled[stream].append((embeddings[chosen], sample_ids[chosen]))
    joined = []
    for parts in sampled.values():
        rows, ids = zip(*parts, strict=True)
        joined.append((np.concatenate(rows), np.concatenate(ids)))
    return joined


def _distinct(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of each group of equal embeddings, with its id."""
    as_numbers = np.ascontiguousarray(rows + np.float16(0))  # turns -0.0 into 0.0, whose bytes differ
    # Each row becomes a single value of bytes, which `np.unique` can compare.
    whole_rows = as_numbers.view(np.dtype((np.void, as_numbers.shape[1] * 2)))[:, 0]
    first = np.sort(np.unique(whole_rows, return_index=True)[1])
    return rows[first], ids[first]


def _write(run_dir: RunDir, group: Files, query_ids: np.ndarray, neighbors: Neighbors) -> int:
    start = 0
    for path, rows in group:
        end = start + rows
        columns = [
            pa.array(query_ids[start:end]),
            schema.matrix_column(neighbors.neighbor_ids[start:end]),
            schema.matrix_column(neighbors.similarity[start:end]),
        ]
        table = pa.table(columns, schema=schema.neighbors_schema(neighbors.neighbor_ids.shape[1]))
        filesystem.write_table(run_dir.path(schema.NEIGHBORS, filesystem.basename(path)), table)
        start = end
    return len(query_ids)
