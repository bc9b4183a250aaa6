"""D2 pruning (Maharana et al., arXiv 2310.07931): a label-free baseline over the k-NN graph of the embeddings.

Suited to pools of 50,000 to about a million samples.
"""

import heapq

import numpy as np


def d2_selection(neighbors: np.ndarray, similarity: np.ndarray, budget_count: int) -> np.ndarray:
    """Select samples by D2 in its form without labels, in which the k-NN graph alone decides.

    Forward message passing scores x_i = 1 + Σ_j exp(-d_ij²) over i's neighbours. Then, until the budget is met, the
    sample i with the highest x is taken and each of its neighbours j loses exp(-d_ij²) · x_i (section 3).
    d² = 2 - 2 · cosine is the squared distance of unit vectors. The authors' code has d in place of d²; this follows
    the equations of the paper.

    neighbors: (n, k) int, positions of each sample's nearest, self excluded; similarity: (n, k) float32 cosine. The
    paper uses k of 5 to 15, so pass the first columns. Returns positions (budget_count,) int64 in the order taken;
    ties go to the lowest position. Raises ValueError for shapes, positions and budgets that do not fit.

    Time O(n log n + budget · k log n) on one core: seconds at 50,000 samples, a minute or two at a million. Workers
    cannot share it, as each choice depends on the one before. Memory: 24 · n · k bytes, and about 150 per sample.
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
    # The cosine of two float16 vectors of about unit length can exceed 1, which would make d² negative.
    weights = np.exp(-np.maximum(2 - 2 * similarity.astype(np.float64), 0))
    return _take_and_discount(1 + weights.sum(axis=1), neighbors, weights, budget_count)


def _take_and_discount(
    scores: np.ndarray, neighbors: np.ndarray, discounts: np.ndarray, budget_count: int
) -> np.ndarray:
    """Greedily take the highest score and subtract its discounted score from its neighbours, `budget_count` times."""
    # heapq cannot lower an entry, so every new score is a new entry, and one that no longer shows the sample's present
    # score is skipped. Python lists are several times faster to index here than arrays.
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
            if not taken[neighbor]:  # a taken sample's score no longer matters: skipping it keeps the heap small
                present[neighbor] -= discount * present[position]
                heapq.heappush(heap, (-present[neighbor], neighbor))
    return np.array(order, np.int64)
