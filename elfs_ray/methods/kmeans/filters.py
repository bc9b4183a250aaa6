"""Search for nearest centroids fast, within a proven error bound, and exactly where that bound does not decide.

A product in float32 (CPU) or on float16 tensor cores (GPU), or a search by faiss, is only a filter. Where it leaves one
candidate, that is the nearest centroid; where it leaves several, they are compared exactly. Ties go to the lower
centroid id.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from elfs_ray.methods.numeric.exact_arithmetic import (
    FIXED_POINT_UNIT,
    MAX_NORM,
    exact_products,
    exact_rows,
    fast_product,
    flat_nonzero,
    product_error,
)
from elfs_ray.methods.numeric.faiss_build import check_faiss
from elfs_ray.methods.numeric.workspace import Workspace

_COLUMN_STEP, _MIN_COLUMNS = 8, 16
_FEW_PAIRS = 1 << 13  # on a CPU: to multiply so many exactly takes no longer than to sort out which are in question


class ProductFilter:
    """A matrix product, and an exact comparison of the centroids that its rounding cannot tell apart.

    The score x·c - ‖c‖²/2 = (‖x‖² - ‖x - c‖²) / 2 is largest at the nearest centroid. Subtracting an offset m from the
    centroids, by default their mean, changes all scores of a row by one constant, to (‖x - m‖² - ‖x - c‖²) / 2. The
    numbers, and so their rounding, become as small as the spread of the centroids. `error` bounds a score's error and
    `magnitude` its size; of two scores that differ by more than `slack`, the larger one is certainly larger.
    """

    def __init__(self, centroids: torch.Tensor, offset: torch.Tensor | None = None, space: Workspace | None = None):
        self.offset = mean_centroid(centroids) if offset is None else offset
        centred = centroids - self.offset
        self._centroids = centroids
        self._half_norms = centroids.square().sum(1) / 2
        bias = self.offset.square().sum() / 2 - self._half_norms
        # A narrow product takes less time with more columns: 10 take MKL 1.4 times as long as 16. The columns beyond
        # the centroids have a score of -inf.
        k = len(centroids)
        extra = max(_MIN_COLUMNS, -(-k // _COLUMN_STEP) * _COLUMN_STEP) - k
        self._matrix = pad(centred, (0, 0, 0, extra)).to(torch.float16 if centroids.is_cuda else torch.float32)
        self._bias = pad(bias.float(), (0, extra), value=-torch.inf)
        # Two errors: rounding the centred centroids to the matrix's dtype, and the product's, with the bias as two more
        # terms of the sum. Both are proportional to the embedding's norm.
        rounded = self._matrix[:k].double()
        rounded_off = (centred - rounded).norm(dim=1).max()
        self.magnitude = float(MAX_NORM * rounded.norm(dim=1).max() + bias.abs().max())
        roundings = product_error(centroids.shape[1] + 2, centroids.device)
        self.error = float(MAX_NORM * rounded_off) + roundings * self.magnitude
        self.slack = _rounded_up(2 * self.error)
        self._space = space or Workspace(centroids.device)

    def __len__(self) -> int:
        return len(self._centroids)

    def search(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest centroids (m,) int64, and a mask (m,) of the rows that must be settled."""
        labels, best, second = self.search_two(embeddings)
        return labels, best - second <= self.slack

    def search_two(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the centroid with the largest score (m,) int64, its score, and the next-largest one, (m,) float32."""
        scores = self.scores(embeddings)
        # On a CPU numpy finds a maximum with its position five times faster than torch does.
        labels = scores.argmax(1) if scores.is_cuda else torch.from_numpy(scores.numpy().argmax(1))
        at = labels.unsqueeze(1)
        best = scores.gather(1, at).squeeze(1)
        return labels, best, scores.scatter_(1, at, -torch.inf).amax(1)

    def scores(self, embeddings: torch.Tensor, some: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores (m, k or more), or (m, len(some)) of some centroids; they are valid until the next call.

        Those of columns beyond the centroids are -inf.
        """
        matrix, bias = (self._matrix, self._bias) if some is None else (self._matrix[some], self._bias[some])
        return fast_product(embeddings, matrix, self._space).add_(bias)

    def settle(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the nearest centroids (m,) by an exact comparison of those with scores within the slack of the best.

        A call takes at least 0.1 ms: gather rows before it.
        """
        if not embeddings.is_cuda and len(embeddings) * len(self) <= _FEW_PAIRS:
            exact_scores = exact_rows(embeddings) @ self._centroids.T - self._half_norms
            return torch.from_numpy(exact_scores.numpy().argmax(1))  # the first of equal ones, as numpy promises
        scores = self.scores(embeddings)
        flat = flat_nonzero(scores.amax(1, keepdim=True) - scores <= self.slack)
        rows, candidates = flat // scores.shape[1], flat % scores.shape[1]
        exact = exact_products(embeddings, rows, self._centroids, candidates) - self._half_norms[candidates]
        # A maximum over each row's candidates, however many it has; then, among those that reach it, the lowest id.
        best = torch.full((len(embeddings),), -torch.inf, dtype=torch.float64, device=embeddings.device)
        best.scatter_reduce_(0, rows, exact, "amax")
        winning = exact == best[rows]
        labels = torch.full((len(embeddings),), len(self._centroids), device=embeddings.device)
        return labels.scatter_reduce_(0, rows[winning], candidates[winning], "amin")


class FaissFilter:
    """A search by faiss's flat index for the two nearest; `ProductFilter` settles rows where they are too close."""

    def __init__(self, centroids: torch.Tensor):
        self._index = _flat_index(centroids)
        self.settle: Callable[[torch.Tensor], torch.Tensor] = ProductFilter(centroids).settle
        norm = float(centroids.norm(dim=1).max())
        # faiss computes ‖x‖² - 2 x·c + ‖c‖² without centring, so its error goes with (‖x‖ + ‖c‖)², not with the spread
        # of the centroids; twice that for the difference of two distances.
        self._slack = 2 * product_error(centroids.shape[1] + 4, centroids.device) * (MAX_NORM + norm) ** 2

    def search(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest centroids (m,) int64, and a mask (m,) of the rows that must be settled."""
        if self._index.ntotal == 1:  # there is no second-nearest
            none = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
            return none.long(), none
        rows = embeddings.float()
        two_nearest = self._index.search(rows if rows.is_cuda else rows.numpy(), 2)
        distances, candidates = (torch.as_tensor(part) for part in two_nearest)
        return candidates[:, 0], distances[:, 1] - distances[:, 0] <= self._slack


def mean_centroid(centroids: torch.Tensor) -> torch.Tensor:
    """Return the mean (d,) of centroids (k, d), rounded to multiples of 2^-24."""
    # Rounded, differences from centroids are exact in float64.
    return centroids.mean(0).div(FIXED_POINT_UNIT).round().mul(FIXED_POINT_UNIT)


def _rounded_up(value: float) -> float:
    """Return a float32 at or above the value."""
    # Scores are compared in float32, where a difference is rounded. Rounding is monotone: a difference that is within
    # the value is, once rounded, still within the value rounded up.
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def _flat_index(centroids: torch.Tensor) -> Any:
    check_faiss("engine='faiss'", centroids.device.type)
    import faiss  # here alone: engine='torch' does without it

    index: Any
    if centroids.is_cuda:
        if faiss.get_num_gpus() == 0:
            raise ValueError("engine='faiss' on a GPU, but faiss sees none; install faiss-gpu, or use engine='torch'")
        import_module("faiss.contrib.torch_utils")  # patches faiss, for the whole process, to take tensors on a GPU
        config = faiss.GpuIndexFlatConfig()
        config.device = centroids.get_device()
        index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), centroids.shape[1], config)
    else:
        index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.float() if centroids.is_cuda else centroids.float().numpy())
    return index
