"""The pool as k-means sees it: something that assigns its samples to centroids and returns sums.

`Points` is the interface, for a pool in one array or in shards on many workers; `ArrayPoints` is one shard in memory.
Sums of embeddings are exact (numeric/exact_arithmetic.py), so they do not depend on how the pool is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from elfs_ray.methods.kmeans.assignment import (
    FASTEST_ENGINE,
    add_rows,
    check_device,
    embeddings_with_norms,
    move_rows,
    nearest_centroids,
    squared_distances_to,
)
from elfs_ray.methods.kmeans.bounds import BoundedSearch
from elfs_ray.methods.numeric.exact_arithmetic import FIXED_POINT_UNIT, flat_nonzero, row_chunks, select_rows
from elfs_ray.methods.numeric.hashing import hash_uint64

T = TypeVar("T")


@dataclass
class PartialSums:
    """The totals of an assignment: sums (k, d) float64, counts (k,) int64, squared_norms (k,) float64.

    `squared_norms` are the sums of ‖x‖² over each cluster. All three are exact and can be added in any order: each ‖x‖²
    is rounded to a multiple of 2^-24 first.
    """

    sums: np.ndarray
    counts: np.ndarray
    squared_norms: np.ndarray

    def __iadd__(self, other: "PartialSums") -> "PartialSums":
        self.sums += other.sums
        self.counts += other.counts
        self.squared_norms += other.squared_norms
        return self


class Points(Protocol):
    """A pool of embeddings, in one array or in shards on many workers."""

    @property
    def count(self) -> int:
        """Return the number of samples."""

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""

    def on_sample(self, function: Callable[[torch.Tensor], T], num_rows: int, seed: int) -> T:
        """Run `function` where the data is, on a random sample of rows (m, d) float16, and return its result.

        The rows are those of the `num_rows` samples (all, if there are fewer) that `smallest_ids` picks from every
        shard's `ArrayPoints.smallest_hashes(num_rows, seed)`, in ascending order of sample_id.
        """

    def assign(self, centroids: np.ndarray) -> PartialSums:
        """Assign every sample to the nearest of centroids (k, d) float32 and return the totals over the pool."""


class ArrayPoints:
    """One shard in memory: embeddings (n, d) float16 of unit length (a memory map will do), sample_ids (n,) int64.

    Each assignment updates the sums of the previous one by the samples that changed cluster, and on a CPU searches only
    for samples whose nearest centroid may have changed.
    Memory beside the embeddings: 52 n bytes, and 16 k·d for sums and centroids; on a GPU the embeddings' n·d·2 as well.
    Raises ValueError for embeddings that are not finite or not of unit length (with their ids), for ids that repeat,
    and for a GPU that is not there.
    """

    def __init__(
        self, embeddings: np.ndarray, sample_ids: np.ndarray, *, device: str = "cpu", engine: str = FASTEST_ENGINE
    ):
        self._device = check_device(device)
        self._embeddings, norms = embeddings_with_norms(embeddings, sample_ids, self._device)
        self._sample_ids = sample_ids
        self._engine = engine
        self._order = np.argsort(sample_ids, kind="stable")  # rows are looked up by id, and shards need not be sorted
        if (np.diff(sample_ids[self._order]) == 0).any():
            raise ValueError("sample_ids hold an id more than once; every sample must have an id of its own")
        # Exact squared norms are multiples of 2^-48, whose sums would outgrow float64; of 2^-24 they stay exact.
        self._squared_norms = norms.div_(FIXED_POINT_UNIT).round_().mul_(FIXED_POINT_UNIT)
        self._bounded = BoundedSearch(self._embeddings, self._squared_norms)
        self._labels: torch.Tensor | None = None
        self._sums = torch.empty(0)

    @property
    def count(self) -> int:
        return self._embeddings.shape[0]

    @property
    def dim(self) -> int:
        return self._embeddings.shape[1]

    def smallest_hashes(self, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `num` samples with the smallest hash of (seed, sample_id), more where hashes tie.

        hashes (m,) uint64, sample_ids (m,) int64. The smallest hashes of the pool are among those of its shards, so a
        sample of the pool does not depend on the shards.
        """
        hashes = hash_uint64(seed, self._sample_ids)
        if num < len(hashes):
            # A partition finds the largest of the smallest hashes without sorting the shard.
            chosen = np.flatnonzero(hashes <= np.partition(hashes, num - 1)[num - 1])
            return hashes[chosen], self._sample_ids[chosen]
        return hashes, self._sample_ids

    def rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the embeddings (m, d) float16 of sample_ids (m,), in their order; this shard must hold all of them."""
        # searchsorted gives the position past the end for an id above all: the modulo leaves it to the assertion.
        positions = self._order[np.searchsorted(self._sample_ids, sample_ids, sorter=self._order) % max(self.count, 1)]
        assert (self._sample_ids[positions] == sample_ids).all(), "this shard does not hold some of the sample ids"
        return select_rows(self._embeddings, torch.from_numpy(positions).to(self._device)).cpu().numpy()

    def on_sample(self, function: Callable[[torch.Tensor], T], num_rows: int, seed: int) -> T:
        rows = self.rows(smallest_ids([self.smallest_hashes(num_rows, seed)], num_rows))
        return function(torch.from_numpy(rows).to(self._device))

    def assign(self, centroids: np.ndarray) -> PartialSums:
        num_clusters = len(centroids)
        labels = self._nearest(centroids)
        moved = None
        if self._labels is not None and self._sums.shape == centroids.shape:
            moved = flat_nonzero(labels != self._labels)
        # Moving a sample costs two additions, so from half of the shard on fresh sums are cheaper. Subtraction is as
        # exact as addition here: the sums are the same bytes either way.
        if moved is None or len(moved) > self.count // 2:
            self._sums = torch.zeros(centroids.shape, dtype=torch.float64, device=self._device)
            add_rows(self._sums, self._embeddings, labels)
        else:
            assert self._labels is not None
            for rows in row_chunks(len(moved), self.dim, self._device):
                some = moved[rows]
                move_rows(self._sums, select_rows(self._embeddings, some), self._labels[some], labels[some])
        self._labels = labels
        return PartialSums(
            sums=self._sums.cpu().numpy().copy(),  # cpu() copies nothing on a CPU, and the next call updates in place
            counts=torch.bincount(labels, minlength=num_clusters).cpu().numpy(),
            squared_norms=torch.bincount(labels, self._squared_norms, num_clusters).cpu().numpy(),
        )

    def _nearest(self, centroids: np.ndarray) -> torch.Tensor:
        # The bounds are for a CPU, where a product takes far longer than a pass over the bounds.
        if self._device.type == "cpu" and self._engine == "torch":
            return self._bounded(centroids)
        return nearest_centroids(self._embeddings, centroids, self._engine)

    def label(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's nearest centroid, (n,) int32, and the distance to it, (n,) float32, in shard order."""
        labels = self._nearest(centroids)
        squared = squared_distances_to(self._embeddings, centroids, labels).cpu().numpy()
        return labels.int().cpu().numpy(), np.sqrt(squared).astype(np.float32)


def smallest_ids(parts: Sequence[tuple[np.ndarray, np.ndarray]], num: int) -> np.ndarray:
    """Return the ids of the `num` smallest hashes of the shards' (hashes, sample_ids), ascending; ties by sample_id."""
    hashes = np.concatenate([part[0] for part in parts])
    sample_ids = np.concatenate([part[1] for part in parts])
    return np.sort(sample_ids[np.lexsort((sample_ids, hashes))[:num]])
