"""Find the k nearest neighbours by cosine similarity, exactly, over shards.

The similarity is the dot product of the unit-length float16 embeddings as they are stored, which float64 holds exactly
(numeric/exact_arithmetic.py). faiss searches by brute force in float32 (CPU) or on float16 tensor cores (GPU), and
ranking.py makes its result exact. The order is therefore that of a brute-force search in float64, with ties by
sample_id.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch

from elfs_ray.methods.kmeans.assignment import check_device, embeddings_to_device
from elfs_ray.methods.neighbors.ranking import MARGIN, Points, Ranking, rank_candidates, rank_exhaustively
from elfs_ray.methods.numeric.faiss_build import check_faiss

# Queries and points per search, which bound its memory. On a CPU the queries in float64 should stay in the cache:
# `exact_products` reads them in no order, and takes 0.18 us a pair with 1,024 queries, 0.24 us with 4,096.
_BLOCKS = {"cpu": (1024, 1 << 15), "cuda": (1 << 15, 1 << 20)}
_MOST_ON_GPU = 2048  # the most candidates per query that faiss selects on a GPU


@dataclass(frozen=True)
class Neighbors:
    """The neighbor_ids (m, k) int64 and similarity (m, k) float32 of m queries, most similar first, ties by id."""

    neighbor_ids: np.ndarray
    similarity: np.ndarray


def nearest_neighbors(
    queries: np.ndarray,
    query_ids: np.ndarray,
    shards: Iterable[tuple[np.ndarray, np.ndarray]],
    k: int,
    *,
    device: str = "cpu",
) -> Neighbors:
    """Return the k samples most similar to each query, the query itself (by id) left out.

    queries (m, d) float16 of unit length, query_ids (m,) int64; shards are pairs of embeddings (n, d) float16 and
    sample_ids (n,) int64, read once and one at a time. The neighbours do not depend on how the pool is cut.
    Raises ValueError for embeddings that are not finite or not of unit length (with their ids), for a k that is not
    below the number of samples, and for a GPU or a build of faiss that is not there.
    Memory on the device: (m + n)·d·2 bytes for the queries and the largest shard, 16 m·k for the rankings, and to work
    in 700·d KB and 100 MB (CPU) or 8·d MB and 4 GB (GPU).
    """
    if k < 1:
        raise ValueError(f"k={k}; it must be at least 1")
    where = check_device(device)
    wanted = points_on(queries, query_ids, where)
    flat = FlatSearch(where)
    ranking = Ranking.empty(len(wanted), k, where)
    num_points = 0
    for embeddings, sample_ids in shards:
        points = points_on(embeddings, sample_ids, where)
        ranking = flat.rank(ranking, wanted, points)
        num_points += len(points)
    if k >= num_points:
        raise ValueError(
            f"k={k} neighbours were requested in a pool of {num_points} samples; use at most {num_points - 1}"
        )
    return Neighbors(ranking.ids.cpu().numpy(), ranking.similarity.float().cpu().numpy())


def points_on(embeddings: np.ndarray, sample_ids: np.ndarray, device: torch.device) -> Points:
    """Put embeddings and their ids on a device, with the checks of `embeddings_to_device`."""
    return Points(embeddings_to_device(embeddings, sample_ids, device), torch.from_numpy(sample_ids.copy()).to(device))


class FlatSearch:
    """A ranking of points by faiss's brute-force search. Raises ValueError where no faiss serves the device."""

    def __init__(self, device: torch.device):
        check_faiss("the search for neighbours", device.type)
        self._query_rows, self._point_rows = _BLOCKS[device.type]
        self._gpu_resources = None
        if device.type == "cuda":
            import_module("faiss.contrib.torch_utils")  # patches faiss, for the whole process, to take tensors on a GPU
            self._gpu_resources = import_module("faiss").StandardGpuResources()

    def rank(self, ranking: Ranking, queries: Points, points: Points) -> Ranking:
        """Return the ranking of the queries with all points merged into it."""
        starts = range(0, len(queries), self._query_rows)
        for start in range(0, len(points), self._point_rows):
            block = points[start : start + self._point_rows]
            rows_of_block = block.embeddings
            if not self._gpu_resources:
                # On a CPU faiss takes float32 and `exact_products` float64: convert a block once for all queries.
                rows_of_block = block.embeddings.float()
                block = Points(rows_of_block.double(), block.ids)
            ranking = Ranking.joined(
                [
                    self._rank_block(ranking[rows], queries[rows], block, rows_of_block)
                    for rows in (slice(first, first + self._query_rows) for first in starts)
                ]
            )
        return ranking

    def _rank_block(self, ranking: Ranking, queries: Points, points: Points, rows: torch.Tensor) -> Ranking:
        count = ranking.ids.shape[1] + 1 + MARGIN  # one of them may be the query itself
        if self._gpu_resources and count > _MOST_ON_GPU:
            return rank_exhaustively(ranking, queries, points)
        approximate, positions = self._search(queries.embeddings, rows, count)

        def rank_all(some: torch.Tensor) -> Ranking:
            return rank_exhaustively(ranking[some], queries[some], points)

        return rank_candidates(ranking, queries, points, approximate, positions, rank_all)

    def _search(self, queries: torch.Tensor, points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `count` most similar points of each query: products (m, count) float32 and positions.

        The position is -1 where there are fewer points.
        """
        import faiss

        # The kernels of IndexFlatIP and GpuIndexFlat, without the copy of the points that an index keeps. A GPU
        # multiplies float16 on tensor cores and adds in float32.

        metric = faiss.METRIC_INNER_PRODUCT
        if self._gpu_resources:
            device = queries.get_device()
            return faiss.knn_gpu(self._gpu_resources, queries, points, count, metric=metric, device=device)
        products, positions = faiss.knn(queries.float().numpy(), points.numpy(), count, metric=metric)
        return torch.from_numpy(products), torch.from_numpy(positions)


def recall(neighbor_ids: np.ndarray, exact_ids: np.ndarray) -> float:
    """Return the share of exact_ids (m, k) that are among neighbor_ids (m, k) of the same row."""
    hits = sum(len(np.intersect1d(row, exact)) for row, exact in zip(neighbor_ids, exact_ids, strict=True))
    return hits / exact_ids.size
