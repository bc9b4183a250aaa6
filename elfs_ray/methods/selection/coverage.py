"""Coverage: greedy facility location, the choice of samples that are most similar to all the others.

Call `facility_location(points, budget)`: it returns the order of selection, of which every prefix is a coreset, and the
gain of each choice. It reads embeddings and, to cover each pseudo-class by its members alone, groups; no training.

Similarities are integers, so sums of them are the same in any order, on any machine, and ties are real ties.
"""

import heapq
import math
from typing import NamedTuple

import numpy as np
import torch

from elfs_ray.methods.numeric.workspace import Workspace

KERNEL_WIDTH = 1.0  # sigma; 0.5 is better on CIFAR-10, worse on Fashion-MNIST (BENCHMARKS.md, "Tried and dropped")
SIMILARITY_ONE = 65_535  # the integer that stands for a similarity of 1
MAX_POINTS = 65_537  # so many similarities of at most 65,535 have a sum below 2^32
_GRID = 4096  # coordinates become multiples of 1/4096
_COSINE_STEPS = 32_768  # of the kernel's table, in a range of 1
_BLOCK = 500  # rows of a block of products; a power of two would be slow to transpose
_BATCH = 16  # candidates evaluated at once
_AT_CENTRE = 1e-3  # so near to the centre a direction would be the rounding of float16


class Coverage(NamedTuple):
    """Candidates in the order of selection, and what each adds to the objective.

    order: (b,) int64 positions of candidates; gains: (b,) int64, in units of 1/65,535 of a similarity, never rising.
    """

    order: np.ndarray
    gains: np.ndarray


def facility_location(
    points: np.ndarray,
    budget: int,
    *,
    candidates: np.ndarray | None = None,
    covered_by: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    candidate_groups: np.ndarray | None = None,
    covered_by_groups: np.ndarray | None = None,
) -> Coverage:
    """Select `budget` candidates one by one, each the one that most raises f(S) = Σ_i max_{j ∈ S} k(x_i, x_j).

    k is the Gaussian kernel exp((cos - 1) / σ²) with σ = 1, and 0 between different groups. The result is within
    1 - 1/e of the highest f (Nemhauser et al., 1978). It is found lazily (Minoux, 1978): gains only fall as S grows, so
    an old gain is a bound, and few are evaluated again. Ties go to the lowest position. Of equal candidates a second
    one gains nothing. Once no candidate gains anything, the rest follow by position.

    points: (n, d) float16 or float32, of any length but 0; candidates: (m, d), the points themselves by default;
    covered_by: (l, d), embeddings in S from the start; groups: (n,) int, of the points, one group by default;
    candidate_groups: (m,), those of other candidates than the points; covered_by_groups: (l,).
    Raises ValueError for a budget or shape that does not fit, and for more than 65,537 points.

    Memory: 2·m·n bytes of similarities, 4·(m + n + l)·d, and 200·m. Time: m·n·d multiplications, half where the
    candidates are the points, then some 30 to 300 evaluations of n additions for each choice.
    """
    n, m = len(points), len(points if candidates is None else candidates)
    if not 1 <= n <= MAX_POINTS:
        raise ValueError(f"{n} points to be covered; must be 1 to {MAX_POINTS}, more must be sampled or divided")
    if not 1 <= budget <= m:
        raise ValueError(f"budget is {budget} of {m} candidates; must be 1 to all of them")
    kernel = _Kernel(points, groups)
    similarity = kernel.among_points() if candidates is None else kernel.of(candidates, candidate_groups)
    covered = np.zeros(n, np.uint16) if covered_by is None else kernel.highest(covered_by, covered_by_groups)
    return _select_lazily(similarity, covered, budget)


def sum_of(embeddings: np.ndarray) -> np.ndarray:
    """Return the sum (d,) float64 of embeddings (n, d) float16 of unit length, exact and so the same in any order."""
    total = np.zeros(embeddings.shape[1])
    for start in range(0, len(embeddings), _BLOCK):
        total += embeddings[start : start + _BLOCK].sum(axis=0, dtype=np.float64)
    return total


def centred(embeddings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return embeddings (n, d) float16 relative to a centre (d,) float64, the mean of the pool, of unit length again.

    What all images of a pool share hides how they differ (BENCHMARKS.md, "Other ways to cover", has what this changes).
    An embedding that lies at the centre has no direction from it and stays as it is.
    """
    result = np.empty(embeddings.shape, np.float16)
    for start in range(0, len(embeddings), _BLOCK):
        rows = embeddings[start : start + _BLOCK].astype(np.float64)
        differences = rows - centre
        norms = np.linalg.norm(differences, axis=1, keepdims=True)
        is_apart = norms > _AT_CENTRE
        result[start : start + _BLOCK] = np.where(is_apart, differences / np.where(is_apart, norms, 1), rows)
    return result


def highest_similarity(points: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the similarity of each point to the nearest of some chosen embeddings (l, d), 0 where there are none.

    points: (n, d). The result is (n,) uint16, in units of 1/65,535; its mean over a pool is f(S) / n.
    Memory: 4·(n + l)·d bytes, and a block of products.
    """
    return _Kernel(points).highest(chosen)


def _select_lazily(similarity: np.ndarray, covered: np.ndarray, budget: int) -> Coverage:
    """Select greedily, given similarities (m, n) uint16 of candidates to points and what covers these (n,) at first."""
    starts = range(0, len(similarity), _BATCH)
    bounds = np.concatenate([_totals(similarity[start : start + _BATCH], covered) for start in starts])
    base = int(covered.sum(dtype=np.int64))
    heap = [(base - bound, position) for position, bound in enumerate(bounds.tolist())]
    heapq.heapify(heap)
    evaluated_at = [0] * len(similarity)  # the number of choices before the candidate's last evaluation
    order: list[int] = []
    gains: list[int] = []
    while len(order) < budget:
        step = len(order)
        stale: list[int] = []
        while heap and len(stale) < _BATCH and evaluated_at[heap[0][1]] < step:
            stale.append(heapq.heappop(heap)[1])
        if stale:
            for position, total in zip(stale, _totals(similarity[stale], covered).tolist(), strict=True):
                evaluated_at[position] = step
                heapq.heappush(heap, (base - total, position))
            continue
        # Every other entry bounds its candidate's gain from above, so the first one in the heap is the best, and of
        # equal gains the lowest position.
        negative_gain, position = heapq.heappop(heap)
        if negative_gain == 0:
            rest = sorted([position, *(position for _, position in heap)])[: budget - step]
            return Coverage(np.array(order + rest, np.int64), np.array(gains + [0] * len(rest), np.int64))
        order.append(position)
        gains.append(-negative_gain)
        covered = np.maximum(covered, similarity[position])
        base -= negative_gain
    return Coverage(np.array(order, np.int64), np.array(gains, np.int64))


def _totals(similarity: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Return Σ_i max(covered_i, k_ji), (b,) uint32, for the similarities (b, n) of some candidates j."""
    # numpy adds uint16 into uint32 three times faster than into 64 bits.
    return np.maximum(similarity, covered).sum(axis=1, dtype=np.uint32)


class _Kernel:
    """Similarities of embeddings to fixed points, exact functions of rounded embeddings.

    Embeddings are scaled to just below unit length and rounded to multiples of 2^-12. Products of coordinates are then
    multiples of 2^-24, and by Cauchy-Schwarz no partial sum of them exceeds 1: float32 holds every one exactly, so a
    product is the same in any order of summation. The rounding changes a cosine by about 1e-4.
    """

    def __init__(self, points: np.ndarray, groups: np.ndarray | None = None):
        self._dim = points.shape[1]
        # Rounding moves a vector by at most sqrt(d) / 2 steps of the grid, so that this length leaves it below 1.
        self._length = 1 - math.sqrt(self._dim) / (2 * _GRID)
        self._points = self._rounded(points)
        self._space = Workspace(self._points.device)
        self._groups = _one_group(len(points)) if groups is None else groups
        if self._groups.shape != (len(points),):
            raise ValueError(f"groups are {self._groups.shape}; must be ({len(points)},), one for each point")
        cosines = np.arange(-_COSINE_STEPS, _COSINE_STEPS + 1) / (_COSINE_STEPS * self._length**2)
        values = np.exp((np.minimum(cosines, 1) - 1) / KERNEL_WIDTH**2)
        # torch has few functions of uint16, but to look up and copy the bits any type of 16 does.
        self._table = torch.from_numpy(np.rint(values * SIMILARITY_ONE).astype(np.uint16).view(np.int16))

    def of(self, candidates: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """Return the similarities (m, n) uint16 of candidates (m, d), in groups (m,), to the points."""
        rows = self._rounded(candidates)
        groups = _one_group(len(rows)) if groups is None else groups
        similarity = np.empty((len(rows), len(self._points)), np.uint16)
        for start in range(0, len(rows), _BLOCK):
            for column in range(0, len(self._points), _BLOCK):
                block = self._within(
                    groups[start : start + _BLOCK], self._block(rows[start : start + _BLOCK], column), column
                )
                similarity[start : start + _BLOCK, column : column + _BLOCK] = block
        return similarity

    def among_points(self) -> np.ndarray:
        """Return the similarities (n, n) uint16 of the points, of which half is computed: the rest mirrors it."""
        n = len(self._points)
        similarity = np.empty((n, n), np.uint16)
        for start in range(0, n, _BLOCK):
            for column in range(start, n, _BLOCK):
                block = self._block(self._points[start : start + _BLOCK], column)
                block = self._within(self._groups[start : start + _BLOCK], block, column)
                similarity[start : start + _BLOCK, column : column + _BLOCK] = block
                similarity[column : column + _BLOCK, start : start + _BLOCK] = block.T
        return similarity

    def highest(self, chosen: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """Return the similarity (n,) uint16 of each point to the nearest of `chosen` (l, d), 0 where there is none."""
        rows = self._rounded(chosen)
        groups = _one_group(len(rows)) if groups is None else groups
        covered = np.zeros(len(self._points), np.uint16)
        for start in range(0, len(rows), _BLOCK):
            for column in range(0, len(self._points), _BLOCK):
                block = self._block(rows[start : start + _BLOCK], column)
                block = self._within(groups[start : start + _BLOCK], block, column)
                part = covered[column : column + _BLOCK]
                np.maximum(part, block.max(axis=0), out=part)
        return covered

    def _block(self, rows: torch.Tensor, column: int) -> np.ndarray:
        """Return the similarities of a block of rounded rows and points, from `column` on; valid until the next one."""
        points = self._points[column : column + _BLOCK]
        shape = (len(rows), len(points))
        product = torch.mm(rows, points.T, out=self._space.tensor("product", shape, torch.float32))
        # From -1..1 to positions in the table. Rounding first keeps the sum exact, too.
        steps = self._space.copy("steps", product.mul_(_COSINE_STEPS).round_().add_(_COSINE_STEPS), torch.int32)
        block = self._space.tensor("block", (steps.numel(),), torch.int16)
        torch.index_select(self._table, 0, steps.view(-1), out=block)
        return block.view(shape).numpy().view(np.uint16)

    def _within(self, row_groups: np.ndarray, block: np.ndarray, column: int) -> np.ndarray:
        """Set the similarities of a block of rows and points, from `column` on, to 0 where their groups differ."""
        block[row_groups[:, None] != self._groups[column : column + _BLOCK]] = 0
        return block

    def _rounded(self, embeddings: np.ndarray) -> torch.Tensor:
        if embeddings.ndim != 2 or embeddings.shape[1] != self._dim:
            raise ValueError(f"embeddings are {embeddings.shape}; must be (rows, {self._dim}) as the points are")
        rounded = np.empty(embeddings.shape, np.float32)
        for start in range(0, len(embeddings), _BLOCK):  # in blocks, as float64 takes four times a float16's memory
            rows = embeddings[start : start + _BLOCK].astype(np.float64)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            if not (np.isfinite(norms).all() and norms.all()):
                raise ValueError("embeddings hold a zero vector, NaN or infinity; each must have a direction")
            rounded[start : start + _BLOCK] = np.rint(rows / norms * (self._length * _GRID)) / _GRID
        return torch.from_numpy(rounded)


def _one_group(num_rows: int) -> np.ndarray:
    return np.zeros(num_rows, np.int32)
