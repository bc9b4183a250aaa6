"""Measure selection by coverage: the stage's work on a large pool, and its core vs. submodlib and apricot-select.

    python benchmarks/facility_location.py [--quick]

The pool is clustered, of 384 dimensions, made by a seeded generator; two CPUs select from it, as in a run that has been
embedded. The two libraries (pip install submodlib-py apricot-select) are measured where they are installed, with one
thread as ours, in seconds of processor time: on a pool of which all similarities fit into memory, the same kernel for
all, and on a larger one. There the libraries get the similarities to the 50 nearest neighbours alone, as a sparse
matrix, and ours takes the pool in parts, as by default. Memory is the peak of all processes beyond their memory when
idle, with Ray's object store.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from helpers.reporting import command_line, emit, take_turns
from kmeans import DIM, sample_points, write_embeddings
from scipy.sparse import csr_matrix
from selection import Peak, memory_of_ray
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from elfs_ray.methods.selection.coverage import (
    SIMILARITY_ONE,
    centred,
    facility_location,
    highest_similarity,
    sum_of,
)
from elfs_ray.methods.selection.in_memory import select
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.select.coverage import score_by_coverage
from elfs_ray.stages.select.run import IDS_PER_FILE
from elfs_ray.stages.select.scored_pool import DIRECTIONS, ScoredPool
from elfs_ray.stages.select.unscored_pool import write_pool
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

GRAPH_NEIGHBORS = 50
FEW = 2_000  # points up to which submodlib's sparse mode is measured: it looks up all pairs one by one
T = TypeVar("T")
TARGET_S, TARGET_GIB = 600.0, 4.0  # for a million samples and a budget of 10,000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller pools; under 45 s on 2 cores")
    quick = parser.parse_args().quick
    measure_core(*((3_000, 150, 1) if quick else (10_000, 500, 3)))
    measure_sparse(*((2_000, 100) if quick else (50_000, 1_000)))
    measure_pool(*((45_000, 450) if quick else (1_000_000, 10_000)))


def measure_core(num_points: int, budget: int, rounds: int) -> None:
    """Measure the selection from one matrix of similarities vs. the libraries, and how well each covers the points."""
    torch.set_num_threads(1)
    points = sample_points(num_points, seed=0).astype(np.float32)
    contestants: dict[str, Callable[[], np.ndarray]] = {"ours": lambda: facility_location(points, budget).order}
    for name, library in installed({"submodlib": by_submodlib, "apricot": by_apricot}).items():
        contestants[name] = lambda library=library: library(kernel(points), budget)  # type: ignore[misc]
    with threadpool_limits(1):
        seconds = take_turns(contestants, rounds, clock=time.process_time)
        covered = {name: coverage_of(points, points[choose()]) for name, choose in contestants.items()}
    for name in contestants:
        if name != "ours":
            title = f"{budget:,} of {num_points:,} x {DIM}"
            emit(f"coverage selects {title}, CPU", seconds["ours"], "s", name, seconds[name], less_is_better=True)
            emit(f"mean similarity to {title}", covered["ours"], "similarity", name, covered[name])


def measure_sparse(num_points: int, budget: int) -> None:
    """Measure a selection from a pool in parts vs. the libraries' from the graph of nearest neighbours.

    In seconds of processor time, of one thread.
    """
    points = sample_points(num_points, seed=0)
    points = centred(points, sum_of(points) / num_points)
    small = nearest_similarities(points[:1_000].astype(np.float32))
    libraries = installed({"apricot": by_apricot} | ({"submodlib": by_sparse_submodlib} if num_points <= FEW else {}))
    with threadpool_limits(1):
        chosen, ours_s = timed(lambda: select(points, budget).ids)
        graph, graph_s = timed(lambda: nearest_similarities(points.astype(np.float32)))
        ours = coverage_of(points, points[chosen])
        for name, library in libraries.items():
            library(small, 10)  # compiles what is compiled at the first call
            chosen, library_s = timed(partial(library, graph, budget))
            title = f"{budget:,} of {num_points:,} x {DIM}"
            reference = f"{name}, {GRAPH_NEIGHBORS} neighbours"
            emit(f"coverage selects {title}, CPU", ours_s, "s", reference, graph_s + library_s, less_is_better=True)
            emit(f"mean similarity to {title}", ours, "similarity", reference, coverage_of(points, points[chosen]))


def timed(compute: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the seconds of processor time that it took."""
    start_s = time.process_time()
    result = compute()
    return result, time.process_time() - start_s


def installed(selectors: Mapping[str, Callable[..., np.ndarray]]) -> dict[str, Callable[..., np.ndarray]]:
    """Return the selectors whose library is installed, by its name."""
    for name in selectors:
        if not importlib.util.find_spec(name):
            print(f"{name} is not installed and is left out", flush=True)
    return {name: select for name, select in selectors.items() if importlib.util.find_spec(name)}


def kernel(points: np.ndarray) -> np.ndarray:
    return np.exp(points @ points.T - 1)


def nearest_similarities(points: np.ndarray) -> csr_matrix:
    """Return the kernel of each point (n, d) and its nearest neighbours, itself among them, as a sparse matrix."""
    search = NearestNeighbors(n_neighbors=GRAPH_NEIGHBORS, metric="cosine", algorithm="brute").fit(points)
    graph = search.kneighbors_graph(points, mode="distance")
    graph.data = np.exp(-graph.data)
    return graph.astype(np.float64)


def coverage_of(points: np.ndarray, chosen: np.ndarray) -> float:
    return float(highest_similarity(points, chosen).mean()) / SIMILARITY_ONE


def by_submodlib(similarities: np.ndarray, budget: int) -> np.ndarray:
    return _maximized(budget, n=len(similarities), mode="dense", sijs=similarities, separate_rep=False)


def by_sparse_submodlib(similarities: csr_matrix, budget: int) -> np.ndarray:
    num_points = similarities.shape[0]
    return _maximized(budget, n=num_points, mode="sparse", sijs=similarities, num_neighbors=GRAPH_NEIGHBORS)


def _maximized(budget: int, **settings: Any) -> np.ndarray:
    functions = importlib.import_module("submodlib.functions.facilityLocation")
    function = functions.FacilityLocationFunction(**settings)
    chosen = function.maximize(budget=budget, optimizer="LazyGreedy", show_progress=False)
    return np.array([position for position, _ in chosen])


def by_apricot(similarities: np.ndarray | csr_matrix, budget: int) -> np.ndarray:
    apricot = importlib.import_module("apricot")
    selection = apricot.FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy")
    return selection.fit(similarities).ranking


def measure_pool(num_samples: int, budget: int) -> None:
    """Measure what stage select does for a pool, against the target of a million samples."""
    connect("local", num_cpus=2, object_store_memory=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        write_embeddings(run_dir, num_samples)
        firsts = range(0, num_samples, IDS_PER_FILE)
        files = write_pool(run_dir, [(first, min(first + IDS_PER_FILE, num_samples) - 1) for first in firsts])
        score = schema.PROTOTYPICALITY
        pool = ScoredPool(files, score, DIRECTIONS[score], num_samples, 1)
        idle = memory_of_ray()
        with Peak(memory_of_ray) as measured:
            _, (coverage,) = score_by_coverage(run_dir, pool, 0, [budget])
    title = f"coverage selects {budget:,} of {num_samples:,} x {DIM}"
    emit(title, measured.seconds, "s", "target for a million", TARGET_S, less_is_better=True)
    gib = (measured.peak_bytes - idle) / 2**30
    emit(f"memory: {title}", gib, "GiB", "target for a million", TARGET_GIB, less_is_better=True)
    emit(f"mean similarity: {title}", coverage.coreset, "similarity", "random samples", coverage.random)


if __name__ == "__main__":
    main()
