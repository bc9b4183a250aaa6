"""k-means++ seeds, sampled many at a time, the same on every device."""

import math

import numpy as np
import torch

from elfs_ray.methods.numeric.exact_arithmetic import FIXED_POINT_UNIT, exact_rows, row_chunks, squared_norms
from elfs_ray.methods.numeric.hashing import hash_uniform

MAX_GREEDY_CLUSTERS = 2048  # the greedy variant takes 2 + ln k times as many distances, too many for more clusters
_MIN_PROPOSALS, _MAX_PROPOSALS = 16, 256
_DISTANCES_AT_ONCE = 2**25  # 256 MiB of float64


def seed_centroids(rows: torch.Tensor, num_clusters: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """Choose k-means++ seeds (k, d) float32 among rows (m, d) float16 (Arthur and Vassilvitskii, SODA 2007).

    Up to `MAX_GREEDY_CLUSTERS` clusters, every seed is the best of 2 + ⌊ln k⌋ candidates (that paper's greedy variant).
    Memory beside the rows: 8 m·c bytes for c = max(16, min(256, 2^25 / m)) proposals at a time.
    Raises ValueError where the rows hold fewer than k distinct points.
    """
    num_candidates = 2 + int(math.log(num_clusters)) if num_clusters <= MAX_GREEDY_CLUSTERS else 1
    norms = squared_norms(rows)
    chosen = [int(hash_uniform(seed, attempt, 0) * len(rows))]
    nearest = distances_to_seeds(rows, norms, rows[chosen])[0]
    while len(chosen) < num_clusters:
        if not nearest.any():  # every row lies on a seed: distances are exact, so 0 means equal
            raise ValueError(
                f"num_clusters={num_clusters}, but the {len(rows)} samples that seeds are chosen from hold only "
                f"{len(chosen)} distinct embeddings; use at most {len(chosen)} clusters"
            )
        key = (seed, attempt, len(chosen))
        seeds, nearest = _sample_seeds(rows, norms, nearest, num_clusters - len(chosen), num_candidates, key)
        chosen += seeds
    return rows[chosen].float().cpu().numpy()


def distances_to_seeds(rows: torch.Tensor, norms: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return squared distances (c, m) float64 of seeds (c, d) to rows (m, d), rounded up to multiples of 2^-24.

    They are exact before the rounding, so distances of equal points are 0 and those of distinct points are not.
    """
    # Sums of up to 2^26 multiples of 2^-24 are exact, too, so no choice depends on a device's order of summation.
    # Rounding up, not to nearest, keeps points apart that differ by less.
    exact_seeds = exact_rows(seeds)
    seed_norms = exact_seeds.square().sum(1, keepdim=True)
    distances = torch.empty((len(seeds), len(rows)), dtype=torch.float64, device=rows.device)
    for chunk in row_chunks(len(rows), rows.shape[1], rows.device):
        exact = (exact_seeds @ exact_rows(rows[chunk]).T).mul_(-2).add_(seed_norms).add_(norms[chunk])
        distances[:, chunk] = exact.div_(FIXED_POINT_UNIT).ceil_().mul_(FIXED_POINT_UNIT)
    return distances


def _sample_seeds(
    rows: torch.Tensor, norms: torch.Tensor, nearest: torch.Tensor, num_wanted: int, num_candidates: int, key: tuple
) -> tuple[list[int], torch.Tensor]:
    """Sample up to `num_wanted` seeds; return them and `nearest` (m,), squared distances to the closest seed, updated.

    k-means++ samples each seed in proportion to the distances D² that the seeds before it left. Here many proposals are
    sampled at once from the D² at the start and measured in one matrix product; later ones then pass a rejection test.
    """
    num_proposals = max(
        _MIN_PROPOSALS, min(_MAX_PROPOSALS, _DISTANCES_AT_ONCE // len(rows), 2 * num_candidates * num_wanted)
    )
    proposals = _sample_positions(nearest, num_proposals, key)
    distances = distances_to_seeds(rows, norms, rows[proposals])
    current = nearest[proposals].cpu().numpy()
    thresholds = hash_uniform(*key, 1, np.arange(num_proposals)) * current
    seeds: list[int] = []
    candidates: list[int] = []
    for i in range(num_proposals):
        # Rejection sampling: seeds since the start have lowered a proposal's D² to D'². Kept with probability D'²/D²,
        # it is distributed as if it had been sampled from D'², so the seeds are those of one-by-one sampling in law.
        if thresholds[i] < current[i]:
            candidates.append(i)
        if len(candidates) == num_candidates:
            lowered = distances[candidates].minimum(nearest)
            best = int(lowered.sum(1).argmin())
            seeds.append(int(proposals[candidates[best]]))
            nearest = lowered[best]
            current = nearest[proposals].cpu().numpy()
            candidates = []
        if len(seeds) == num_wanted:
            break
    return seeds, nearest


def _sample_positions(weights: torch.Tensor, num: int, key: tuple) -> torch.Tensor:
    """Sample `num` positions with replacement, in proportion to weights (m,), multiples of 2^-24."""
    cumulative = weights.cumsum(0)
    total = float(cumulative[-1])
    # A uniform number next to 1 times the total can round up to the total, which lies past the last row.
    at = np.minimum(hash_uniform(*key, 0, np.arange(num)) * total, total - FIXED_POINT_UNIT)
    return torch.searchsorted(cumulative, torch.from_numpy(at).to(weights.device), right=True)
