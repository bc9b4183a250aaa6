"""Measure selection by coverage: the stage's work on a large pool, and its core vs. submodlib and apricot-select.

    python benchmarks/coverage.py [--quick]

The pool is clustered, of 384 dimensions, made by a seeded generator; two CPUs select from it, as in a run that has been
embedded. The two libraries (pip install submodlib-py apricot-select) are measured where they are installed, with one
thread as ours; all compute the same kernel first. Memory is the peak of all processes beyond their memory when idle,
with Ray's object store.
"""

import importlib.util
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from helpers.reporting import command_line, emit, take_turns
from kmeans import DIM, sample_points, write_embeddings
from selection import Peak, memory_of_ray
from threadpoolctl import threadpool_limits

from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, facility_location, highest_similarity
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.select.coverage import score_by_coverage
from elfs_ray.stages.select.run import IDS_PER_FILE
from elfs_ray.stages.select.scored_pool import DIRECTIONS, ScoredPool
from elfs_ray.stages.select.unscored_pool import write_pool
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

TARGET_S, TARGET_GIB = 600.0, 4.0  # for a million samples and a budget of 10,000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller pools; under 45 s on 2 cores")
    quick = parser.parse_args().quick
    measure_core(*((3_000, 150, 1) if quick else (20_000, 1_000, 3)))
    measure_pool(*((45_000, 450) if quick else (1_000_000, 10_000)))


def measure_core(num_points: int, budget: int, rounds: int) -> None:
    """Measure the selection from one matrix of similarities vs. the libraries, and how well each covers the points."""
    torch.set_num_threads(1)
    points = sample_points(num_points, seed=0).astype(np.float32)
    contestants: dict[str, Callable[[], np.ndarray]] = {"ours": lambda: facility_location(points, budget).order}
    for name, module, select in (("submodlib", "submodlib", by_submodlib), ("apricot", "apricot", by_apricot)):
        if importlib.util.find_spec(module):
            contestants[name] = lambda select=select: select(points, budget)  # type: ignore[misc]
        else:
            print(f"{name} is not installed and is left out", flush=True)
    with threadpool_limits(1):
        seconds = take_turns(contestants, rounds)
        covered = {name: coverage_of(points, points[select()]) for name, select in contestants.items()}
    for name in contestants:
        if name != "ours":
            title = f"{budget:,} of {num_points:,} x {DIM}"
            emit(f"coverage selects {title}", seconds["ours"], "s", name, seconds[name], less_is_better=True)
            emit(f"mean similarity to {title}", covered["ours"], "similarity", name, covered[name])


def kernel(points: np.ndarray) -> np.ndarray:
    return np.exp(points @ points.T - 1)


def coverage_of(points: np.ndarray, chosen: np.ndarray) -> float:
    return float(highest_similarity(points, chosen).mean()) / SIMILARITY_ONE


def by_submodlib(points: np.ndarray, budget: int) -> np.ndarray:
    functions = importlib.import_module("submodlib.functions.facilityLocation")
    function = functions.FacilityLocationFunction(n=len(points), mode="dense", sijs=kernel(points), separate_rep=False)
    chosen = function.maximize(budget=budget, optimizer="LazyGreedy", show_progress=False)
    return np.array([position for position, _ in chosen])


def by_apricot(points: np.ndarray, budget: int) -> np.ndarray:
    apricot = importlib.import_module("apricot")
    selection = apricot.FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy")
    return selection.fit(kernel(points)).ranking


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
            _, (coverage,) = score_by_coverage(run_dir, pool, 0, [budget], inside_classes=False)
    title = f"coverage selects {budget:,} of {num_samples:,} x {DIM}"
    emit(title, measured.seconds, "s", "target for a million", TARGET_S, less_is_better=True)
    gib = (measured.peak_bytes - idle) / 2**30
    emit(f"memory: {title}", gib, "GiB", "target for a million", TARGET_GIB, less_is_better=True)
    emit(f"mean similarity: {title}", coverage.coreset, "similarity", "random samples", coverage.random)


if __name__ == "__main__":
    main()
