"""Measure a k-means iteration vs. faiss.Kmeans, scikit-learn and a matrix product, and two workers vs. one.

    python benchmarks/kmeans.py [--quick] [--only PART] [--points FILE.npy [--classes FILE.npy]]

All start from the same centroids, use all points and run the same number of iterations, ten or until ours converges;
the time of an iteration is the mean. Ours keeps embeddings in float16 with exact sums; faiss and scikit-learn get
float32. The part sizes compares 5,000 to 200,000 points and 10 to 1,000 clusters with faiss alone. The bounds are
compared with a search for all points in every iteration, over 10 iterations and until convergence, and the quality of
the clusters with that of the other libraries. The full size includes 1M x 384 and k = 1,000 on Ray workers, with the
peak memory of driver and workers. On a GPU the assignment is compared with a product of the same shape. `--points`
takes points (n, d) of your own.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle

import faiss
import numpy as np
import pyarrow as pa
import ray
import torch
from helpers.reporting import command_line, emit, peak_bytes, processes_titled, take_turns
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

from elfs_ray.config import load_config
from elfs_ray.methods.kmeans.assignment import nearest_centroids, squared_distances_to
from elfs_ray.methods.kmeans.lloyd import KMeansState, kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.cluster.shards import ShardedPoints
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

DIM, NUM_ITERATIONS, ROWS_PER_FILE = 384, 10, 16_384
SIZES, NUMS_OF_CLUSTERS = (5_000, 20_000, 50_000, 200_000), (10, 100, 256, 1000)
MAX_ITERATIONS = 50
# Of the square matrix product that measures the machine's peak rate. Not 2048: rows that lie a power of two apart would
# evict one another from the cache.
SIDE = 2000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 points, 100 clusters; under 45 s on 2 cores")
    parser.add_argument("--only", choices=("iteration", "sizes", "bounds", "workers", "quality", "million"))
    parser.add_argument("--points", help=".npy file of points (n, d), for the parts in one process")
    parser.add_argument("--classes", help=".npy file of their classes (n,), for the part quality")
    parser.add_argument("--num-clusters", type=int, help="for the parts iteration, sizes, bounds, workers")
    parser.add_argument("--num-points", type=int, help="made-up points, for the same parts")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        measure_gpu(1_000_000, 1000)
        return
    num_points, num_clusters, rounds = (20_000, 100, 3) if arguments.quick else (200_000, 256, 5)
    num_clusters, num_points = arguments.num_clusters or num_clusters, arguments.num_points or num_points

    @cache
    def points() -> np.ndarray:
        return unit(np.load(arguments.points)) if arguments.points else sample_points(num_points, seed=0)

    parts: dict[str, Callable[[], None]] = {
        "million": measure_million,  # first, so that no other part adds to the driver's peak
        "iteration": lambda: measure_iteration(points(), num_clusters, rounds),
        "sizes": lambda: measure_sizes(arguments.num_points, arguments.num_clusters),
        "bounds": lambda: measure_bounds(points(), num_clusters),
        "workers": lambda: measure_workers(num_points if arguments.quick else 2 * num_points, num_clusters, rounds),
        "quality": lambda: measure_quality(quality_sets(points(), arguments.classes), 2 if arguments.quick else 5),
    }
    for name, measure in parts.items():
        if arguments.only == name or (
            arguments.only is None and not (arguments.quick and name in ("million", "sizes"))
        ):
            measure()


def sample_points(num_points: int, seed: int) -> np.ndarray:
    """Return points (n, d) float16 of unit length around 500 centres, about as far apart as real classes."""
    centres = np.random.default_rng(0).standard_normal((500, DIM), dtype=np.float32)
    rng = np.random.default_rng([1, seed])
    points = centres[rng.integers(0, 500, num_points)] + 1.5 * rng.standard_normal((num_points, DIM), dtype=np.float32)
    return unit(points)


def unit(points: np.ndarray) -> np.ndarray:
    """Return the points as (n, d) float16 of unit length."""
    single = points.astype(np.float32)
    return (single / np.linalg.norm(single, axis=1, keepdims=True)).astype(np.float16)


def measure_iteration(points: np.ndarray, num_clusters: int, rounds: int) -> None:
    """Measure an iteration with one thread and with two."""
    for num_threads in (1, 2):
        _measure_iteration(points, num_clusters, num_threads, rounds)


def measure_sizes(num_points: int | None, num_clusters: int | None) -> None:
    """Measure an iteration vs. faiss.Kmeans for few and many points and clusters, with one thread and with two."""
    for n in [num_points] if num_points else SIZES:
        points = sample_points(n, seed=0)
        for k in [num_clusters] if num_clusters else NUMS_OF_CLUSTERS:
            rounds = 9 if n * k <= 1_000_000 else 3 if n * k <= 5_000_000 else 1
            for num_threads in (1, 2):
                with threads(num_threads):
                    fits, num_iterations = iterations_of_both(points, k)
                    seconds = take_turns(fits, rounds)
                ours_s, faiss_s = (total / num_iterations for total in seconds.values())
                name = f"k-means iteration, {shape_of(points, k, num_threads)}"
                emit(name, ours_s, "s", "faiss.Kmeans", faiss_s, less_is_better=True)


def iterations_of_both(points: np.ndarray, num_clusters: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Return fits by ours and by faiss.Kmeans from the same centroids, and the number of iterations of each.

    That is ten, or fewer where ours ends because the clusters no longer change.
    """
    ids, single, start = np.arange(len(points)), points.astype(np.float32), sample_start(points, num_clusters)
    state = KMeansState(centroids=start)

    def ours() -> int:
        fit = kmeans(
            ArrayPoints(points, ids), num_clusters, seed=0, max_iterations=NUM_ITERATIONS - 1, tolerance=0, start=state
        )
        return len(fit.history)  # of assignments: one more than the updates

    num_iterations = ours()

    def by_faiss() -> None:
        # It would warn of every fit with fewer than 39 points a cluster.
        fit = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=num_iterations,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        fit.train(single, init_centroids=start)

    return {"ours": ours, "faiss.Kmeans": by_faiss}, num_iterations


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Let torch, faiss and the BLAS libraries use so many threads."""
    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)
    with threadpool_limits(num_threads):
        yield


def shape_of(points: np.ndarray, num_clusters: int, num_threads: int) -> str:
    """Return the sizes of a fit in words."""
    return f"{len(points):,} x {points.shape[1]}, k = {num_clusters}, {num_threads} thread{'s' * (num_threads > 1)}"


def _measure_iteration(points: np.ndarray, num_clusters: int, num_threads: int, rounds: int) -> None:
    single, dim = points.astype(np.float32), points.shape[1]
    start = sample_start(points, num_clusters)
    flop = 2.0 * len(points) * num_clusters * dim
    square = torch.randn(SIDE, SIDE)

    def by_scikit_learn() -> None:
        KMeans(num_clusters, init=start, n_init=1, max_iter=num_iterations, tol=0, algorithm="lloyd").fit(single)

    with threads(num_threads):
        fits, num_iterations = iterations_of_both(points, num_clusters)
        seconds = take_turns(
            {
                **fits,
                "scikit-learn": by_scikit_learn,
                "matmul": lambda: [square @ square for _ in range(10)],
                "assignment": lambda: nearest_centroids(torch.from_numpy(points), start, "torch"),
                "assignment by faiss": lambda: nearest_centroids(torch.from_numpy(points), start, "faiss"),
            },
            rounds,
        )
    shape = shape_of(points, num_clusters, num_threads)
    for name in ("faiss.Kmeans", "scikit-learn"):
        ours_s, other_s = (seconds[key] / num_iterations for key in ("ours", name))
        emit(f"k-means iteration, {shape}", ours_s, "s", name, other_s, less_is_better=True)
    by_torch, by_faiss_s = seconds["assignment"], seconds["assignment by faiss"]
    emit(f"assignment, torch engine, {shape}", by_torch, "s", "faiss engine", by_faiss_s, less_is_better=True)
    ceiling = 10 * 2.0 * SIDE**3 / seconds["matmul"] / 1e9
    rate = flop / seconds["assignment"] / 1e9
    emit(f"arithmetic of an assignment, {shape}", rate, "GFLOP/s", "matrix product of 2000²", ceiling)


class SearchingForAll(ArrayPoints):
    """Points without bounds: every iteration searches for every point."""

    def _nearest(self, centroids: np.ndarray) -> torch.Tensor:
        return nearest_centroids(self._embeddings, centroids, "torch")


def measure_bounds(points: np.ndarray, num_clusters: int) -> None:
    """Measure what is saved by searching only for points whose centroid may have changed, with identical results."""
    ids, start = np.arange(len(points)), KMeansState(centroids=sample_start(points, num_clusters))
    torch.set_num_threads(1)
    for tolerance, max_iterations in ((0, NUM_ITERATIONS - 1), (1e-4, 100), (0, 100)):
        seconds, fits = {}, {}
        for kind in (ArrayPoints, SearchingForAll):
            start_s = time.perf_counter()
            fits[kind] = kmeans(
                kind(points, ids),
                num_clusters,
                seed=0,
                max_iterations=max_iterations,
                tolerance=tolerance,
                start=start,
            )
            seconds[kind] = time.perf_counter() - start_s
        fit, other = fits.values()
        assert fit.centroids.tobytes() == other.centroids.tobytes() and fit.history == other.history
        end = f"{len(fit.history)} iterations" + (f" to a relative change of {tolerance}" if tolerance else "")
        name = f"k-means, {len(points):,} x {points.shape[1]}, k = {num_clusters}, 1 thread, {end}"
        emit(name, seconds[ArrayPoints], "s", "a search for all points", seconds[SearchingForAll], less_is_better=True)


def sample_start(points: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return centroids (k, d) float32 to start from: points sampled at random."""
    rows = np.random.default_rng(2).choice(len(points), num_clusters, replace=False)
    return points[rows].astype(np.float32)


def measure_workers(num_points: int, num_clusters: int, rounds: int) -> None:
    """Measure an assignment of all points with its sums, on one and on two Ray workers of one thread each."""
    connect("local", num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        write_embeddings(run_dir, num_points)
        starts = far_apart(num_clusters)
        medians: dict[int, list[float]] = {}
        for num_workers in (1, 2, 1, 2):  # in turns, as the machine's speed drifts
            points = ShardedPoints(stage_config(run_dir, num_workers), run_dir)
            medians.setdefault(num_workers, []).append(seconds_of_assignment(points, starts, rounds))
            points.release()
        one_s, two_s = (float(np.mean(medians[number])) for number in (1, 2))
        name = f"an assignment by two workers, {num_points:,} x {DIM}, k = {num_clusters}"
        emit(name, two_s, "s", "by one worker", one_s, less_is_better=True)


def seconds_of_assignment(points: ShardedPoints, starts: Iterator[np.ndarray], rounds: int) -> float:
    return take_turns({"assign": lambda: points.assign(next(starts))}, rounds)["assign"]


def far_apart(num_clusters: int) -> Iterator[np.ndarray]:
    """Yield centroids unrelated to the previous ones, so that the bounds save no search."""
    return cycle([sample_points(num_clusters, seed=seed).astype(np.float32) for seed in (9, 10)])


def measure_million() -> None:
    """Measure 1M x 384 and k = 1,000 on two workers: seconds, and the peak memory of driver and workers."""
    connect("local", num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        # In a task, so that the driver's peak memory is that of clustering.
        ray.get(ray.remote(write_embeddings).remote(run_dir, 1_000_000))
        points = ShardedPoints(stage_config(run_dir, 2), run_dir)
        starts = far_apart(1000)
        seconds = take_turns({"assign": lambda: points.assign(next(starts))}, 2)["assign"]
        result = kmeans(points, 1000, seed=0, max_iterations=2)
        assert len(result.centroids) == 1000
        workers = [peak_bytes(pid) for pid in processes_titled("ray::_Shard")]
        points.release()
    torch.set_num_threads(2)
    square = torch.randn(SIDE, SIDE)
    ceiling = 2.0 * SIDE**3 / take_turns({"matmul": lambda: square @ square}, 20)["matmul"] / 1e9
    rate = 2.0 * 1e9 * DIM / seconds / 1e9
    name = "1M x 384, k = 1,000"
    emit(f"{name}: an iteration of two workers", rate, "GFLOP/s", "matrix product of 2000², two threads", ceiling)
    size_mib = 4.0 * DIM * 1e6 / 2**20
    for who, peak in (("driver", peak_bytes()), ("larger worker", max(workers))):
        emit(f"{name}: {who}'s peak", peak / 2**20, "MiB", "all points in float32", size_mib, less_is_better=True)


def measure_quality(sets: dict[str, tuple[np.ndarray, np.ndarray, int]], num_seeds: int) -> None:
    """Compare the objective and the NMI with the classes to those of faiss.Kmeans and scikit-learn, one try a seed."""
    for name, (points, classes, num_clusters) in sets.items():
        ids, single = np.arange(len(points)), points.astype(np.float32)
        results: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for seed in range(num_seeds):
            fit = kmeans(ArrayPoints(points, ids), num_clusters, seed=seed, max_iterations=MAX_ITERATIONS)
            by_faiss = faiss.Kmeans(
                points.shape[1], num_clusters, niter=MAX_ITERATIONS, seed=seed + 1, max_points_per_centroid=len(points)
            )
            by_faiss.train(single)
            other = KMeans(num_clusters, max_iter=MAX_ITERATIONS, random_state=seed).fit(single)
            ends = {"ours": fit.centroids, "faiss.Kmeans": by_faiss.centroids, "scikit-learn": other.cluster_centers_}
            for who, centroids in ends.items():
                labels = nearest_centroids(torch.from_numpy(points), centroids)
                squared = squared_distances_to(torch.from_numpy(points), centroids, labels)
                results[who].append((float(squared.sum()), normalized_mutual_info_score(classes, labels)))
        (objective, nmi), *others = (np.mean(results[who], axis=0) for who in ("ours", "faiss.Kmeans", "scikit-learn"))
        shape = f"{name}, {len(points):,} x {points.shape[1]}, k = {num_clusters}, {num_seeds} seeds"
        for who, (other_objective, other_nmi) in zip(("faiss.Kmeans", "scikit-learn"), others, strict=True):
            emit(f"objective, {shape}", objective, "sum of squares", who, other_objective, less_is_better=True)
            emit(f"NMI with the classes, {shape}", nmi, "", who, other_nmi)


def quality_sets(points: np.ndarray, classes_file: str | None) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Return points, their classes and a number of clusters: for digits, for blobs, and for `points` with classes."""
    images, digits = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    blobs = random.integers(0, 20, 20_000)
    rows = random.standard_normal((20, 32))[blobs] + 0.3 * random.standard_normal((20_000, 32))
    sets = {"digits": (unit(images - images.mean(1, keepdims=True)), digits, 10), "blobs": (unit(rows), blobs, 20)}
    if classes_file:
        classes = np.load(classes_file)
        sets["points"] = (points, classes, len(np.unique(classes)))
    return sets


def measure_gpu(num_points: int, num_clusters: int) -> None:
    """Measure the assignment on a GPU vs. a float16 product of its shape."""
    points = torch.from_numpy(sample_points(num_points, seed=0)).cuda()
    centroids = sample_points(num_clusters, seed=9).astype(np.float32)
    right = torch.from_numpy(centroids).cuda().half().T.contiguous()

    def finished(call) -> None:
        call()
        torch.cuda.synchronize()

    contestants = {
        "ours": lambda: finished(lambda: nearest_centroids(points, centroids)),
        "product": lambda: finished(lambda: [part @ right for part in points.split(65_536)]),
    }
    seconds = take_turns(contestants, 9)
    flop = 2.0 * num_points * num_clusters * DIM / 1e12
    name = f"assignment on the GPU, {num_points:,} x {DIM}, k = {num_clusters}"
    emit(name, flop / seconds["ours"], "TFLOP/s", "float16 product of that shape", flop / seconds["product"])


def write_embeddings(run_dir: RunDir, num_points: int) -> None:
    """Write a table of embeddings as the stage embed does, a file at a time."""
    for first in range(0, num_points, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_points))
        column = schema.matrix_column(sample_points(len(ids), seed=first))
        table = pa.table([ids, column], schema=schema.embeddings_schema(DIM))
        path = run_dir.path(schema.EMBEDDINGS, schema.range_file(int(ids[0]), int(ids[-1])))
        filesystem.write_table(path, table)
    run_dir.mark_complete(Marker("embed", {}, {}, EmbedResult(num_points, 0, DIM).to_json()))


def stage_config(run_dir: RunDir, num_workers: int):
    required = [
        "pool.uri=/made/up",
        "budget=0.1",
        "cluster.num_clusters=2",
        "select.method=double_end",
        "select.hard_fraction=0.1",
    ]
    return load_config(None, [f"run_dir={run_dir.uri}", f"cluster.num_workers={num_workers}", *required]).cluster


if __name__ == "__main__":
    main()
