"""Lloyd's k-means over shards: one loop, and the same bytes for any number of workers.

The loop sees the pool as `Points` (points.py), which return the sums of an assignment and never rows. These sums are
exact (numeric/exact_arithmetic.py), so they depend neither on how the pool is cut nor on which worker finishes first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from elfs_ray.methods.kmeans.points import PartialSums, Points
from elfs_ray.methods.kmeans.seeding import seed_centroids
from elfs_ray.methods.numeric.exact_arithmetic import FIXED_POINT_UNIT, to_fixed_point
from elfs_ray.methods.numeric.hashing import hash_uint64

SEED_ROWS_PER_CLUSTER = 32
MIN_SEED_ROWS = 4096
_SPLIT_OFFSET = 2.0**-6  # relative to a cluster's spread: small, but enough for the two halves to move apart
_ITERATIONS_TO_SETTLE = 5
_MAX_COUNT = 2**28  # coordinates are multiples of 2^-24 of at most 1: more of them might not fit float64's 53 bits


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (k, d) float32, multiples of 2^-24, with their cluster sizes and objective.

    `counts` (k,) int64 and `objective`, the sum of squared distances, belong to exactly these centroids. `history` is
    the objective before every update and the final one. `attempt` is the number of the try that won, from 0.
    """

    centroids: np.ndarray
    counts: np.ndarray
    history: tuple[float, ...]
    attempt: int

    @property
    def objective(self) -> float:
        return self.history[-1]

    @property
    def num_iterations(self) -> int:
        return len(self.history) - 1


@dataclass(frozen=True)
class KMeansState:
    """The state of a fit between two iterations, from which `kmeans(start=...)` resumes to the same result."""

    attempt: int = 0
    centroids: np.ndarray | None = None
    history: tuple[float, ...] = ()
    last_split: int = -_ITERATIONS_TO_SETTLE  # long ago: nothing to wait for before the first split
    best: KMeansResult | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the state as named arrays for `numpy.savez`."""
        arrays = {"attempt": np.array(self.attempt), "last_split": np.array(self.last_split)}
        arrays["history"] = np.array(self.history, dtype=np.float64)
        if self.centroids is not None:
            arrays["centroids"] = self.centroids
        if self.best is not None:
            arrays["best_centroids"] = self.best.centroids
            arrays["best_counts"] = self.best.counts
            arrays["best_history"] = np.array(self.best.history, dtype=np.float64)
            arrays["best_attempt"] = np.array(self.best.attempt)
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "KMeansState":
        """Return the state whose `to_arrays` gave these arrays."""
        best = None
        if "best_centroids" in arrays:
            best = KMeansResult(
                centroids=arrays["best_centroids"],
                counts=arrays["best_counts"],
                history=tuple(arrays["best_history"].tolist()),
                attempt=int(arrays["best_attempt"]),
            )
        return KMeansState(
            attempt=int(arrays["attempt"]),
            centroids=arrays.get("centroids"),
            history=tuple(arrays["history"].tolist()),
            last_split=int(arrays["last_split"]),
            best=best,
        )


def kmeans(
    points: Points,
    num_clusters: int,
    *,
    seed: int,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    num_tries: int = 1,
    spherical: bool = False,
    start: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] | None = None,
) -> KMeansResult:
    """Run Lloyd's k-means on all points, from k-means++ seeds, and return the try with the lowest objective.

    A try ends when an update lowers the objective by no more than `tolerance` of it, or after `max_iterations` updates.
    `spherical` keeps the centroids at unit length. An empty cluster takes half of the cluster with the largest squared
    error. `on_iteration` is called with the state after every assignment; a fit that starts from that state ends in the
    same bytes. Memory beside the points': 32 k·d bytes.
    Raises ValueError for arguments out of range, and where the pool has fewer distinct points than clusters.
    """
    _check_arguments(points, num_clusters, max_iterations, tolerance, num_tries)
    state = start or KMeansState()
    if state.centroids is not None and state.centroids.shape != (num_clusters, points.dim):
        raise ValueError(
            f"the saved state has centroids of shape {state.centroids.shape}, but this fit needs "
            f"{(num_clusters, points.dim)}; start without the state"
        )
    while state.attempt < num_tries:
        if state.centroids is None:
            state = replace(state, centroids=_seed(points, num_clusters, seed, state.attempt))
        assert state.centroids is not None
        # Assigning before the update means that counts and objective always belong to the centroids that are kept.
        totals = points.assign(state.centroids)
        assert totals.counts.sum() == points.count, "an assignment lost or repeated samples"
        state = replace(state, history=(*state.history, _objective(totals, state.centroids)))
        if _has_converged(state, tolerance) or len(state.history) > max_iterations:
            state = _next_attempt(state, totals.counts)
        else:
            state = _updated(state, totals, spherical, seed)
        if on_iteration is not None:
            on_iteration(state)
    assert state.best is not None
    return state.best


def _check_arguments(points: Points, num_clusters: int, max_iterations: int, tolerance: float, num_tries: int) -> None:
    if not 1 <= num_clusters <= points.count:
        raise ValueError(
            f"num_clusters={num_clusters}, but the pool has {points.count} samples; it must be between 1 and "
            f"{points.count}"
        )
    if max_iterations < 0 or num_tries < 1 or not tolerance >= 0:
        raise ValueError(
            f"max_iterations={max_iterations}, tolerance={tolerance} and num_tries={num_tries}; "
            "they must be at least 0, 0 and 1"
        )
    if points.count > _MAX_COUNT:
        raise ValueError(
            f"the pool has {points.count} samples, but sums are exact for at most {_MAX_COUNT}; cluster a part of the "
            "pool"
        )


def _seed(points: Points, num_clusters: int, seed: int, attempt: int) -> np.ndarray:
    # Seeds come from a sample: k-means++ over the whole pool would take k passes over every shard.
    num_rows = max(MIN_SEED_ROWS, SEED_ROWS_PER_CLUSTER * num_clusters)
    return points.on_sample(
        partial(seed_centroids, num_clusters=num_clusters, seed=seed, attempt=attempt), num_rows, seed
    )


def _objective(totals: PartialSums, centroids: np.ndarray) -> float:
    """Return the sum of squared distances from exact totals: Σ‖x‖² - 2 c·Σx + n‖c‖², cluster by cluster."""
    # The three terms nearly cancel. Totals are exact and fsum rounds once, so only the products round; still, clusters
    # of identical points could come out a little below 0.
    products = np.einsum("kd,kd->k", centroids, totals.sums)
    norms = np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64)
    return max(0.0, math.fsum(totals.squared_norms - 2 * products + totals.counts * norms))


def _has_converged(state: KMeansState, tolerance: float) -> bool:
    """Return True where the last update lowered the objective by no more than `tolerance` of it."""
    # The halves of a split cluster start almost equal and gain little at first: give them time to move apart.
    updates = len(state.history) - 1
    if updates < 1 or updates - state.last_split < _ITERATIONS_TO_SETTLE:
        return False
    before, after = state.history[-2:]
    return before - after <= tolerance * before


def _next_attempt(state: KMeansState, counts: np.ndarray) -> KMeansState:
    assert state.centroids is not None
    best = state.best
    if best is None or state.history[-1] < best.objective:  # of equal tries the first wins
        best = KMeansResult(state.centroids, counts, state.history, state.attempt)
    return KMeansState(attempt=state.attempt + 1, best=best)


def _updated(state: KMeansState, totals: PartialSums, spherical: bool, seed: int) -> KMeansState:
    assert state.centroids is not None
    occupied = totals.counts > 0
    means = state.centroids.astype(np.float64)
    means[occupied] = totals.sums[occupied] / totals.counts[occupied, None]  # an empty cluster keeps its centroid
    split = False
    if not occupied.all():
        split = _split_for_empty(means, totals, (seed, state.attempt, len(state.history)))
    if spherical:
        # The mean of points that cancel out has no direction: keep the centroid as it was.
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(norms > 0, means / np.where(norms > 0, norms, 1), state.centroids)
    last_split = len(state.history) if split else state.last_split
    return replace(state, centroids=to_fixed_point(means), last_split=last_split)


def _split_for_empty(means: np.ndarray, totals: PartialSums, key: tuple[int, int, int]) -> bool:
    """Give every empty cluster half of the one with the largest squared error; return True where one was split.

    `means` changes in place: the two halves move apart along a random diagonal. Clusters of equal points have no error
    and are never split.
    """
    counts = totals.counts.astype(np.float64)
    norms = np.einsum("kd,kd->k", means, means)
    errors = np.where(counts > 0, totals.squared_norms - counts * norms, 0.0)
    split = False
    for empty in np.flatnonzero(totals.counts == 0).tolist():
        largest = int(errors.argmax())
        # Squared norms are rounded to the fixed-point unit, so an error of a unit per point may be none at all.
        if errors[largest] <= FIXED_POINT_UNIT * counts[largest]:
            break
        heads = hash_uint64(*key, empty, np.arange(means.shape[1])) >> np.uint64(63)  # one coin toss per coordinate
        spread = math.sqrt(errors[largest] / counts[largest] / means.shape[1])
        offset = _SPLIT_OFFSET * spread * np.where(heads, 1, -1)
        means[empty] = means[largest] + offset
        means[largest] -= offset
        # Halve the bookkeeping as well, so that several empty clusters do not all split the same one.
        errors[[empty, largest]] = errors[largest] / 2
        counts[[empty, largest]] = counts[largest] / 2
        split = True
    return split
