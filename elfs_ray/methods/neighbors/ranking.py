"""Make exact rankings from the approximate candidates of a search by faiss.

faiss returns the best points of each query by float32 products, whose error has a proven bound. An exact comparison of
these candidates settles the ranking wherever the last candidate is further from the k-th best than the bound. The few
queries where it is not are compared with every point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elfs_ray.methods.numeric.exact_arithmetic import MAX_NORM, exact_rows, product_error, row_chunks

# Candidates beyond k + 1 (one may be the query itself). Adjacent ranks usually differ by some 1e-4 and the bound is
# some 2e-5, so a few spare candidates settle nearly every query; each costs an exact product.
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
    ids = points.ids[positions.clamp(min=0)]
    wanted = (positions >= 0) & (bound >= level) & (ids != queries.ids.unsqueeze(1))
    similarity = _similarity_of(queries.embeddings, points.embeddings, positions, bound >= level)
    merged = ranking.merged(
        similarity.masked_fill_(~wanted, -torch.inf),
        ids.masked_fill_(~wanted, NO_ID),
    )
    # A point that faiss left out is no better than the last candidate. Where candidates end with -1, there were fewer
    # points than requested, and none was left out.
    unproven = (positions[:, -1] >= 0) & (bound[:, -1] >= merged.similarity[:, -1])
    rows = unproven.nonzero().squeeze(1)
    if len(rows):
        settled = rank_all(rows)
        merged.similarity[rows], merged.ids[rows] = settled.similarity, settled.ids
    return merged


def _similarity_of(
    queries: torch.Tensor, points: torch.Tensor, positions: torch.Tensor, relevant: torch.Tensor
) -> torch.Tensor:
    """Return exact products (m, c) float64 of queries with the points at positions, where they are relevant."""
    # Candidates descend, so the relevant ones come first in every row: cut each chunk of rows to its longest.
    result = torch.full(positions.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    positions, queries = positions.clamp(min=0), queries.float()
    step = _CHUNK[queries.device.type]
    size = (step * positions.shape[1], points.shape[1])
    # All chunks share these buffers: new ones would have to be cleared by the OS each time.
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
    """Return, for each chunk of `step` queries, the largest number of relevant candidates of a query, at least 1."""
    return [int(part.max()) for part in relevant.sum(1).clamp(min=1).split(step)]


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
