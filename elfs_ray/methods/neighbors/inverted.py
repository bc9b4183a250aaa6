"""Find the k nearest neighbours through faiss's inverted file: approximate, for pools too large for exact search.

Samples are listed under their most similar centroid, and a query is compared with the samples in the lists of the
centroids most similar to it. Many centroids (lists.py) lie in groups, and only those of the groups nearest to an
embedding are compared with it. The choice of groups is exact, as is that of lists in them, and so is the ranking of
their samples (ranking.py). The result is therefore a function of the embeddings and the centroids: it depends neither
on how samples are divided over inverted files nor on how queries are divided over searches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from elfs_ray.methods.neighbors.exact import FlatSearch, Neighbors, points_on, recall
from elfs_ray.methods.neighbors.ranking import MARGIN, NO_ID, Points, Ranking, rank_candidates, rank_exhaustively

_CPU = torch.device("cpu")
_QUERIES = 512  # per search, which bounds the memory of their candidates
_ADDED = 1 << 15  # rows that are converted to float32 at a time, for faiss to add
_GROUPS = 4  # whose lists are compared with an embedding, at least


def nearest_lists(embeddings: np.ndarray, centroids: np.ndarray, num: int) -> np.ndarray:
    """Return the `num` centroids most similar to each embedding, ties to the lower, (m, num) int64, most similar first.

    embeddings (m, d) and centroids (l, d): float16 of unit length. Memory beside the result: as `nearest_neighbors`.
    """
    queries = points_on(embeddings, np.full(len(embeddings), -1), _CPU)  # -1: no centroid is left out
    points = points_on(centroids, np.arange(len(centroids)), _CPU)
    return FlatSearch(_CPU).rank(Ranking.empty(len(queries), num, _CPU), queries, points).ids.numpy()


class Lists:
    """The lists of an inverted file: their centroids (l, d), and those of their groups (g, d) where they have any.

    Both are float16 of unit length. Memory: 2·d bytes a list, twice that with groups.
    """

    def __init__(self, centroids: np.ndarray, groups: np.ndarray | None = None):
        self._centroids, self._groups = centroids, groups
        # The centroids are the samples of an inverted file themselves, and the groups are its lists.
        self._grouped = None if groups is None else InvertedFile(Lists(groups), centroids, np.arange(len(centroids)))

    def __len__(self) -> int:
        return len(self._centroids)

    def nearest(self, embeddings: np.ndarray, num: int) -> np.ndarray:
        """Return the `num` lists most similar to each embedding, as `nearest_lists`; of the nearest groups alone."""
        if self._grouped is None or self._groups is None:
            return nearest_lists(embeddings, self._centroids, num)
        grouped = self._grouped

        def search(queries: np.ndarray, query_ids: np.ndarray, groups: np.ndarray) -> Neighbors:
            return merge_neighbors([grouped.search(queries, query_ids, groups, num)])

        num_groups = min(max(_GROUPS, num // 2), len(self._groups))
        no_ids = np.full(len(embeddings), -1)
        return search_lists(search, embeddings, no_ids, Lists(self._groups), num_groups).neighbor_ids


class InvertedFile:
    """Samples by list: embeddings (n, d) float16 of unit length with their sample_ids (n,) int64.

    The centroids of the lists come from a spherical k-means of the same embeddings; about 4 √n to 16 √n lists suit n
    samples, and n/250 where there are millions. Memory: 4·n·d + 24 n bytes with the embeddings themselves, as faiss
    keeps a float16 copy.
    Raises ValueError for embeddings that are not finite or not of unit length, and without faiss.
    """

    def __init__(self, lists: Lists, embeddings: np.ndarray, sample_ids: np.ndarray):
        self._points = points_on(embeddings, sample_ids, _CPU)
        under = lists.nearest(embeddings, 1)[:, 0]
        self._order = np.argsort(under, kind="stable")
        self._ends = np.searchsorted(under[self._order], np.arange(len(lists)), side="right")
        self._index = _filled_index(self._points.embeddings, under, len(lists))

    def search(self, queries: np.ndarray, query_ids: np.ndarray, lists: np.ndarray, k: int) -> Neighbors:
        """Return the k most similar samples in each query's lists (m, p), the query itself (by id) left out.

        The similarity stays float64 until `merge_neighbors`, as rounding first could change the order. Where the lists
        hold fewer than k samples, the rest of a row has id -1 and similarity -inf. Memory beside the result: 7·k·d KB
        for candidates, and 8·d bytes per sample of a query's lists.
        """
        wanted = points_on(queries, query_ids, _CPU)
        blocks = (slice(start, start + _QUERIES) for start in range(0, len(queries), _QUERIES))
        ranking = Ranking.joined([self._rank(wanted[rows], lists[rows], k) for rows in blocks])
        ids = ranking.ids.masked_fill(ranking.ids == NO_ID, -1)
        return Neighbors(ids.numpy(), ranking.similarity.numpy())

    def _rank(self, queries: Points, lists: np.ndarray, k: int) -> Ranking:
        ranking = Ranking.empty(len(queries), k, _CPU)
        self._index.nprobe = lists.shape[1]
        # One of the candidates may be the query itself. faiss also takes the queries' products with the centroids, but
        # uses them only for indexes that store residuals: zeros do.
        products, positions = self._index.search_preassigned(
            queries.embeddings.float().numpy(), k + 1 + MARGIN, lists, np.zeros(lists.shape, np.float32)
        )

        def rank_all(rows: torch.Tensor) -> Ranking:
            parts = []
            for row in rows.tolist():
                members = np.concatenate(
                    [self._order[self._start(number) : self._ends[number]] for number in lists[row]]
                )
                one = slice(row, row + 1)
                parts.append(rank_exhaustively(ranking[one], queries[one], self._points[torch.from_numpy(members)]))
            return Ranking.joined(parts)

        # An exact comparison converts all rows of its points, so it gets no more than the candidates.
        distinct, places = torch.from_numpy(positions).clamp(min=0).unique(return_inverse=True)
        places[torch.from_numpy(positions < 0)] = -1
        return rank_candidates(ranking, queries, self._points[distinct], torch.from_numpy(products), places, rank_all)

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0


def _filled_index(embeddings: torch.Tensor, lists: np.ndarray, num_lists: int) -> Any:
    """Return faiss's inverted file of embeddings (n, d) under lists (n,), with their rows as ids."""
    import faiss

    dim = embeddings.shape[1]
    # by_residual=False stores float16 numbers as they are: exact, in half the memory of IndexIVFFlat. Lists are always
    # chosen outside, so the quantizer is never searched: it stays empty, and there is nothing to train.
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim),
        dim,
        num_lists,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,
    )
    index.is_trained = True
    for start in range(0, len(lists), _ADDED):
        rows = embeddings[start : start + _ADDED].float().numpy()
        ids, under = np.arange(start, start + len(rows)), lists[start : start + len(rows)]
        index.add_core(len(rows), *map(faiss.swig_ptr, (rows, ids, under)))
    return index


def merge_neighbors(parts: Sequence[Neighbors]) -> Neighbors:
    """Return the k best of the results of several inverted files for the same queries; id -1 where there are fewer."""
    ids = np.concatenate([part.neighbor_ids for part in parts], axis=1)
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    order = np.lexsort((ids, -similarity), axis=1)[:, : parts[0].neighbor_ids.shape[1]]
    best = np.take_along_axis(similarity, order, axis=1).astype(np.float32)
    return Neighbors(np.take_along_axis(ids, order, axis=1), best)


def search_lists(
    search: Callable[[np.ndarray, np.ndarray, np.ndarray], Neighbors],
    queries: np.ndarray,
    query_ids: np.ndarray,
    lists: Lists,
    nprobe: int,
) -> Neighbors:
    """Return k neighbours of every query from its `nprobe` nearest lists, or from more while these hold too few.

    search: returns the merged result of all inverted files of a pool for (queries, query_ids, lists). The pool must
    hold more than k samples.
    """
    neighbors = search(queries, query_ids, lists.nearest(queries, nprobe))
    short = np.flatnonzero((neighbors.neighbor_ids < 0).any(1))
    while len(short):  # doubling reaches all lists in a few rounds, and few queries need any
        assert nprobe < len(lists), "all lists together hold no more than k samples"
        nprobe = min(2 * nprobe, len(lists))
        more = search(queries[short], query_ids[short], lists.nearest(queries[short], nprobe))
        neighbors.neighbor_ids[short], neighbors.similarity[short] = more.neighbor_ids, more.similarity
        short = short[(more.neighbor_ids < 0).any(1)]
    return neighbors


def choose_nprobe(
    search: Callable[[int], Neighbors], exact: Neighbors, num_lists: int, min_recall: float
) -> tuple[int, list[dict[str, float]]]:
    """Return the smallest power of two of lists that reaches `min_recall`, and the recall of every number tried.

    search: returns the neighbours of a random part of the pool for an nprobe; exact: their exact neighbours. Where no
    smaller number reaches the recall, all lists are searched.
    """
    measured: list[dict[str, float]] = []
    nprobe = 1
    while True:
        measured.append({"nprobe": nprobe, "recall": recall(search(nprobe).neighbor_ids, exact.neighbor_ids)})
        if measured[-1]["recall"] >= min_recall or nprobe == num_lists:
            return nprobe, measured
        nprobe = min(2 * nprobe, num_lists)
