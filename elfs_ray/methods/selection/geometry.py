"""Label-free baselines that need no training: prototypicality, D2 and ZCore, over embeddings and neighbours in memory.

They are rivals to stand beside ELFS, made for pools of 50,000 to about a million samples. Prototypicality can be scored
in pieces of the pool, ZCore in pieces of its draws against the whole pool; D2 takes one sample after another.
"""

import heapq
from collections.abc import Iterable

import numpy as np

from elfs_ray.methods.numeric.hashing import hash_uniform

_ROWS = 4096  # samples compared with all centroids at a time
_DRAWS = 50_000  # draws in a range of votes
_PROBE = 2048  # distances looked at to guess a bound
_DIMS_STREAM, _POINT_STREAM, _START_STREAM = 1, 2, 3


def prototypicality(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return each sample's cosine distance to its nearest centroid, (n,) float32; far is hard (2206.14486, section 5).

    embeddings: (n, d) float16 or float32, unit length; centroids: (k, d) float32 of k-means over them, any length > 0.
    The nearest centroid is found in float32, its distance then taken in float64. The farthest
    are kept. Memory: 4 · (d + k) · min(n, 4096) bytes.
    Raises ValueError for shapes that do not fit and centroids of length 0.
    """
    if embeddings.ndim != 2 or centroids.ndim != 2 or embeddings.shape[1] != centroids.shape[1]:
        raise ValueError(f"embeddings {embeddings.shape} and centroids {centroids.shape} must be (n, d) and (k, d)")
    lengths = np.linalg.norm(centroids.astype(np.float64), axis=1)
    if not (lengths > 0).all():
        raise ValueError(
            f"centroids {np.flatnonzero(~(lengths > 0))[:5].tolist()} have no direction; fit k-means again"
        )
    prototypes = centroids / lengths[:, None]
    columns = prototypes.T.astype(np.float32)
    distances = np.empty(len(embeddings), np.float32)
    for begin in range(0, len(embeddings), _ROWS):
        rows = embeddings[begin : begin + _ROWS]
        nearest = (rows.astype(np.float32) @ columns).argmax(axis=1)
        distances[begin : begin + _ROWS] = 1 - np.einsum("ij,ij->i", rows.astype(np.float64), prototypes[nearest])
    return distances


def d2_selection(
    neighbors: np.ndarray,
    similarity: np.ndarray,
    budget_count: int,
    difficulty: np.ndarray | None = None,
    gamma_forward: float = 1.0,
    gamma_reverse: float = 1.0,
) -> np.ndarray:
    """D2 pruning (2310.07931): spread difficulty over the k-NN graph, then take the top sample and discount around it.

    forward: x_i ← x_i + Σ_j exp(-γ_f d_ij²) x_j over i's neighbours; then, until the budget is met, the sample i of
    highest x is taken and each of its neighbours loses exp(-γ_r d_ij²) x_i. d² = 2 - 2 · cosine, the squared distance
    of unit vectors (the authors' code has d for d², the paper's equations are followed here).

    neighbors: (n, k) int, positions of each sample's nearest, self excluded; similarity: (n, k) float32 cosine; the
    paper uses k of 5 to 15, so give the first columns. difficulty: (n,) not negative; by default 1 for all, the form
    without labels, in which the graph alone decides. Returns positions (budget_count,) int64 in the order taken; equal
    samples by position. Raises ValueError for shapes, positions and budgets that do not fit.

    Time O(n log n + budget · k log n), on one core: seconds at 50,000 samples, a minute or two at a million, and no
    workers to share it, since each choice depends on the one before. Memory: 24 · n · k bytes, and about 150 a sample.
    """
    n = len(neighbors)
    if neighbors.ndim != 2 or neighbors.shape != similarity.shape:
        raise ValueError(f"neighbors {neighbors.shape} and similarity {similarity.shape} must both be (n, k)")
    if neighbors.size and not 0 <= neighbors.min() <= neighbors.max() < n:
        raise ValueError(
            f"neighbors must hold positions 0 to {n - 1}; they hold {neighbors.min()} to {neighbors.max()}"
        )
    if not 1 <= budget_count <= n:
        raise ValueError(f"budget is {budget_count} samples of a pool of {n}; needed: 1 to the whole pool")
    start = np.ones(n) if difficulty is None else difficulty.astype(np.float64)
    if start.shape != (n,) or not (start >= 0).all():
        raise ValueError(f"difficulty must hold {n} values, none negative or NaN; shift it if it is a margin")
    squared = np.maximum(2 - 2 * similarity.astype(np.float64), 0)
    spread = start + (np.exp(-gamma_forward * squared) * start[neighbors]).sum(axis=1)
    return _take_and_discount(spread, neighbors, np.exp(-gamma_reverse * squared), budget_count)


def _take_and_discount(
    scores: np.ndarray, neighbors: np.ndarray, discounts: np.ndarray, budget_count: int
) -> np.ndarray:
    """Greedily take the highest score and subtract its discounted score from its neighbours, `budget_count` times.

    The heap keeps outdated entries; an entry counts only while it shows the sample's present score.
    """
    present = scores.tolist()
    heap = [(-score, position) for position, score in enumerate(present)]
    heapq.heapify(heap)
    taken = np.zeros(len(present), bool)
    order: list[int] = []
    while len(order) < budget_count:
        negative_score, position = heapq.heappop(heap)
        if taken[position] or -negative_score != present[position]:
            continue
        taken[position] = True
        order.append(position)
        for neighbor, discount in zip(neighbors[position].tolist(), discounts[position].tolist(), strict=True):
            if not taken[neighbor]:  # keeps the heap small
                present[neighbor] -= discount * present[position]
                heapq.heappush(heap, (-present[neighbor], neighbor))
    return np.array(order, np.int64)


def zcore_scores(
    embeddings: np.ndarray,
    sample_ids: np.ndarray,
    seed: int,
    num_draws: int = 1_000_000,
    num_neighbors: int = 1000,
    exponent: float = 4.0,
) -> np.ndarray:
    """ZCore (2411.15349): reward samples that cover random 2-d subspaces, penalise those that repeat a covering one.

    Scores start uniform in [0, 1) by (seed, sample_id), gain the votes of `zcore_votes` and are scaled to [0, 1].
    High is kept.

    embeddings: (n, d) float16 or float32, n and d at least 2; sample_ids: (n,) int64; num_draws, num_neighbors and
    exponent are the authors' by default. Returns (n,) float32. Raises ValueError for smaller shapes, settings below 1.
    Time: 0.2 to 0.3 ms a draw at 50,000 samples on one core, linear in n: 4 minutes for the published million, a minute
    for 250,000, whose choice of samples is noisier. The work can be shared out: the votes of the `zcore_draws` ranges,
    made anywhere and added in their order, give the same scores.
    """
    votes = (zcore_votes(embeddings, draws, seed, num_neighbors, exponent) for draws in zcore_draws(num_draws))
    return zcore_sum(sample_ids, votes, seed)


def zcore_sum(sample_ids: np.ndarray, votes: Iterable[np.ndarray], seed: int) -> np.ndarray:
    """Add the votes of `zcore_votes`, in the order of `zcore_draws`, to the uniform start; scaled, (n,) float32."""
    scores = hash_uniform(seed, _START_STREAM, sample_ids)
    for own in votes:
        scores += own
    lowest, highest = scores.min(), scores.max()
    return ((scores - lowest) / (highest - lowest)).astype(np.float32)


def zcore_draws(num_draws: int) -> list[range]:
    """Divide the draws into the ranges whose votes `zcore_scores` adds, of 50,000 each."""
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; ZCore needs at least 1, and has a million in the paper")
    return [range(begin, min(begin + _DRAWS, num_draws)) for begin in range(0, num_draws, _DRAWS)]


def zcore_votes(
    embeddings: np.ndarray, draws: range, seed: int, num_neighbors: int = 1000, exponent: float = 4.0
) -> np.ndarray:
    """Sum the coverage rewards and redundancy penalties of some of ZCore's draws, (n,) float64.

    Each draw picks two dimensions and a point in them, triangular between each dimension's minimum, median and maximum.
    The sample nearest to the point (L1) gains 1. Its `num_neighbors` nearest samples in the subspace share a loss of 1
    in proportion to distance**-exponent; if one coincides with it, that one (the first) loses 1 alone. Dimensions and
    points are hashes of (seed, draw); distances are float32, ties go to the lowest position.
    Memory: 4 · n · d + 20 · n + 64 · draws bytes.
    """
    n, num_dims = embeddings.shape
    if n < 2 or num_dims < 2:
        raise ValueError(f"embeddings are {embeddings.shape}; ZCore needs at least 2 samples and 2 dimensions")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}; ZCore needs at least 1 to measure redundancy")
    columns = np.ascontiguousarray(embeddings.T, np.float32)
    votes = np.zeros(n)
    work = np.empty((2, n), np.float32)
    for first, second, point in zip(*_draw_points(columns, draws, seed), strict=True):
        x, y = columns[first], columns[second]
        covering = int(_l1_distances(x, y, point[0], point[1], work).argmin())
        votes[covering] += 1
        distances = _l1_distances(x, y, x[covering], y[covering], work)
        distances[covering] = np.inf
        near = _nearest(distances, min(num_neighbors, n - 1))
        _share_penalty(votes, near, distances[near], exponent)
    return votes


def _draw_points(columns: np.ndarray, draws: range, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw two distinct dimensions (m,) int64 each, and a triangular point (m, 2) float32 in them, for m draws."""
    num_dims, numbers = len(columns), np.asarray(draws)
    firsts = (hash_uniform(seed, _DIMS_STREAM, numbers, 0) * num_dims).astype(np.int64)
    seconds = (hash_uniform(seed, _DIMS_STREAM, numbers, 1) * (num_dims - 1)).astype(np.int64)
    seconds += seconds >= firsts
    low, high = columns.min(axis=1).astype(np.float64), columns.max(axis=1).astype(np.float64)
    mode = np.median(columns, axis=1).astype(np.float64)
    points = np.empty((len(draws), 2), np.float32)
    for axis, dims in enumerate((firsts, seconds)):
        uniform = hash_uniform(seed, _POINT_STREAM, numbers, axis)
        points[:, axis] = _triangular(uniform, low[dims], mode[dims], high[dims])
    return firsts, seconds, points


def _triangular(uniform: np.ndarray, low: np.ndarray, mode: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Invert the triangular distribution's cumulative function."""
    width, rise = high - low, mode - low
    on_rise = uniform * width <= rise
    return np.where(
        on_rise, low + np.sqrt(uniform * width * rise), high - np.sqrt((1 - uniform) * width * (high - mode))
    )


def _l1_distances(x: np.ndarray, y: np.ndarray, a: np.float32, b: np.float32, work: np.ndarray) -> np.ndarray:
    """Return |x - a| + |y - b|, (n,) float32, in the first row of `work`, (2, n) float32."""
    np.abs(np.subtract(x, a, out=work[0]), out=work[0])
    np.abs(np.subtract(y, b, out=work[1]), out=work[1])
    return np.add(work[0], work[1], out=work[0])


def _nearest(distances: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the `count` smallest distances, ties to the lowest position, in no particular order.

    A sparse sample of the distances gives a bound that most often lets a little more than `count` through; when it lets
    fewer, all are candidates. Partitioning the candidates alone is several times faster than partitioning all.
    """
    probe = distances[:: max(1, distances.size // _PROBE)]
    expected = count * probe.size / distances.size
    rank = min(int(expected + 3 * expected**0.5) + 4, probe.size - 1)
    candidates = np.flatnonzero(distances <= np.partition(probe, rank)[rank])
    if candidates.size < count:
        candidates = np.arange(distances.size)
    limit = np.partition(distances[candidates], count - 1)[count - 1]
    inside = candidates[distances[candidates] <= limit]
    if inside.size > count:
        inside = inside[np.argsort(distances[inside], kind="stable")[:count]]
    return inside


def _share_penalty(votes: np.ndarray, near: np.ndarray, distances: np.ndarray, exponent: float) -> None:
    """Take 1 from the neighbours' votes, by distance**-exponent, or all of it from the first that coincides."""
    nearest = distances.min()
    if nearest == 0:
        votes[near[distances == 0].min()] -= 1
        return
    weights = (float(nearest) / distances.astype(np.float64)) ** exponent
    votes[near] -= weights / weights.sum()
