"""Make exact rankings from the approximate candidates of a search by faiss.

faiss returns the best points of each query by float32 products, whose error has a proven bound. An exact comparison of
these candidates settles the ranking wherever the last candidate is further from the k-th best than the bound. The few
queries where it is not are compared with every point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elfs_ray.methods.numeric.exact_arithmetic import MAX_NORM, exact_products, exact_rows, product_error, row_chunks

# Candidates beyond k + 1 (one may be the query itself). Adjacent ranks usually differ by some 1e-4 and the bound is
# some 2e-5, so a few spare candidates settle nearly every query; each costs an exact product.
MARGIN = 4
NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Points:
    """Embeddings (n, d) float16 of unit length and their ids (n,) int64, on one device."""

    embeddings: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Points":
        return Points(self.embeddings[rows], self.ids[rows])


@dataclass(frozen=True)
class Ranking:
    """The best k so far of m queries: exact similarity (m, k) float64, descending, and ids (m, k), ascending in ties.

    Places that are not taken yet hold -inf and NO_ID.
    """

    similarity: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def empty(cls, num_queries: int, k: int, device: torch.device) -> "Ranking":
        """Return a ranking with no place taken."""
        similarity = torch.full((num_queries, k), -torch.inf, dtype=torch.float64, device=device)
        return cls(similarity, torch.full((num_queries, k), NO_ID, device=device))

    @classmethod
    def joined(cls, parts: Sequence["Ranking"]) -> "Ranking":
        """Return the ranking of all parts' queries, in their order."""
        return cls(torch.cat([part.similarity for part in parts]), torch.cat([part.ids for part in parts]))

    def __getitem__(self, rows: slice | torch.Tensor) -> "Ranking":
        return Ranking(self.similarity[rows], self.ids[rows])

    def merged(self, similarity: torch.Tensor, ids: torch.Tensor) -> "Ranking":
        """Return the best k of this ranking and of new samples (m, c), which it must not hold yet."""
        similarity, order = torch.cat([self.similarity, similarity], dim=1).sort(dim=1, descending=True)
        ids = torch.cat([self.ids, ids], dim=1).gather(1, order)
        # Few rows hold equal similarities, and sorting all rows by id as well takes three times as long.
        equal = (similarity[:, 1:] == similarity[:, :-1]) & ~similarity[:, 1:].isneginf()
        rows = equal.any(1).nonzero().squeeze(1)
        ids_of_rows, order = ids[rows].sort(dim=1)
        order = similarity[rows].gather(1, order).argsort(dim=1, descending=True, stable=True)
        ids[rows] = ids_of_rows.gather(1, order)  # the similarities are in order already
        k = self.ids.shape[1]
        return Ranking(similarity[:, :k], ids[:, :k])


def rank_candidates(
    ranking: Ranking,
    queries: Points,
    points: Points,
    approximate: torch.Tensor,
    positions: torch.Tensor,
    rank_all: Callable[[torch.Tensor], Ranking],
) -> Ranking:
    """Return the ranking with points merged into it, from the candidates (m, c) that faiss returned for each query.

    approximate: their products in float32, descending; positions: their rows in points, -1 where there are no more.
    rank_all: returns the ranking of some queries (rows) after an exact comparison with all points they search.
    """
    error = MAX_NORM**2 * product_error(queries.embeddings.shape[1], approximate.device)
    bound = approximate.double() + error  # an upper bound on the exact similarity of a candidate and all that follow
    level = ranking.similarity[:, -1:]
    k = ranking.ids.shape[1]
    if approximate.shape[1] > k:
        # k + 1 candidates, one of which may be the query itself, have at least the similarity of the last of them.
        # faiss gives the rest in case the bound leaves several in question: most take no exact product.
        level = level.maximum(approximate[:, k : k + 1].double() - error)
    ids = points.ids[positions.clamp(min=0)]
    wanted = (positions >= 0) & (bound >= level) & (ids != queries.ids.unsqueeze(1))
    similarity = torch.full(positions.shape, -torch.inf, dtype=torch.float64, device=positions.device)
    rows = wanted.nonzero()[:, 0]
    similarity[wanted] = exact_products(queries.embeddings, rows, points.embeddings, positions[wanted])
    merged = ranking.merged(similarity, ids.masked_fill_(~wanted, NO_ID))
    # A point that faiss left out is no better than the last candidate. Where candidates end with -1, there were fewer
    # points than requested, and none was left out.
    unproven = (positions[:, -1] >= 0) & (bound[:, -1] >= merged.similarity[:, -1])
    rows = unproven.nonzero().squeeze(1)
    if len(rows):
        settled = rank_all(rows)
        merged.similarity[rows], merged.ids[rows] = settled.similarity, settled.ids
    return merged


def rank_exhaustively(ranking: Ranking, queries: Points, points: Points) -> Ranking:
    """Return the ranking with all points merged into it, by products in float64, which are exact.

    Memory: 8·n·d bytes for n points, and 100 MB (CPU) or 2 GB (GPU) for their products with the queries.
    """
    points = points[points.ids.argsort()]  # columns in the order of ids, so that ties need no sort
    right = exact_rows(points.embeddings).T
    k = min(ranking.ids.shape[1], len(points))
    parts = []
    for rows in row_chunks(len(queries), 4 * len(points), right.device):
        similarity = exact_rows(queries.embeddings[rows]) @ right
        itself = queries.ids[rows].unsqueeze(1) == points.ids
        similarity.masked_fill_(itself, -torch.inf)
        # topk breaks ties arbitrarily. Of the values equal to the k-th, take the first, which have the lowest ids.
        kth = similarity.topk(k, dim=1).values[:, -1:]
        above, level = similarity > kth, similarity == kth
        chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns = chosen.nonzero()[:, 1].view(-1, k)
        best = similarity.gather(1, columns)
        ids = points.ids[columns].masked_fill_(best.isneginf(), NO_ID)
        parts.append(ranking[rows].merged(best, ids))
    return Ranking.joined(parts)
