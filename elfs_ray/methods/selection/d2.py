"""D2: a label-free baseline over the graph of nearest neighbours, for pools of 50,000 to about a million samples."""

import heapq

import numpy as np


def d2_selection(neighbors: np.ndarray, similarity: np.ndarray, budget_count: int) -> np.ndarray:
    """Return D2's choice (2310.07931) in the form without labels, in which the k-NN graph alone decides.

    forward: x_i = 1 + Σ_j exp(-d_ij²) over i's neighbours; then, until the budget is met, the sample i of highest x is
    taken and each of its neighbours loses exp(-d_ij²) x_i. d² = 2 - 2 · cosine, the squared distance of unit vectors
    (the authors' code has d for d², the paper's equations are followed here).

    neighbors: (n, k) int, positions of each sample's nearest, self excluded; similarity: (n, k) float32 cosine; the
    paper uses k of 5 to 15, so pass the first columns. Returns positions (budget_count,) int64 in the order taken;
    ties go to the lowest position. Raises ValueError for shapes, positions and budgets that do not fit.

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
        raise ValueError(f"budget is {budget_count} samples of a pool of {n}; it must be 1 to the whole pool")
    weights = np.exp(-np.maximum(2 - 2 * similarity.astype(np.float64), 0))
    return _take_and_discount(1 + weights.sum(axis=1), neighbors, weights, budget_count)


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
