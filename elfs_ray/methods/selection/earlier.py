"""Say how near each sample of a list is to those before it: what a person has seen when the sample's turn comes."""

import numpy as np

_BLOCK = 2_000


def highest_cosine_before(embeddings: np.ndarray) -> np.ndarray:
    """Return the cosine of each embedding (n, d), of unit length, to the most similar one before it, (n,) float32.

    That of the first one is NaN. Memory: 4·n·d bytes, and blocks of 16 MB. Time: n²·d / 2 multiplications.
    """
    rows = embeddings.astype(np.float32)
    highest = np.full(len(rows), np.nan, np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        within = block @ block.T
        within[np.triu_indices(len(block))] = -np.inf
        best = within.max(axis=1)
        for first in range(0, start, _BLOCK):
            best = np.maximum(best, (block @ rows[first : first + _BLOCK].T).max(axis=1))
        highest[start : start + len(block)] = best
    highest[:1] = np.nan
    return np.clip(highest, -1, 1)
