"""BADGE (Ash et al., arXiv 1906.03671): choose the samples to label next by k-means++ over gradient embeddings.

A sample's gradient embedding is the gradient of the loss at the last layer, with the predicted label taken as the true
one: the outer product of the residual r = p - onehot(argmax p) and the features h (section 3). It is long where the
network is unsure, and two of them are far apart where features or predictions differ. Its d · classes numbers are never
computed, as distances of outer products follow from products of the factors:

    ‖r_a ⊗ h_a - r_b ⊗ h_b‖² = ‖r_a‖²‖h_a‖² + ‖r_b‖²‖h_b‖² - 2 (r_a·r_b)(h_a·h_b).
"""

import numpy as np
import torch

from elfs_ray.methods.numeric.hashing import hash_uniform

_PICK_STREAM = 0x62616467  # "badg": random numbers of its own, whatever else is hashed with the same seed


def badge_selection(features: torch.Tensor, probs: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """Pick `count` samples: positions (count,) int64, in the order in which they were picked.

    As in the authors' code, the first is the one with the longest gradient, and every other is sampled in proportion to
    its squared distance from the nearest one picked. Once no sample differs from those picked, the lowest positions
    follow. Random numbers are hashes of (seed, number of the pick).

    features: (n, d) float32, the last layer's input; probs: (n, classes) float32, on the same device.
    Raises ValueError for shapes that do not fit and counts outside [1, n].
    Time: 2 · n · (d + classes) operations a pick, 5 ms at 50,000 samples and d = 256 on one core.
    Memory: 4 · n · classes + 32 · n bytes beside the arguments.
    """
    n = len(features)
    if features.ndim != 2 or probs.ndim != 2 or len(probs) != n:
        raise ValueError(
            f"features {tuple(features.shape)} and probs {tuple(probs.shape)} must be (n, d) and (n, classes)"
        )
    if not 1 <= count <= n:
        raise ValueError(f"count is {count} of {n} samples; it must be 1 to all")
    residuals = probs.clone()
    residuals[torch.arange(n, device=probs.device), probs.argmax(1)] -= 1
    # Squared lengths. float64 from here on, as distances between near copies are small differences of large numbers.
    lengths = (residuals.square().sum(1) * features.square().sum(1)).double()
    picked = [int(lengths.argmax())]
    nearest = torch.full_like(lengths, torch.inf)
    for pick in range(1, count):
        nearest = torch.minimum(nearest, _squared_distances(features, residuals, lengths, picked[-1]))
        nearest[picked[-1]] = 0  # rounding may have left a rest, and no sample may be picked twice
        picked.append(_sample_position(nearest, picked, float(hash_uniform(seed, _PICK_STREAM, pick))))
    return np.array(picked, np.int64)


def _squared_distances(
    features: torch.Tensor, residuals: torch.Tensor, lengths: torch.Tensor, picked: int
) -> torch.Tensor:
    """Return the squared distances of all gradients to the picked one's, (n,) float64."""
    products = torch.mv(features, features[picked]).double() * torch.mv(residuals, residuals[picked]).double()
    return (lengths + lengths[picked] - 2 * products).clamp_(min=0)


def _sample_position(weights: torch.Tensor, picked: list[int], uniform: float) -> int:
    """Sample a position in proportion to the weights (n,) float64, which are 0 for those already picked."""
    running = weights.cumsum(0)
    total = float(running[-1])
    if total > 0:
        # right=True skips weights of 0: they end where they begin. Rounding may still reach beyond the last.
        position = int(torch.searchsorted(running, uniform * total, right=True))
        if position < len(weights):
            return position
    left = np.ones(len(weights), bool)
    left[picked] = False
    return int(left.argmax())
