"""The k nearest neighbours by cosine similarity, exact over shards.

The similarity is the dot product of the unit-length float16 embeddings as they are stored, which float64 holds exactly
(exact_arithmetic.py). A fast product with a proven error sorts out what cannot be a neighbour; what may be one is
compared exactly. The order is therefore that of a brute-force search in float64, with ties by sample_id.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.kmeans.assignment import check_device, embeddings_to_device
from elfs_ray.methods.numeric.exact_arithmetic import (
    MAX_NORM,
    exact_similarities,
    fast_product,
    flat_nonzero,
    product_error,
)
from elfs_ray.methods.numeric.workspace import Workspace

_NO_ID = torch.iinfo(torch.int64).max
# Queries and points of a product. On a CPU rows of a power of two of numbers compete for the same lines of the cache.
_BLOCKS = {"cpu": (1024, 8064), "cuda": (4096, 65536)}
_GROUP = 8


@dataclass(frozen=True)
class Neighbors:
    """neighbor_ids (m, k) int64 and similarity (m, k) float32 of m queries, most similar first, ties by sample_id."""

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
    """The k samples most similar to each query, the query itself (by id) left out.

    queries (m, d) float16 of unit length, query_ids (m,) int64; shards are pairs of embeddings (n, d) float16 and
    sample_ids (n,) int64, read once and one at a time. The neighbours do not depend on how the pool is cut.
    Raises ValueError for embeddings that are not finite or not of unit length (with their ids), for a k that is not
    below the number of samples, and for a GPU that is not there.
    Memory on the device: (m + n)·d·2 bytes for the queries and the largest shard, 16 m·k for the lists, and 100 MB
    (CPU) or 3 GB (GPU) to work in.
    """
    if k < 1:
        raise ValueError(f"k={k}; it must be at least 1")
    where = check_device(device)
    query_rows, point_rows = _BLOCKS[where.type]
    query_tensor = embeddings_to_device(queries, query_ids, where)
    query_id_tensor = torch.from_numpy(query_ids.copy()).to(where)
    blocks = [slice(start, start + query_rows) for start in range(0, len(queries), query_rows)]
    space = Workspace(where)
    lists = [_TopLists(query_tensor[block], query_id_tensor[block], k, space) for block in blocks]
    num_points = 0
    for embeddings, sample_ids in shards:
        points = embeddings_to_device(embeddings, sample_ids, where)
        ids = torch.from_numpy(sample_ids.copy()).to(where)
        for block in _point_blocks(len(points), point_rows):
            offered = points[block] if where.type == "cuda" else space.copy("points", points[block], torch.float32)
            for top in lists:
                top.offer(offered, ids[block])
        num_points += len(points)
    if k >= num_points:
        raise ValueError(
            f"k={k} neighbours were asked for in a pool of {num_points} samples; ask for at most {num_points - 1}"
        )
    return Neighbors(
        neighbor_ids=torch.cat([top.ids for top in lists]).cpu().numpy(),
        similarity=torch.cat([top.similarity for top in lists]).float().cpu().numpy(),
    )


def _point_blocks(num_points: int, largest: int) -> Iterator[slice]:
    """Blocks of points; all but the last few points in blocks of a whole number of groups."""
    whole = num_points - num_points % _GROUP
    for start in range(0, whole, largest):
        yield slice(start, min(start + largest, whole))
    if whole < num_points:
        yield slice(whole, num_points)


class _TopLists:
    """The best k of what a block of queries was offered: similarity (m, k) float64, exact, and ids (m, k) int64."""

    def __init__(self, queries: torch.Tensor, query_ids: torch.Tensor, k: int, space: Workspace):
        self._queries = queries
        self._query_ids = query_ids
        self._space = space
        self._error = MAX_NORM**2 * product_error(queries.shape[1], queries.device)
        self.similarity = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
        self.ids = torch.full((len(queries), k), _NO_ID, dtype=torch.int64, device=queries.device)

    def offer(self, points: torch.Tensor, ids: torch.Tensor) -> None:
        """Take what belongs in the lists from points (p, d), float16 or float16 numbers as float32, with ids (p,)."""
        queries = self._queries
        if points.dtype == torch.float32:
            queries = self._space.copy("queries", queries, torch.float32)
        approximate = fast_product(queries, points, self._space)
        rows, columns = self._candidates(approximate)
        if len(rows) > approximate.numel() // 8:
            similarity = (queries.double() @ points.double().T)[rows, columns]
        else:
            similarity = exact_similarities(queries, rows, points, columns, self._space)
        wanted = (similarity >= self.similarity[rows, -1]) & (ids[columns] != self._query_ids[rows])
        self._merge(rows[wanted], similarity[wanted], ids[columns[wanted]])

    def _candidates(self, approximate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, ascending, and columns of the products (m, p) that may belong in the lists.

        Only groups of columns whose maximum may are looked into: that is a pass over the products instead of several.
        """
        num_queries, num_points = approximate.shape
        grouped = num_points % _GROUP == 0 and num_points >= 2 * _GROUP * (self.ids.shape[1] + 1)
        stride = num_points // _GROUP if grouped else num_points
        maxima = approximate.view(num_queries, -1, stride).amax(1) if grouped else approximate
        level = self._entry_level(maxima) - self._error
        flat = flat_nonzero(maxima >= level.unsqueeze(1))
        if grouped and len(flat) > maxima.numel() // _GROUP:
            stride, grouped = num_points, False
            flat = flat_nonzero(approximate >= level.unsqueeze(1))
        rows, columns = flat // stride, flat % stride
        if not grouped:
            return rows, columns
        members = (rows * num_points + columns).unsqueeze(1) + stride * torch.arange(_GROUP, device=rows.device)
        inside = flat_nonzero(approximate.view(-1)[members] >= level[rows].unsqueeze(1))
        flat = members.view(-1)[inside]
        return flat // num_points, flat % num_points

    def _entry_level(self, approximate: torch.Tensor) -> torch.Tensor:
        """A lower bound (m,) of the k-th similarity after this offer; one of the offered may be the query itself."""
        k = self.similarity.shape[1]
        level = self.similarity[:, -1]
        if approximate.shape[1] > k and torch.isinf(level).any():
            level = level.maximum(_largest(approximate, k + 1).double() - self._error)
        return level.float()

    def _merge(self, rows: torch.Tensor, similarity: torch.Tensor, ids: torch.Tensor) -> None:
        """Merge pairs (p,), ascending by row, into the lists of their rows."""
        changed, counts = rows.unique_consecutive(return_counts=True)
        if len(changed) == 0:
            return
        line = torch.arange(len(changed), device=rows.device).repeat_interleave(counts)
        column = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[line]
        shape = (len(changed), int(counts.max()))
        more_similarity = torch.full(shape, -torch.inf, dtype=torch.float64, device=rows.device)
        more_ids = torch.full(shape, _NO_ID, dtype=torch.int64, device=rows.device)
        more_similarity[line, column] = similarity
        more_ids[line, column] = ids
        k = self.ids.shape[1]
        all_ids, order = torch.cat([self.ids[changed], more_ids], dim=1).sort(dim=1)
        all_similarity = torch.cat([self.similarity[changed], more_similarity], dim=1).gather(1, order)
        all_similarity, order = all_similarity.sort(dim=1, descending=True, stable=True)
        self.similarity[changed] = all_similarity[:, :k]
        self.ids[changed] = all_ids.gather(1, order[:, :k])


def _largest(values: torch.Tensor, rank: int) -> torch.Tensor:
    """The largest but rank - 1 of every row. numpy's selection is twice as fast as torch's on a CPU."""
    if values.is_cuda:
        return values.topk(rank, dim=1).values[:, -1]
    at = values.shape[1] - rank
    return torch.from_numpy(np.partition(values.numpy(), at, axis=1)[:, at])


def recall(found_ids: np.ndarray, exact_ids: np.ndarray) -> float:
    """The share of exact_ids (m, k) that are among found_ids (m, k) of the same row."""
    hits = sum(len(np.intersect1d(found, exact)) for found, exact in zip(found_ids, exact_ids, strict=True))
    return hits / exact_ids.size
