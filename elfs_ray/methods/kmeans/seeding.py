"""k-means++ seeds, many drawn at once, the same on every device."""

import math

import numpy as np
import torch

from elfs_ray.methods.numeric.exact_arithmetic import FIXED_POINT_UNIT, exact_rows, row_chunks, squared_norms
from elfs_ray.methods.numeric.hashing import hash_uniform

MAX_GREEDY_CLUSTERS = 2048
_MIN_DRAWS, _MAX_DRAWS = 16, 256
_DISTANCES_AT_ONCE = 2**25


def seed_centroids(rows: torch.Tensor, num_clusters: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """k-means++ seeds (k, d) float32 among rows (m, d) float16 (Arthur and Vassilvitskii, SODA 2007).

    Up to `MAX_GREEDY_CLUSTERS` clusters every seed is the best of 2 + ⌊ln k⌋ draws (that paper's greedy variant).
    Memory beside the rows: 8 m·c bytes for c = max(16, min(256, 2^25 / m)) draws at a time.
    Raises ValueError where the rows hold fewer than k distinct points.
    """
    num_candidates = 2 + int(math.log(num_clusters)) if num_clusters <= MAX_GREEDY_CLUSTERS else 1
    norms = squared_norms(rows)
    chosen = [int(hash_uniform(seed, attempt, 0) * len(rows))]
    nearest = distances_to_seeds(rows, norms, rows[chosen])[0]
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


def distances_to_seeds(rows: torch.Tensor, norms: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
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
    distances = distances_to_seeds(rows, norms, rows[drawn])
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
