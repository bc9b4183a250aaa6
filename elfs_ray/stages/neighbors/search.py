"""Search for the nearest neighbours of every sample, exactly or by an inverted file.

A task finds the neighbours of the samples of some files among all files, which it reads a few at a time. A resumed run
skips the files that exist.

Exact search costs 2·n²·d operations. Above 200,000 samples CPUs use faiss's inverted file instead, in shards of up to
2 GiB on actors, around the centroids of a spherical k-means on a sample. It looks into as many lists as the requested
recall takes, measured on a sample, and into more where these hold too few. A search for near-duplicates alone takes far
fewer lists: its recall is measured by made-up copies of samples, each at a similarity of 0.9. Every shard ranks every
query, so more shards than memory takes would be more work: where there are CPUs for more actors, they hold copies.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.config import ClusterConfig
from elfs_ray.methods.neighbors.exact import FlatSearch, Neighbors, nearest_neighbors, points_on
from elfs_ray.methods.neighbors.inverted import InvertedFile, Lists, choose_nprobe, merge_neighbors, search_lists
from elfs_ray.methods.neighbors.lists import make_lists
from elfs_ray.methods.neighbors.ranking import Ranking
from elfs_ray.methods.numeric.distinct import first_of_equal
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.runtime.cluster import devices_of_cluster, num_cpus
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import get_result, put, run_tasks, start_actor, start_task
from elfs_ray.stages.cluster.shards import read_embeddings
from elfs_ray.stages.neighbors import choose_search, searches_on_gpus
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

SEARCH_FILE = "search.txt"
MAX_QUERIES = 1 << 18  # samples of a task: a task that is lost is done again
MIN_TASKS_PER_WORKER = 4  # so that workers end at about the same time
SHARD_BYTES = 256 << 20  # embeddings that a task holds besides its queries
LIST_SHARD_BYTES = 2 << 30  # of a shard of the inverted file: 1 GiB for each CPU, as there is one for two
COPY_SIMILARITY = 0.9
RECALL_QUERIES = 1000  # the standard error of a recall of 95% is then 0.7%
LISTS_PER_ROOT = 4  # times the square root of the samples
ROWS_PER_LIST = 250  # at most, which is what a million samples have by the square root
LIST_ROWS = 39  # faiss's own lower bound of training rows a list
MAX_LIST_ROWS = 1 << 20  # for all lists: 8·d bytes each, with what it takes to find the distinct ones
# Of the inverted file's shards and of the tasks that query them: one waits while the other works, so that a whole CPU
# for each would leave half of the CPUs idle.
CPUS_OF_A_TURN = 0.5
_LIST_STREAM, _QUERY_STREAM = 1, 2

Files = list[tuple[str, int]]  # paths with their rows
Sampled = tuple[np.ndarray, np.ndarray]  # embeddings (m, d) float16 and sample_ids (m,)
Centroids = tuple[np.ndarray, np.ndarray | None]  # of the lists and of their groups: the arguments of `Lists`


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
    # The two find different neighbours, and a resumed run may see a cluster with GPUs, or without.
    choose = partial(choose_search, config, devices, num_samples)
    search = run_dir.first_choice(schema.NEIGHBORS, SEARCH_FILE, choose=choose)

    done = {filesystem.basename(path) for path in run_dir.table_files(schema.NEIGHBORS)}
    num_workers = max(1, devices.num_gpus if on_gpus else devices.num_cpus)
    groups = _group(files, min(MAX_QUERIES, -(-num_samples // (MIN_TASKS_PER_WORKER * num_workers))))
    pending = [group for group in groups if any(filesystem.basename(path) not in done for path, _ in group)]
    metrics: dict[str, Any] = {"search": search, "num_neighbors": num_neighbors}
    with Progress("neighbors", num_samples, "neighbours found") as progress:
        if search == "exact":
            shards = put(_group(files, _shard_rows(files)))
            device = "cuda" if on_gpus else "cpu"
            searches: list[tuple] = [(shards, run_dir, group, num_neighbors, device) for group in pending]
            results = run_tasks(_exact, searches, num_gpus_each=int(on_gpus))
        else:
            copies, centroids, measured = _build_lists(config, files, num_neighbors, seed, copies_alone)
            metrics |= {"num_lists": len(centroids[0]), "nprobe": measured[-1]["nprobe"]}
            metrics |= {"recall": measured[-1]["recall"], "recall_measured": measured}
            shared = put(centroids)
            nprobe = metrics["nprobe"]
            searches = [
                (shared, shards, run_dir, group, nprobe, num_neighbors)
                for group, shards in zip(pending, cycle(copies), strict=False)
            ]
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
    return max(1, SHARD_BYTES // (2 * _dim(files)))


def _dim(files: Files) -> int:
    return filesystem.read_schema(files[0][0]).field(schema.EMBEDDING).type.list_size


def _read(files: Files) -> tuple[np.ndarray, np.ndarray]:
    """Return (embeddings (n, d) float16, sample_ids (n,)) of some files."""
    return read_embeddings([path for path, _ in files], _num_rows(files))


def _exact(shards: list[Files], run_dir: RunDir, group: Files, num_neighbors: int, device: str) -> int:
    """Write the neighbours of the samples of a group of files by exact search. Returns the number of samples."""
    queries, query_ids = _read(group)
    if len(query_ids) == 0:
        return _write(run_dir, group, query_ids, _no_neighbors(num_neighbors))
    neighbors = nearest_neighbors(queries, query_ids, map(_read, shards), num_neighbors, device=device)
    return _write(run_dir, group, query_ids, neighbors)


def _approximate(
    centroids: Centroids, shards: list[Any], run_dir: RunDir, group: Files, nprobe: int, num_neighbors: int
) -> int:
    """Write the neighbours of the samples of a group of files by the inverted file. Returns the number of samples."""
    torch.set_num_threads(1)
    queries, query_ids = _read(group)
    if len(query_ids) == 0:
        return _write(run_dir, group, query_ids, _no_neighbors(num_neighbors))
    search = partial(_ask, shards, num_neighbors)
    return _write(run_dir, group, query_ids, search_lists(search, queries, query_ids, Lists(*centroids), nprobe))


def _no_neighbors(num_neighbors: int) -> Neighbors:
    """Return the neighbours of no image: all images of a block may have been rejected."""
    return Neighbors(np.empty((0, num_neighbors), np.int64), np.empty((0, num_neighbors), np.float32))


def _ask(shards: list[Any], k: int, *queries_ids_lists: np.ndarray) -> Neighbors:
    """Return the nearest neighbours in all shards of the inverted file."""
    # Stored once, not once for each shard that is called with them.
    shared = [put(array) for array in queries_ids_lists]
    searches = [shard.search.remote(*shared, k) for shard in shards]
    return merge_neighbors([get_result(search) for search in searches])


class _ListShard:
    """The samples of some files in the inverted file. Memory: n·(4·d + 24) bytes."""

    def __init__(self, files: Files, centroids: Centroids):
        torch.set_num_threads(1)
        self._index = InvertedFile(Lists(*centroids), *_read(files))

    def search(self, queries: np.ndarray, query_ids: np.ndarray, lists: np.ndarray, k: int) -> Neighbors:
        return self._index.search(queries, query_ids, lists, k)


def _build_lists(
    config: ClusterConfig, files: Files, num_neighbors: int, seed: int, copies_alone: bool
) -> tuple[list[list[Any]], Centroids, list[dict[str, float]]]:
    """Return copies of the inverted file, its centroids, and the recall of each nprobe that was tried.

    A copy is a list of actors that hold its shards. The last nprobe is the one to use.
    """
    centroids, (queries, query_ids) = _lists_and_queries(files, seed)
    if copies_alone:
        exact = Neighbors(query_ids[:, None], np.full((len(query_ids), 1), COPY_SIMILARITY, np.float32))
        queries, query_ids = _made_up_copies(queries, seed), np.full(len(queries), -1)
    else:
        exact = _exact_neighbors(files, queries, query_ids, num_neighbors)
    # With half a CPU each, so many leave at least half of the CPUs to the tasks that query them.
    num_workers = min(config.num_workers or max(1, num_cpus() // 2), num_cpus())
    shared = put(centroids)
    shares = _group(files, _rows_of_shard(files, num_workers))
    copies: list[list[Any]] = [
        [start_actor(_ListShard, share, shared, num_cpus=CPUS_OF_A_TURN) for share in shares]
        for _ in range(max(1, num_workers // len(shares)))
    ]
    lists = Lists(*centroids)

    def search(nprobe: int) -> Neighbors:
        return search_lists(partial(_ask, copies[0], num_neighbors), queries, query_ids, lists, nprobe)

    _, measured = choose_nprobe(search, exact, len(lists), config.neighbor_recall)
    return copies, centroids, measured


def _rows_of_shard(files: Files, num_workers: int) -> int:
    """Return the rows of the largest shards of the inverted file that the memory for one allows, or one a worker."""
    num_samples = _num_rows(files)
    num_shards = -(-num_samples * (4 * _dim(files) + 24) // LIST_SHARD_BYTES)  # see _ListShard
    return -(-num_samples // min(num_shards, num_workers))


def _lists_and_queries(files: Files, seed: int) -> tuple[Centroids, Sampled]:
    """Return the centroids of the lists, from a k-means on a sample of the pool, and queries to measure recall.

    There are no more lists than that sample has distinct embeddings.
    """
    num_samples = _num_rows(files)
    num_lists = max(LISTS_PER_ROOT * math.isqrt(num_samples), num_samples // ROWS_PER_LIST)
    num_lists = max(1, min(num_lists, num_samples // LIST_ROWS))
    num_rows = min(LIST_ROWS * num_lists, MAX_LIST_ROWS)
    shares = {_LIST_STREAM: num_rows / num_samples, _QUERY_STREAM: RECALL_QUERIES / num_samples}
    shards = _group(files, _shard_rows(files))
    sampled = [start_task(_sample, shard, shares, seed, num_returns=len(shares)) for shard in shards]
    of_lists, of_queries = zip(*sampled, strict=True)
    # The sample for the lists never comes to the driver.
    centroids = get_result(start_task(_make_lists, num_lists, seed, *of_lists))
    return centroids, _joined([get_result(part) for part in of_queries])


def _make_lists(num_lists: int, seed: int, *parts: Sampled) -> Centroids:
    torch.set_num_threads(1)
    rows, ids = _joined(parts)
    first = first_of_equal(rows)
    return make_lists(rows[first], ids[first], min(num_lists, len(first)), seed=seed)


def _exact_neighbors(files: Files, queries: np.ndarray, query_ids: np.ndarray, k: int) -> Neighbors:
    """Return the exact neighbours of a few queries; each task compares them with one shard of the pool."""
    shared = put((queries, query_ids))
    tasks = [(shared, shard, k) for shard in _group(files, _shard_rows(files))]
    rankings = (ranking for _, ranking in run_tasks(_rank, tasks))  # one at a time, as they come
    best = reduce(lambda best, other: best.merged(other.similarity, other.ids), rankings)
    return Neighbors(best.ids.numpy(), best.similarity.float().numpy())


def _rank(shared: Sampled, shard: Files, k: int) -> Ranking:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    wanted, points = (points_on(*rows, device) for rows in (shared, _read(shard)))
    return FlatSearch(device).rank(Ranking.empty(len(wanted), k, device), wanted, points)


def _made_up_copies(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Return unit vectors (n, d) float16 at a similarity of 0.9 to embeddings, in random directions from them."""
    rows = embeddings.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(rows.shape)
    noise -= (noise * rows).sum(1, keepdims=True) * rows / np.square(rows).sum(1, keepdims=True)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (COPY_SIMILARITY * rows + math.sqrt(1 - COPY_SIMILARITY**2) * noise).astype(np.float16)


def _sample(shard: Files, shares: dict[int, float], seed: int) -> tuple[Sampled, ...]:
    """Return a random sample of some files for each stream of random numbers, of about its share of their samples.

    A sample is chosen by the hash of its id, so those of all files do not depend on the division into shards.
    """
    embeddings, sample_ids = _read(shard)
    chosen = [hash_uniform(seed, stream, sample_ids) < share for stream, share in shares.items()]
    return tuple((embeddings[rows], sample_ids[rows]) for rows in chosen)


def _joined(parts: Sequence[Sampled]) -> Sampled:
    embeddings, sample_ids = zip(*parts, strict=True)
    return np.concatenate(embeddings), np.concatenate(sample_ids)


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
