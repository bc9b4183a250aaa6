"""Group near-duplicates, so that one of each group, its representative, can stand for the others.

Chains are the difficulty: of a film's frames each is a near-duplicate of the next, and the last has nothing in common
with the first. So a member must be similar to the representative itself, not only to another member. Both the
connected components and the groups in them are functions of similarities and ids alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from elfs_ray.methods.numeric.exact_arithmetic import exact_rows

_BLOCK = 1024  # samples that are compared at once with all representatives


def components(left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """Return the ids of the samples in each connected component of a graph, each ascending, by their lowest id.

    left, right: (e,) int64, the ids at the two ends of each edge. Memory: some 60 bytes an edge.
    """
    ids, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    if not len(ids):
        return []
    sources, targets = np.split(ends, 2)
    graph = coo_array((np.ones(len(left), bool), (sources, targets)), shape=(len(ids), len(ids)))
    num, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    parts = np.split(ids[order], np.cumsum(np.bincount(labels, minlength=num))[:-1])
    return sorted(parts, key=lambda part: int(part[0]))


def divide(embeddings: np.ndarray, sizes: Sequence[int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each sample's representative and its similarity to it, as `representatives` of each component.

    embeddings: (n, d) float16 of unit length, a component after the other; sizes: of the components, n in all.
    """
    ends = np.cumsum(sizes)
    chosen, best = np.arange(len(embeddings)), np.ones(len(embeddings))
    # Most components are pairs, and calls for each would take a hundred times as long.
    second = ends[np.asarray(sizes) == 2] - 1
    for start in range(0, len(second), _BLOCK):
        copies = second[start : start + _BLOCK]
        similarity = (embeddings[copies].astype(np.float64) * embeddings[copies - 1].astype(np.float64)).sum(1)
        similar = similarity >= threshold
        chosen[copies[similar]], best[copies[similar]] = copies[similar] - 1, similarity[similar]
    for end, size in zip(ends.tolist(), sizes, strict=True):
        if size > 2:
            rows = slice(end - size, end)
            chosen[rows], best[rows] = representatives(embeddings[rows], threshold)
            chosen[rows] += end - size
    return chosen, best


def representatives(embeddings: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each sample's representative, (n,) int64, and its similarity to it, (n,) float64.

    One after the other, in the order of the rows, a sample that is not as similar as `threshold` to any representative
    becomes one itself, with similarity 1. The others get the most similar representative, the first one in a tie. No
    two representatives are as similar as the threshold.

    embeddings: (n, d) float16 of unit length. Similarities are exact. Memory: 8·(r + 1024)·d bytes, and 8,192·r, for r
    representatives. Time: n·r·d multiplications.
    """
    rows = torch.from_numpy(np.ascontiguousarray(embeddings))
    n, dim = rows.shape
    chosen, best = np.arange(n), np.full(n, -np.inf)
    kept, kept_rows = np.empty(0, np.int64), torch.empty((0, dim), dtype=torch.float64)
    for start in range(0, n, _BLOCK):
        block = exact_rows(rows[start : start + _BLOCK])
        if len(kept):
            most, position = (block @ kept_rows.T).max(1)
            best[start : start + len(block)] = most.numpy()
            chosen[start : start + len(block)] = kept[position.numpy()]
        new = _choose_in_block((block @ block.T).numpy(), start, chosen, best, threshold)
        kept = np.concatenate([kept, start + new])
        kept_rows = torch.cat([kept_rows, block[torch.from_numpy(new)]])
    chosen[kept], best[kept] = kept, 1.0
    return chosen, best


def _choose_in_block(
    similarity: np.ndarray, start: int, chosen: np.ndarray, best: np.ndarray, threshold: float
) -> np.ndarray:
    """Choose the representatives among the rows of a block, from `start`; return their positions in it.

    similarity: (b, b) of the block. Updates chosen and best (n,), which know the representatives before the block.
    """
    end = start + len(similarity)
    new = []
    for position, row in enumerate(similarity):
        if best[start + position] >= threshold:
            continue
        new.append(position)
        closer = row > best[start:end]
        closer[: position + 1] = False
        best[start:end][closer], chosen[start:end][closer] = row[closer], start + position
    return np.array(new, np.int64)
