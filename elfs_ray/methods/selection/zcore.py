"""ZCore (Griffin et al., arXiv 2411.15349): a label-free baseline that samples random 2-d subspaces of the embeddings.

Suited to pools of 50,000 to about a million samples. Workers share the random draws in ranges, each against the whole
pool.
"""

from collections.abc import Iterable

import numpy as np

from elfs_ray.methods.numeric.hashing import hash_uniform

ZCORE_NEIGHBORS, ZCORE_EXPONENT = 1000, 4.0  # the values of the authors' code
_DRAWS_PER_RANGE = 50_000  # fixed, whatever the number of workers: sums of votes would round differently otherwise
_PROBE = 2048  # distances that are looked at to guess a bound
_DIMS_STREAM, _POINT_STREAM, _START_STREAM = 1, 2, 3


def zcore_sum(sample_ids: np.ndarray, votes: Iterable[np.ndarray], seed: int) -> np.ndarray:
    """Return ZCore's scores, (n,) float32 from 0 to 1, of which high ones are kept.

    ZCore rewards samples that cover random 2-d subspaces and penalizes those that repeat a covering one. Scores start
    uniform in [0, 1) by (seed, sample_id), gain the votes and are scaled. sample_ids: (n,) int64. votes: those of
    `zcore_votes` for each of `zcore_draws`, computed anywhere and passed in their order, which decides the rounding.
    """
    scores = hash_uniform(seed, _START_STREAM, sample_ids)
    for range_votes in votes:
        scores += range_votes
    lowest, highest = scores.min(), scores.max()
    return ((scores - lowest) / (highest - lowest)).astype(np.float32)


def zcore_draws(num_draws: int) -> list[range]:
    """Divide the draws into the ranges whose votes `zcore_sum` adds, of 50,000 each."""
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; ZCore needs at least 1, and the paper uses a million")
    starts = range(0, num_draws, _DRAWS_PER_RANGE)
    return [range(start, min(start + _DRAWS_PER_RANGE, num_draws)) for start in starts]


def zcore_votes(embeddings: np.ndarray, draws: range, seed: int) -> np.ndarray:
    """Sum the coverage rewards and redundancy penalties of some of ZCore's draws, (n,) float64.

    Each draw picks two dimensions, and a point in them from triangular distributions over each dimension's minimum,
    median and maximum. The sample nearest to the point (L1) gains 1. Its 1,000 nearest samples in the subspace share a
    loss of 1 in proportion to distance⁻⁴; if some coincide with it, the first of them loses 1 alone. Dimensions and
    points are hashes of (seed, draw); distances are float32, ties go to the lowest position.

    embeddings: (n, d) float16 or float32. Raises ValueError where n or d is below 2.
    Time: 0.2 to 0.3 ms per draw at 50,000 samples on one core, linear in n: 4 minutes for the published million draws,
    a minute for 250,000, which select more noisily. Memory: 4 · n · d + 20 · n + 64 · draws bytes.
    """
    n, num_dims = embeddings.shape
    if n < 2 or num_dims < 2:
        raise ValueError(f"embeddings are {embeddings.shape}; ZCore needs at least 2 samples and 2 dimensions")
    # A draw reads two dimensions of every sample: as contiguous rows they are read once, at the speed of memory.
    columns = np.ascontiguousarray(embeddings.T, np.float32)
    votes = np.zeros(n)
    work = np.empty((2, n), np.float32)  # allocated once: with a new array per draw, the OS would clear its pages
    for first, second, point in zip(*_sample_points(columns, draws, seed), strict=True):
        x, y = columns[first], columns[second]
        covering = int(_l1_distances(x, y, point[0], point[1], work).argmin())
        votes[covering] += 1
        distances = _l1_distances(x, y, x[covering], y[covering], work)
        distances[covering] = np.inf  # it is not its own neighbour
        near = _nearest(distances, min(ZCORE_NEIGHBORS, n - 1))
        _share_penalty(votes, near, distances[near])
    return votes


def _sample_points(columns: np.ndarray, draws: range, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample two distinct dimensions, (m,) int64 each, and a triangular point (m, 2) float32 in them, for m draws."""
    num_dims, numbers = len(columns), np.asarray(draws)
    firsts = (hash_uniform(seed, _DIMS_STREAM, numbers, 0) * num_dims).astype(np.int64)
    seconds = (hash_uniform(seed, _DIMS_STREAM, numbers, 1) * (num_dims - 1)).astype(np.int64)
    seconds += seconds >= firsts  # one of the d - 1 others, uniformly
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
    """Return the positions of the `count` smallest distances, ties to the lowest position, in no particular order."""
    # A sparse probe of the distances gives a bound below which a little more than `count` usually lie: partitioning
    # these candidates alone is several times faster than partitioning all. Three standard deviations are added, so that
    # fewer are rare; then all distances are candidates.
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


def _share_penalty(votes: np.ndarray, near: np.ndarray, distances: np.ndarray) -> None:
    """Subtract 1 in all from the neighbours' votes, by distance⁻⁴, or from the first that coincides alone."""
    nearest = distances.min()
    if nearest == 0:
        votes[near[distances == 0].min()] -= 1
        return
    # Relative to the nearest distance no power of a tiny distance overflows; the factor cancels in the shares.
    weights = (float(nearest) / distances.astype(np.float64)) ** ZCORE_EXPONENT
    votes[near] -= weights / weights.sum()
