"""Measure the 50 nearest neighbours of every point vs. faiss and scikit-learn, an inverted file, two workers vs. one.

    python benchmarks/neighbors.py [--quick] [--only PART]

Ours takes float16 and makes faiss's answer that of a float64 search; faiss's flat index and scikit-learn's brute force
get float32. The inverted file is measured with the share of the exact neighbours that it finds; then, in CPU seconds,
what it takes to find lists through groups of them, and to search the same pool in more shards. The stage itself then
runs with two CPUs and with one of them kept busy elsewhere. On a GPU the search is measured vs. a product of its shape.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import faiss
import numpy as np
import ray
import torch
from helpers.reporting import command_line, emit, take_turns
from helpers.scale_pool import embeddings_of
from kmeans import DIM, SIDE, sample_points, stage_config, threads, write_embeddings
from sklearn.neighbors import NearestNeighbors

from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors, recall
from elfs_ray.methods.neighbors.inverted import InvertedFile, Lists, merge_neighbors, nearest_lists, search_lists
from elfs_ray.methods.neighbors.lists import make_lists
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.neighbors.search import find_neighbors
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

K = 50
MIN_RECALL = 0.95
POOL = 10_000_000  # of which made-up embeddings are a part


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="8,000 points; under 45 s on 2 cores")
    parser.add_argument("--only", choices=("exact", "sizes", "inverted-file", "lists", "shards", "stage"))
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        measure_gpu(200_000)
        return
    num_points, rounds = (8_000, 1) if arguments.quick else (20_000, 2)
    points = sample_points(num_points, seed=0)
    parts: dict[str, Callable[[], None]] = {
        "exact": lambda: measure_exact(points, len(points), rounds),
        "sizes": lambda: measure_sizes(rounds),
        "inverted-file": lambda: measure_inverted_file(
            *(8_000, 4_000) if arguments.quick else (200_000, 8_192), rounds
        ),
        "lists": lambda: measure_lists(*((4_000,), 1_000) if arguments.quick else ((4_000, 12_649, 40_000), 4_096)),
        "shards": lambda: measure_shards(*((4,), 1_000) if arguments.quick else ((2, 4, 8, 16), 8_192)),
        "stage": lambda: measure_stage(num_points, rounds),
    }
    for name, measure in parts.items():
        if arguments.only == name or (arguments.only is None and not (arguments.quick and name == "sizes")):
            measure()


def measure_sizes(rounds: int) -> None:
    """Measure the exact search of few points and of some of many."""
    for num_points, num_queries in ((5_000, 5_000), (100_000, 4_096)):
        measure_exact(sample_points(num_points, seed=0), num_queries, rounds)


def measure_exact(points: np.ndarray, num_queries: int, rounds: int) -> None:
    """Measure the exact search for the first `num_queries` points with one thread and with two."""
    for num_threads in (1, 2):
        _measure_exact(points, num_queries, num_threads, rounds)


def _measure_exact(points: np.ndarray, num_queries: int, num_threads: int, rounds: int) -> None:
    ids, single = np.arange(len(points)), points.astype(np.float32)
    queries, query_ids, wanted = points[:num_queries], ids[:num_queries], single[:num_queries]
    square = torch.randn(SIDE, SIDE)

    def by_faiss() -> None:
        index = faiss.IndexFlatIP(DIM)
        index.add(single)
        index.search(wanted, K + 1)

    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: nearest_neighbors(queries, query_ids, [(points, ids)], K),
        "faiss.IndexFlatIP": by_faiss,
        "scikit-learn": lambda: NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(single).kneighbors(wanted),
        "matmul": lambda: [square @ square for _ in range(10)],
    }
    with threads(num_threads):
        seconds = take_turns(contestants, rounds)
    some = "" if num_queries == len(points) else f" for {num_queries:,} of them"
    name = f"{K} nearest of {len(points):,} x {DIM}{some}, {num_threads} thread{'s' * (num_threads > 1)}"
    for other in ("faiss.IndexFlatIP", "scikit-learn"):
        emit(name, num_queries / seconds["ours"], "points/s", other, num_queries / seconds[other])
    rate = 2.0 * num_queries * len(points) * DIM / seconds["ours"] / 1e9
    ceiling = 10 * 2.0 * SIDE**3 / seconds["matmul"] / 1e9
    emit(f"arithmetic of the {name}", rate, "GFLOP/s", "matrix product of 2000²", ceiling)


def measure_inverted_file(num_points: int, num_queries: int, rounds: int) -> None:
    """Measure a search of as few lists as find 95% of the exact neighbours vs. the exact search, on one thread."""
    points, ids = sample_points(num_points, seed=0), np.arange(num_points)
    queries, query_ids = points[:num_queries], ids[:num_queries]
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    num_lists = 4 * round(len(points) ** 0.5)
    lists = Lists(*make_lists(points, ids, num_lists, seed=0))
    index = InvertedFile(lists, points, ids)

    def search(nprobe: int) -> Neighbors:
        def search_probed(queries: np.ndarray, query_ids: np.ndarray, probed: np.ndarray) -> Neighbors:
            return merge_neighbors([index.search(queries, query_ids, probed, K)])

        return search_lists(search_probed, queries, query_ids, lists, nprobe)

    exact = nearest_neighbors(queries, query_ids, [(points, ids)], K)
    nprobe, share = 1, 0.0
    while True:
        share = recall(search(nprobe).neighbor_ids, exact.neighbor_ids)
        if share >= MIN_RECALL or nprobe >= len(lists):
            break
        nprobe *= 2
    seconds = take_turns(
        {
            "ivf": lambda: search(nprobe),
            "exact": lambda: nearest_neighbors(queries, query_ids, [(points, ids)], K),
        },
        rounds,
    )
    name = f"inverted file of {num_points:,} x {DIM}, {nprobe} of {len(lists)} lists, finds {share:.1%}"
    emit(name, num_queries / seconds["ivf"], "points/s", "exact search", num_queries / seconds["exact"])


def measure_lists(sizes: Sequence[int], num_queries: int) -> None:
    """Measure the search for the 4 nearest of many lists through groups of them vs. among all, on one thread."""
    queries = embeddings_of(np.arange(num_queries) * 97, POOL)
    for size in sizes:
        centroids = embeddings_of(np.arange(size) * 249, POOL)
        grouped = Lists(centroids, centroids[:: round(size**0.5)])
        through_s = cpu_seconds(partial(grouped.nearest, queries, 4))
        among_s = cpu_seconds(partial(nearest_lists, queries, centroids, 4))
        name = f"the 4 nearest of {size:,} lists through groups"
        emit(name, 1e6 * through_s / num_queries, "µs", "among all", 1e6 * among_s / num_queries, less_is_better=True)


def measure_shards(numbers: Sequence[int], num_queries: int) -> None:
    """Measure a search of 4 of 400 lists of 40,000 samples in several shards vs. in one, on one thread."""
    ids = np.arange(40_000) * 23
    rows = embeddings_of(ids, POOL)
    lists = Lists(rows[::100])
    queries, query_ids = rows[:num_queries], ids[:num_queries]
    probed = lists.nearest(queries, 4)

    def search(files: Sequence[InvertedFile]) -> Neighbors:
        return merge_neighbors([file.search(queries, query_ids, probed, 8) for file in files])

    one = [InvertedFile(lists, rows, ids)]
    one_s = cpu_seconds(partial(search, one))
    for number in numbers:
        files = [InvertedFile(lists, rows[shard::number], ids[shard::number]) for shard in range(number)]
        seconds = cpu_seconds(partial(search, files))
        name = f"8 neighbours in {number} shards of 40,000 x {queries.shape[1]}, 4 of 400 lists"
        emit(name, 1e6 * seconds / num_queries, "µs", "in one", 1e6 * one_s / num_queries, less_is_better=True)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of the second call, on one thread; other work changes them less than those of a clock."""
    with threads(1):
        call()
        start_s = time.process_time()
        call()
    return time.process_time() - start_s


def measure_stage(num_points: int, rounds: int) -> None:
    """Measure the stage's tasks with two CPUs and with one."""
    connect("local", num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        write_embeddings(run_dir, num_points)
        config = stage_config(run_dir, 2)
        holder: Any = ray.remote(num_cpus=1)(_Idle)

        def search() -> None:
            filesystem.delete(run_dir.path(schema.NEIGHBORS))
            find_neighbors(config, run_dir, K, seed=0)

        def search_on_one() -> None:
            busy = holder.remote()
            ray.get(busy.ready.remote())
            search()
            ray.kill(busy)

        seconds = take_turns({"two": search, "one": search_on_one}, rounds)
    rates = {name: num_points / taken for name, taken in seconds.items()}
    emit(f"neighbours of {num_points:,} x {DIM} on two CPUs", rates["two"], "points/s", "on one", rates["one"])


class _Idle:
    """Occupy a CPU of the cluster without using it."""

    def ready(self) -> None:
        pass


def measure_gpu(num_points: int) -> None:
    """Measure the search on a GPU vs. a float16 product of its shape."""
    points, ids = sample_points(num_points, seed=0), np.arange(num_points)
    left = torch.from_numpy(points).cuda()

    def product() -> None:
        for part in left.split(4096):
            part @ left.T
        torch.cuda.synchronize()

    seconds = take_turns(
        {"ours": lambda: nearest_neighbors(points, ids, [(points, ids)], K, device="cuda"), "product": product}, 3
    )
    flop = 2.0 * num_points**2 * DIM / 1e12
    name = f"{K} nearest of {num_points:,} x {DIM} on the GPU"
    emit(name, flop / seconds["ours"], "TFLOP/s", "float16 product of that shape", flop / seconds["product"])


if __name__ == "__main__":
    main()
