"""k-means over shards: one Lloyd loop, the same bytes for any number of workers.

The loop sees `Points`: it asks for the partial sums of an assignment and never for rows. `ArrayPoints` is one shard in
memory; a cluster of workers is another implementation that adds up the `PartialSums` of its shards. Sums of embeddings
are exact (methods/assignment.py), so they do not depend on how the pool is cut or who finishes first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from elfs_ray.methods.assignment import (
    FIXED_POINT_UNIT,
    add_rows,
    check_device,
    embeddings_to_device,
    exact_rows,
    flat_nonzero,
    nearest_centroids,
    row_chunks,
    squared_distances_to,
    squared_norms,
    to_fixed_point,
)
from elfs_ray.methods.hashing import hash_uint64, hash_uniform

SEED_ROWS_PER_CLUSTER = 32
MIN_SEED_ROWS = 4096
MAX_GREEDY_CLUSTERS = 2048
ESTIMATE_ROWS = 20_000
MIN_ROWS_PER_CLUSTER = 20

_MIN_DRAWS, _MAX_DRAWS = 16, 256
_DISTANCES_AT_ONCE = 2**25
_SPLIT_OFFSET = 2.0**-6
_ITERATIONS_TO_SETTLE = 5
_MAX_COUNT = 2**28

T = TypeVar("T")


@dataclass
class PartialSums:
    """What an assignment leaves of a shard: sums (k, d) float64, counts (k,) int64, squared_norms (k,) float64.

    `squared_norms` are the sums of ‖x‖² over each cluster. All three are exact, in any order of addition (‖x‖² is
    rounded to a multiple of 2^-24 first).
    """

    sums: np.ndarray
    counts: np.ndarray
    squared_norms: np.ndarray

    def __iadd__(self, other: "PartialSums") -> "PartialSums":
        self.sums += other.sums
        self.counts += other.counts
        self.squared_norms += other.squared_norms
        return self


class Points(Protocol):
    """The pool as k-means sees it: in one array, or in shards on many workers."""

    @property
    def count(self) -> int:
        """Number of samples."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    def on_sample(self, function: Callable[[torch.Tensor], T], num_rows: int, seed: int) -> T:
        """Run `function` where the data is, on rows (m, d) float16 on that device, and return what it returns.

        The rows are those of the `num_rows` samples (or all, if there are fewer) whose ids `smallest_ids` picks
        from every shard's `ArrayPoints.smallest_hashes(num_rows, seed)`, in ascending order of sample_id.
        """

    def assign(self, centroids: np.ndarray) -> PartialSums:
        """Assign every sample to the nearest of centroids (k, d) float32; return the totals over the pool."""


class ArrayPoints:
    """One shard in memory: embeddings (n, d) float16 of unit length (a memory map will do), sample_ids (n,) int64.

    Memory beside the embeddings: 32 n bytes, and k·d·8 for the sums; on a GPU the embeddings' n·d·2 bytes as well.
    Successive assignments only move the samples that changed cluster between the sums, which is exact.
    Raises ValueError for embeddings that are not finite or not of unit length (with their ids), for ids that repeat,
    and for a GPU that is not there.
    """

    def __init__(
        self, embeddings: np.ndarray, sample_ids: np.ndarray, *, device: str = "cpu", engine: str | None = None
    ):
        self._device = check_device(device)
        self._embeddings = embeddings_to_device(embeddings, sample_ids, self._device)
        self._sample_ids = sample_ids
        self._engine = engine
        self._order = np.argsort(sample_ids, kind="stable")
        if (np.diff(sample_ids[self._order]) == 0).any():
            raise ValueError("sample_ids hold an id more than once; every sample needs an id of its own")
        self._squared_norms = squared_norms(self._embeddings).div(FIXED_POINT_UNIT).round().mul(FIXED_POINT_UNIT)
        self._labels: torch.Tensor | None = None
        self._sums = torch.empty(0)

    @property
    def count(self) -> int:
        return self._embeddings.shape[0]

    @property
    def dim(self) -> int:
        return self._embeddings.shape[1]

    def smallest_hashes(self, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The `num` samples with the smallest hash of (seed, sample_id): hashes (m,) uint64, sample_ids (m,) int64."""
        hashes = hash_uint64(seed, self._sample_ids)
        if num < len(hashes):
            chosen = np.flatnonzero(hashes <= np.partition(hashes, num - 1)[num - 1])
            return hashes[chosen], self._sample_ids[chosen]
        return hashes, self._sample_ids

    def rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Embeddings (m, d) float16 of sample_ids (m,), in their order; ids of other shards are an error."""
        positions = self._order[np.searchsorted(self._sample_ids, sample_ids, sorter=self._order) % max(self.count, 1)]
        assert (self._sample_ids[positions] == sample_ids).all(), "rows asked of a shard that does not hold them"
        return self._embeddings[torch.from_numpy(positions).to(self._device)].cpu().numpy()

    def on_sample(self, function: Callable[[torch.Tensor], T], num_rows: int, seed: int) -> T:
        rows = self.rows(smallest_ids([self.smallest_hashes(num_rows, seed)], num_rows))
        return function(torch.from_numpy(rows).to(self._device))

    def assign(self, centroids: np.ndarray) -> PartialSums:
        num_clusters = len(centroids)
        labels = nearest_centroids(self._embeddings, centroids, self._engine)
        moved = None
        if self._labels is not None and self._sums.shape == centroids.shape:
            moved = flat_nonzero(labels != self._labels)
        if moved is None or len(moved) > self.count // 2:
            self._sums = torch.zeros(centroids.shape, dtype=torch.float64, device=self._device)
            add_rows(self._sums, self._embeddings, labels)
        else:
            assert self._labels is not None
            for rows in row_chunks(len(moved), self.dim, self._device):
                embeddings = self._embeddings[moved[rows]]
                add_rows(self._sums, embeddings, self._labels[moved[rows]], sign=-1)
                add_rows(self._sums, embeddings, labels[moved[rows]])
        self._labels = labels
        norms = torch.zeros(num_clusters, dtype=torch.float64, device=self._device)
        return PartialSums(
            sums=self._sums.cpu().numpy().copy(),
            counts=torch.bincount(labels, minlength=num_clusters).cpu().numpy(),
            squared_norms=norms.index_add_(0, labels, self._squared_norms).cpu().numpy(),
        )

    def label(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest centroid and Euclidean distance to it: labels (n,) int32, distances (n,) float32, in shard order."""
        labels = nearest_centroids(self._embeddings, centroids, self._engine)
        squared = squared_distances_to(self._embeddings, centroids, labels).cpu().numpy()
        return labels.int().cpu().numpy(), np.sqrt(squared).astype(np.float32)


def smallest_ids(parts: Sequence[tuple[np.ndarray, np.ndarray]], num: int) -> np.ndarray:
    """The ids of the `num` smallest hashes over the shards' (hashes, sample_ids), ascending; ties by sample_id."""
    hashes = np.concatenate([part[0] for part in parts])
    sample_ids = np.concatenate([part[1] for part in parts])
    return np.sort(sample_ids[np.lexsort((sample_ids, hashes))[:num]])


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (k, d) float32 (multiples of 2^-24) and what is known about them.

    `counts` (k,) int64 and `objective` (the sum of squared distances) are those of these very centroids; `history`
    holds the objective before every update, so that `history[-1] == objective` and an update less than its length ran.
    `attempt` is the try that won.
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
    """Where a fit stands between two iterations; `kmeans(start=...)` goes on from it to the same result."""

    attempt: int = 0
    centroids: np.ndarray | None = None
    history: tuple[float, ...] = ()
    last_split: int = -_ITERATIONS_TO_SETTLE
    best: KMeansResult | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as named arrays, as `numpy.savez` takes them."""
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
        """The state that `to_arrays` was asked for."""
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
    """Lloyd's k-means on all points, from k-means++ seeds; the try with the lowest objective wins.

    A try ends when an update lowers the objective by no more than `tolerance` of it, or after `max_iterations` updates.
    `spherical` keeps the centroids at unit length. An empty cluster takes half of the cluster with the largest squared
    error. `on_iteration` is given the state after every assignment; a fit that starts from it takes the same course.
    Raises ValueError for arguments out of range, and where the pool has fewer distinct points than clusters.
    Memory beside the points': 32 k·d bytes.
    """
    _check_arguments(points, num_clusters, max_iterations, tolerance, num_tries)
    state = start or KMeansState()
    if state.centroids is not None and state.centroids.shape != (num_clusters, points.dim):
        raise ValueError(
            f"the saved state has centroids of shape {state.centroids.shape}, this fit needs "
            f"{(num_clusters, points.dim)}; start it without the state"
        )
    while state.attempt < num_tries:
        if state.centroids is None:
            state = replace(state, centroids=_seed(points, num_clusters, seed, state.attempt))
        assert state.centroids is not None
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


def seed_centroids(rows: torch.Tensor, num_clusters: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """k-means++ seeds (k, d) float32 among rows (m, d) float16 (Arthur and Vassilvitskii, SODA 2007).

    Up to `MAX_GREEDY_CLUSTERS` clusters every seed is the best of 2 + ⌊ln k⌋ draws (that paper's greedy variant).
    Memory beside the rows: 8 m·c bytes for c = max(16, min(256, 2^25 / m)) draws at a time.
    Raises ValueError where the rows hold fewer than k distinct points.
    """
    num_candidates = 2 + int(math.log(num_clusters)) if num_clusters <= MAX_GREEDY_CLUSTERS else 1
    norms = squared_norms(rows)
    chosen = [int(hash_uniform(seed, attempt, 0) * len(rows))]
    nearest = _squared_distances(rows, norms, rows[chosen])[0]
    while len(chosen) < num_clusters:
        if not nearest.any():
            raise ValueError(
                f"num_clusters={num_clusters}, but the {len(rows)} samples that seeds are drawn from hold only "
                f"{len(chosen)} distinct embeddings; ask for at most {len(chosen)} clusters"
            )
        drawn, nearest = _draw_seeds(
            rows, norms, nearest, num_clusters - len(chosen), num_candidates, (seed, attempt, len(chosen))
        )
        chosen += drawn
    return rows[chosen].float().cpu().numpy()


@dataclass(frozen=True)
class ClusterEstimate:
    """An estimated number of clusters, and each number that was tried with its silhouette and objective."""

    num_clusters: int
    evidence: tuple[dict[str, float], ...]


def estimate_num_clusters(rows: torch.Tensor, *, seed: int, max_clusters: int = 1000) -> ClusterEstimate:
    """The number of clusters with the highest simplified silhouette, for rows (m, d) float16 of unit length.

    The silhouette (b - a) / max(a, b) of a row compares its distances a to the own and b to the next centroid; the mean
    peaks where clusters are tight and apart (Rousseeuw 1987; simplified by Hruschka et al., ICDM 2004; its peak agrees
    with the full silhouette's, Vendramin et al. 2010). Tried are 2, 3, ... in steps of about 1.4 up to `max_clusters`
    or a cluster for `MIN_ROWS_PER_CLUSTER` rows, then ever finer around the best. Run it on a sample of
    `ESTIMATE_ROWS`: `points.on_sample(partial(estimate_num_clusters, seed=seed), ESTIMATE_ROWS, seed)`.
    Memory: 16 m·k bytes for the largest k tried. Raises ValueError for too few rows or distinct rows.
    """
    points = ArrayPoints(rows.cpu().numpy(), np.arange(len(rows)), device=str(rows.device))
    num_distinct = len(np.unique(rows.cpu().numpy().view(np.dtype((np.void, 2 * points.dim)))))
    largest = min(max_clusters, len(rows) // MIN_ROWS_PER_CLUSTER, num_distinct - 1)
    if largest < 2:
        raise ValueError(
            f"{len(rows)} embeddings, {num_distinct} of them distinct, and max_clusters={max_clusters}; an estimate of "
            f"num_clusters needs at least {2 * MIN_ROWS_PER_CLUSTER}, 3 and 2: give the number of clusters yourself"
        )
    tried: dict[int, dict[str, float]] = {}
    wanted = {min(largest, round(2 * 2 ** (step / 2))) for step in range(2 * largest.bit_length())}
    while wanted:
        for num_clusters in sorted(wanted):
            tried[num_clusters] = _silhouette(points, rows, num_clusters, seed)
        best = max(tried, key=lambda k: (tried[k]["silhouette"], -k))
        neighbors = [
            max((k for k in tried if k < best), default=best),
            min((k for k in tried if k > best), default=best),
        ]
        wanted = {(best + k) // 2 for k in neighbors} - tried.keys()
    return ClusterEstimate(best, tuple(tried[k] for k in sorted(tried)))


def _silhouette(points: ArrayPoints, rows: torch.Tensor, num_clusters: int, seed: int) -> dict[str, float]:
    fit = kmeans(points, num_clusters, seed=seed, max_iterations=20, tolerance=1e-3, num_tries=2)
    centroids = torch.from_numpy(fit.centroids).to(rows.device)
    distances = _squared_distances(rows, squared_norms(rows), centroids)
    own, other = np.sqrt(distances.topk(2, dim=0, largest=False).values.cpu().numpy())
    silhouettes = np.divide(other - own, other, out=np.zeros_like(own), where=other > 0)
    return {"num_clusters": num_clusters, "silhouette": float(silhouettes.mean()), "objective": fit.objective}


def _check_arguments(points: Points, num_clusters: int, max_iterations: int, tolerance: float, num_tries: int) -> None:
    if not 1 <= num_clusters <= points.count:
        raise ValueError(
            f"num_clusters={num_clusters}, but the pool has {points.count} samples; it must be between 1 and that"
        )
    if max_iterations < 0 or num_tries < 1 or not tolerance >= 0:
        raise ValueError(
            f"max_iterations={max_iterations}, tolerance={tolerance} and num_tries={num_tries}; "
            "they must be at least 0, 0 and 1"
        )
    if points.count > _MAX_COUNT:
        raise ValueError(
            f"the pool has {points.count} samples; sums are exact up to {_MAX_COUNT}: cluster a part of the pool"
        )


def _seed(points: Points, num_clusters: int, seed: int, attempt: int) -> np.ndarray:
    num_rows = max(MIN_SEED_ROWS, SEED_ROWS_PER_CLUSTER * num_clusters)
    return points.on_sample(
        partial(seed_centroids, num_clusters=num_clusters, seed=seed, attempt=attempt), num_rows, seed
    )


def _objective(totals: PartialSums, centroids: np.ndarray) -> float:
    """Sum of squared distances from exact totals: Σ‖x‖² - 2 c·Σx + n‖c‖², cluster by cluster."""
    products = np.einsum("kd,kd->k", centroids, totals.sums)
    norms = np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64)
    return max(0.0, math.fsum(totals.squared_norms - 2 * products + totals.counts * norms))


def _has_converged(state: KMeansState, tolerance: float) -> bool:
    """Whether the last update gained too little. The halves of a split cluster are given time to part first."""
    updates = len(state.history) - 1
    if updates < 1 or updates - state.last_split < _ITERATIONS_TO_SETTLE:
        return False
    before, after = state.history[-2:]
    return before - after <= tolerance * before


def _next_attempt(state: KMeansState, counts: np.ndarray) -> KMeansState:
    assert state.centroids is not None
    best = state.best
    if best is None or state.history[-1] < best.objective:
        best = KMeansResult(state.centroids, counts, state.history, state.attempt)
    return KMeansState(attempt=state.attempt + 1, best=best)


def _updated(state: KMeansState, totals: PartialSums, spherical: bool, seed: int) -> KMeansState:
    assert state.centroids is not None
    occupied = totals.counts > 0
    means = state.centroids.astype(np.float64)
    means[occupied] = totals.sums[occupied] / totals.counts[occupied, None]
    split = False
    if not occupied.all():
        split = _split_for_empty(means, totals, (seed, state.attempt, len(state.history)))
    if spherical:
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(norms > 0, means / np.where(norms > 0, norms, 1), state.centroids)
    last_split = len(state.history) if split else state.last_split
    return replace(state, centroids=to_fixed_point(means), last_split=last_split)


def _split_for_empty(means: np.ndarray, totals: PartialSums, key: tuple[int, int, int]) -> bool:
    """Give every empty cluster half of the one with the largest squared error; whether there was one to split.

    The two means part along a random diagonal. Clusters of equal points have no error and are never split.
    """
    counts = totals.counts.astype(np.float64)
    norms = np.einsum("kd,kd->k", means, means)
    errors = np.where(counts > 0, totals.squared_norms - counts * norms, 0.0)
    split = False
    for empty in np.flatnonzero(totals.counts == 0).tolist():
        largest = int(errors.argmax())
        if errors[largest] <= FIXED_POINT_UNIT * counts[largest]:
            break
        heads = hash_uint64(*key, empty, np.arange(means.shape[1])) >> np.uint64(63)
        spread = math.sqrt(errors[largest] / counts[largest] / means.shape[1])
        offset = _SPLIT_OFFSET * spread * np.where(heads, 1, -1)
        means[empty] = means[largest] + offset
        means[largest] -= offset
        errors[[empty, largest]] = errors[largest] / 2
        counts[[empty, largest]] = counts[largest] / 2
        split = True
    return split


def _squared_distances(rows: torch.Tensor, norms: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Squared distances (c, m) float64 of seeds (c, d) to rows (m, d), exact, then rounded up to multiples of 2^-24.

    Rounding up keeps distinct points apart, and makes sums of up to 2^26 of these distances exact too: no draw depends
    on a device's order of summation.
    """
    exact_seeds = exact_rows(seeds)
    seed_norms = exact_seeds.square().sum(1, keepdim=True)
    distances = torch.empty((len(seeds), len(rows)), dtype=torch.float64, device=rows.device)
    for chunk in row_chunks(len(rows), rows.shape[1], rows.device):
        exact = (exact_seeds @ exact_rows(rows[chunk]).T).mul_(-2).add_(seed_norms).add_(norms[chunk])
        distances[:, chunk] = exact.div_(FIXED_POINT_UNIT).ceil_().mul_(FIXED_POINT_UNIT)
    return distances


def _draw_seeds(
    rows: torch.Tensor, norms: torch.Tensor, nearest: torch.Tensor, num_wanted: int, num_candidates: int, key: tuple
) -> tuple[list[int], torch.Tensor]:
    """Up to `num_wanted` seeds, and nearest (m,), the squared distances to the closest seed, with them.

    All candidates are drawn from the distances D² to the seeds so far and measured in one matrix product. One becomes a
    draw from the distances D'² ≤ D² that count the seeds since when it is kept with probability D'²/D²; so the seeds
    are distributed as if they had been drawn one by one.
    """
    num_draws = max(_MIN_DRAWS, min(_MAX_DRAWS, _DISTANCES_AT_ONCE // len(rows), 2 * num_candidates * num_wanted))
    drawn = _draw(nearest, num_draws, key)
    distances = _squared_distances(rows, norms, rows[drawn])
    current = nearest[drawn].cpu().numpy()
    thresholds = hash_uniform(*key, 1, np.arange(num_draws)) * current
    seeds: list[int] = []
    candidates: list[int] = []
    for i in range(num_draws):
        if thresholds[i] < current[i]:
            candidates.append(i)
        if len(candidates) == num_candidates:
            lowered = distances[candidates].minimum(nearest)
            best = int(lowered.sum(1).argmin())
            seeds.append(int(drawn[candidates[best]]))
            nearest = lowered[best]
            current = nearest[drawn].cpu().numpy()
            candidates = []
        if len(seeds) == num_wanted:
            break
    return seeds, nearest


def _draw(weights: torch.Tensor, num_draws: int, key: tuple) -> torch.Tensor:
    """Positions (num_draws,), each drawn with a probability proportional to weights (m,), multiples of 2^-24."""
    cumulative = weights.cumsum(0)
    total = float(cumulative[-1])
    at = np.minimum(hash_uniform(*key, 0, np.arange(num_draws)) * total, total - FIXED_POINT_UNIT)
    return torch.searchsorted(cumulative, torch.from_numpy(at).to(weights.device), right=True)
