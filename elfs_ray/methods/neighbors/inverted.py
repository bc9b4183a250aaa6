"""The k nearest neighbours through an inverted file: approximate, for pools that are too large for the exact search.

Samples are listed under their centroid, and a query looks into the lists of the most similar centroids. In these lists
the search is exact, as in neighbors.py, and so is the choice of lists: what is found is a function of the embeddings
and the centroids, however the samples are divided over inverted files and the queries over searches.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from elfs_ray.methods.kmeans.assignment import embeddings_to_device
from elfs_ray.methods.neighbors.exact import Neighbors, recall
from elfs_ray.methods.numeric.exact_arithmetic import (
    MAX_NORM,
    exact_centroids,
    exact_rows,
    exact_similarities,
    fast_product,
    product_error,
    row_chunks,
)
from elfs_ray.methods.numeric.workspace import Workspace

_CPU = torch.device("cpu")
_SEARCH_QUERIES = 16_384
_PRODUCTS = 1 << 25
_QUERIES, _POINTS = 1024, 8064  # of a product


def nearest_lists(embeddings: np.ndarray, centroids: np.ndarray, num: int) -> np.ndarray:
    """The `num` centroids most similar to each embedding, ties to the lower: (m, num) int64, ascending.

    embeddings (m, d) float16 of unit length; centroids (l, d) float32, multiples of 2^-24 of at most unit length, as
    k-means gives them: the float64 products are exact. Memory beside the result: 12 l·d bytes and 100 MB.
    """
    exact = exact_centroids(centroids, _CPU).T
    found = np.empty((len(embeddings), num), np.int64)
    for rows in row_chunks(len(embeddings), len(centroids), _CPU):
        similarity = (exact_rows(torch.from_numpy(embeddings[rows].copy())) @ exact).numpy()
        at = len(centroids) - num
        lowest = np.partition(similarity, at, axis=1)[:, at, None]
        chosen = similarity >= lowest
        tied = chosen.sum(1) > num
        if tied.any():
            at_level = similarity[tied] == lowest[tied]
            room = num - (similarity[tied] > lowest[tied]).sum(1, keepdims=True)
            chosen[tied] &= ~at_level | (at_level.cumsum(1) <= room)
        found[rows] = np.nonzero(chosen)[1].reshape(-1, num)
    return found


class InvertedFile:
    """Samples by the list that they are in: embeddings (n, d) float16 of unit length, sample_ids (n,) int64.

    centroids (l, d) float32 are those of a k-means of the same embeddings; about 4 √n to 16 √n lists suit n samples.
    Memory beside the embeddings: 16 n bytes. Raises ValueError for embeddings that are not finite or not of unit
    length.
    """

    def __init__(self, centroids: np.ndarray, embeddings: np.ndarray, sample_ids: np.ndarray):
        self._embeddings = embeddings_to_device(embeddings, sample_ids, _CPU)
        lists = nearest_lists(embeddings, centroids, 1)[:, 0]
        order = np.argsort(lists, kind="stable")
        self._ends = np.searchsorted(lists[order], np.arange(len(centroids)), side="right")
        self._order, self._ids = order, sample_ids

    def search(self, queries: np.ndarray, query_ids: np.ndarray, lists: np.ndarray, k: int) -> Neighbors:
        """The k most similar samples in each query's lists (m, p), ascending, the query itself (by id) left out.

        The similarity is float64, until `merge_neighbors`. Where the lists hold fewer than k samples, the rest of a row
        has id -1 and similarity -inf. Memory beside the result: 300 MB, or what the lists of one query take.
        """
        query_tensor = embeddings_to_device(queries, query_ids, _CPU)
        ends = np.diff(self._ends, prepend=0)[lists].cumsum(1)
        space = Workspace(_CPU)
        found_ids, similarity = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
        for block in _blocks(ends[:, -1]):
            rows, samples = self._candidates(query_tensor[block], lists[block], ends[block], k, space)
            values = exact_similarities(query_tensor[block], rows, self._embeddings, samples, space).numpy()
            row, ids = rows.numpy() + block.start, self._ids[samples.numpy()]
            order = np.lexsort((ids, -values, row))
            order = order[ids[order] != query_ids[row[order]]]
            row, ids, values = row[order], ids[order], values[order]
            rank = np.arange(len(row)) - np.searchsorted(row, row)
            best = rank < k
            found_ids[row[best], rank[best]], similarity[row[best], rank[best]] = ids[best], values[best]
        return Neighbors(found_ids, similarity)

    def _candidates(
        self, queries: torch.Tensor, lists: np.ndarray, ends: np.ndarray, k: int, space: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs (rows of queries, ascending; positions of samples) that hold every query's k + 1 most similar.

        Fast products, in the order of each query's lists, sort out the others. ends (m, p): where each list ends there.
        """
        width = int(ends[:, -1].max())
        products = np.full((len(queries), width), -np.inf, np.float32)
        filled = np.zeros(len(queries), np.int64)
        singles = queries.float()
        for members, takers in self._pairs(lists):
            points = space.copy("points", self._embeddings[members], torch.float32)
            columns = filled[takers, None] + np.arange(len(members))
            products[takers[:, None], columns] = fast_product(singles[takers], points, space).numpy()
            filled[takers] += len(members)
        level = np.full((len(queries), 1), -np.inf, np.float32)
        if width > k:
            at = width - k - 1
            error = MAX_NORM**2 * product_error(queries.shape[1], _CPU)
            # Of the (k + 1)-th and of what is compared with it, and the rounding to float32.
            level = np.partition(products, at, axis=1)[:, at, None] - np.float32(3 * error)
        wanted = products >= level
        if np.isneginf(level).any():
            wanted &= np.arange(width) < filled[:, None]
        rows, columns = np.nonzero(wanted)
        first = np.arange(len(queries)) * (width + 1)
        slots = np.searchsorted((ends + first[:, None]).ravel(), columns + first[rows], side="right")
        before_end = ends.ravel()[slots] - columns
        samples = self._order[self._ends[lists.ravel()[slots]] - before_end]
        return torch.from_numpy(rows), torch.from_numpy(samples)

    def _pairs(self, lists: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every list, or part of it, with the rows of `lists` that name it: (positions of samples, rows)."""
        by_list = np.argsort(lists, axis=None, kind="stable")
        takers = by_list // lists.shape[1]
        taker_ends = np.searchsorted(lists.ravel()[by_list], np.arange(len(self._ends)), side="right")
        starts, taker_starts = (np.concatenate([[0], ends[:-1]]) for ends in (self._ends, taker_ends))
        for number in np.flatnonzero((self._ends > starts) & (taker_ends > taker_starts)).tolist():
            for start in range(starts[number], self._ends[number], _POINTS):
                members = self._order[start : min(start + _POINTS, self._ends[number])]
                for first in range(taker_starts[number], taker_ends[number], _QUERIES):
                    yield members, takers[first : min(first + _QUERIES, taker_ends[number])]


def _blocks(widths: np.ndarray) -> Iterator[slice]:
    """Queries whose products, `widths` of each, fit the memory, or a single one."""
    start = 0
    while start < len(widths):
        widest = np.maximum.accumulate(widths[start : start + _SEARCH_QUERIES])
        count = max(1, int(np.count_nonzero(widest * np.arange(1, len(widest) + 1) <= _PRODUCTS)))
        yield slice(start, start + count)
        start += count


def merge_neighbors(parts: Sequence[Neighbors]) -> Neighbors:
    """The k best of what several inverted files found for the same queries; ids of -1 where they found fewer."""
    ids = np.concatenate([part.neighbor_ids for part in parts], axis=1)
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    order = np.lexsort((ids, -similarity), axis=1)[:, : parts[0].neighbor_ids.shape[1]]
    best = np.take_along_axis(similarity, order, axis=1).astype(np.float32)
    return Neighbors(np.take_along_axis(ids, order, axis=1), best)


def search_lists(
    search: Callable[[np.ndarray, np.ndarray, np.ndarray], Neighbors],
    queries: np.ndarray,
    query_ids: np.ndarray,
    centroids: np.ndarray,
    nprobe: int,
) -> Neighbors:
    """k neighbours of every query: from its `nprobe` nearest lists, or twice as many as long as they hold too few.

    search: what all inverted files of a pool find together for (queries, query_ids, lists). The pool holds more than k
    samples.
    """
    found = search(queries, query_ids, nearest_lists(queries, centroids, nprobe))
    short = np.flatnonzero((found.neighbor_ids < 0).any(1))
    while len(short):
        assert nprobe < len(centroids), "all lists together hold no more than k samples"
        nprobe = min(2 * nprobe, len(centroids))
        more = search(queries[short], query_ids[short], nearest_lists(queries[short], centroids, nprobe))
        found.neighbor_ids[short], found.similarity[short] = more.neighbor_ids, more.similarity
        short = short[(more.neighbor_ids < 0).any(1)]
    return found


def choose_nprobe(
    search: Callable[[int], Neighbors], exact: Neighbors, num_lists: int, min_recall: float
) -> tuple[int, list[dict[str, float]]]:
    """The smallest power of two of lists that reaches `min_recall` of the exact neighbours, and what was measured.

    search: finds, with a given nprobe, the neighbours of a sample of the pool drawn by hash; exact: the exact ones.
    """
    measured: list[dict[str, float]] = []
    nprobe = 1
    while True:
        measured.append({"nprobe": nprobe, "recall": recall(search(nprobe).neighbor_ids, exact.neighbor_ids)})
        if measured[-1]["recall"] >= min_recall or nprobe == num_lists:
            return nprobe, measured
        nprobe = min(2 * nprobe, num_lists)
