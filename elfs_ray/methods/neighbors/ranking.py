"""Exact rankings from approximate candidates: what makes a search by faiss exact.

faiss returns the best of each query by float32 products. Their error has a proven bound, so an exact comparison of
these candidates settles the ranking wherever the worst candidate is further from the k-th best than the bound. The few
queries where it is not are compared with every point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elfs_ray.methods.numeric.exact_arithmetic import MAX_NORM, exact_rows, product_error, row_chunks

# Candidates beyond the k + 1 that are needed (one may be the query itself). Neighbouring ranks are usually some 1e-4
# apart and the bound is some 2e-5, so a few spare ranks prove nearly every query; each costs an exact product.
MARGIN = 4
NO_ID = torch.iinfo(torch.int64).max
_CHUNK = {"cpu": 16, "cuda": 1024}  # queries whose candidates' coordinates fit a core's cache, or fill a GPU


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
    """The best k so far of m queries: similarity (m, k) float64, exact and descending, ids (m, k), ties ascending.

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
        """Return the best k of this ranking and of further samples (m, c), which it does not hold yet."""
        similarity, order = torch.cat([self.similarity, similarity], dim=1).sort(dim=1, descending=True)
        ids = torch.cat([self.ids, ids], dim=1).gather(1, order)
        # Few rows hold equal similarities, and sorting all of them by id as well takes three times as long.
        equal = (similarity[:, 1:] == similarity[:, :-1]) & ~similarity[:, 1:].isneginf()
        rows = equal.any(1).nonzero().squeeze(1)
        ids_of_rows, order = ids[rows].sort(dim=1)
        order = similarity[rows].gather(1, order).argsort(dim=1, descending=True, stable=True)
        ids[rows] = ids_of_rows.gather(1, order)  # the similarities are in order as they are
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

    approximate: their products in float32, descending; positions: their rows of points, -1 where there are no more.
    rank_all: merges, for some queries (rows), every point that they are searched in.
    """
    error = MAX_NORM**2 * product_error(queries.embeddings.shape[1], approximate.device)
    bound = approximate.double() + error  # of the exact similarity of a candidate, and of all that follow it
    level = ranking.similarity[:, -1:]
    ids = points.ids[positions.clamp(min=0)]
    wanted = (positions >= 0) & (bound >= level) & (ids != queries.ids.unsqueeze(1))
    similarity = _similarity_of(queries.embeddings, points.embeddings, positions, bound >= level)
    merged = ranking.merged(
        similarity.masked_fill_(~wanted, -torch.inf),
        ids.masked_fill_(~wanted, NO_ID),
    )
    # A point that faiss left out is no better than the last candidate; with fewer candidates than were asked for, -1 at
    # the end, none was left out.
    unproven = (positions[:, -1] >= 0) & (bound[:, -1] >= merged.similarity[:, -1])
    rows = unproven.nonzero().squeeze(1)
    if len(rows):
        settled = rank_all(rows)
        merged.similarity[rows], merged.ids[rows] = settled.similarity, settled.ids
    return merged


def _similarity_of(
    queries: torch.Tensor, points: torch.Tensor, positions: torch.Tensor, relevant: torch.Tensor
) -> torch.Tensor:
    """Return exact products (m, c) float64 of queries with the points at positions, at least where they are relevant.

    Relevant are the first few of every row, so a chunk of rows is cut to its widest.
    """
    result = torch.full(positions.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    positions, queries = positions.clamp(min=0), queries.float()
    step = _CHUNK[queries.device.type]
    size = (step * positions.shape[1], points.shape[1])
    # The memory of every chunk: allocated anew it would be cleared anew.
    halves, singles, doubles = (
        torch.empty(size, dtype=dtype, device=queries.device) for dtype in (torch.float16, torch.float32, torch.float64)
    )
    for start, width in zip(range(0, len(queries), step), _widths(relevant, step), strict=True):
        rows = slice(start, start + step)
        chosen = positions[rows, :width].flatten()
        pairs = slice(0, len(chosen))
        torch.index_select(points, 0, chosen, out=halves[pairs])
        # Products of two float16 numbers, of 11 bits each, are exact in float32: only the sum needs float64. Converting
        # before the sum is faster than a sum that converts.
        products = singles[pairs].copy_(halves[pairs]).view(-1, width, size[1]).mul_(queries[rows].unsqueeze(1))
        torch.sum(doubles[pairs].view(products.shape).copy_(products), 2, out=result[rows, :width])
    return result


def _widths(relevant: torch.Tensor, step: int) -> list[int]:
    """The most relevant candidates that a query of each chunk of `step` queries has, at least 1."""
    return [int(part.max()) for part in relevant.sum(1).clamp(min=1).split(step)]


def rank_exhaustively(ranking: Ranking, queries: Points, points: Points) -> Ranking:
    """Return the ranking with all points merged into it, by products in float64, which are exact.

    Memory: 8·n·d bytes for n points, and 100 MB (CPU) or 2 GB (GPU) for their products with the queries.
    """
    points = points[points.ids.argsort()]
    right = exact_rows(points.embeddings).T
    k = min(ranking.ids.shape[1], len(points))
    parts = []
    for rows in row_chunks(len(queries), 4 * len(points), right.device):
        similarity = exact_rows(queries.embeddings[rows]) @ right
        itself = queries.ids[rows].unsqueeze(1) == points.ids
        similarity.masked_fill_(itself, -torch.inf)
        # topk takes any of several equal values: of those at the k-th the first, with the lowest ids, are taken here.
        kth = similarity.topk(k, dim=1).values[:, -1:]
        above, level = similarity > kth, similarity == kth
        chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns = chosen.nonzero()[:, 1].view(-1, k)
        best = similarity.gather(1, columns)
        ids = points.ids[columns].masked_fill_(best.isneginf(), NO_ID)
        parts.append(ranking[rows].merged(best, ids))
    return Ranking.joined(parts)
