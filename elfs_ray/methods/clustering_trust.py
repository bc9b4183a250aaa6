"""Estimate without labels how many pseudo-labels are right: do neighbours share them, and do clusterings agree?

A right clustering puts near neighbours into one cluster, and comes out again when it is repeated. Neither is enough:
stable clusters may cut through classes, and smooth ones may lie elsewhere in each repetition. On eight sets of 2,944
to 10,000 images the product of the two was 10 points from the share of right labels, on average (BENCHMARKS.md, "Few
labels").
"""

from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.clustering_metrics import contingency_table, matched_accuracy, neighbor_purity
from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.num_clusters import count_distinct
from elfs_ray.methods.kmeans.points import ArrayPoints

TRUST_ROWS = 20_000
LEAST_TRUST = 0.6  # share of right pseudo-labels below which `auto` covers the whole pool at once
NEIGHBORS = 10
MIN_ROWS_PER_CLUSTER = 10
_QUERIES = 4_000  # rows whose neighbours are looked up; the standard error is then below 0.01
_REPEATS = 2
_BLOCK = 500


@dataclass(frozen=True)
class LabelTrust:
    """Tell how far pseudo-labels can be trusted; each share is from 0 to 1.

    neighbor_purity: mean share of a sample's 10 nearest neighbours with its label. agreement: share of samples that
    repeated clusterings label alike, after matching.
    """

    neighbor_purity: float
    agreement: float

    @property
    def right(self) -> float:
        """Return the estimated share of right labels."""
        return self.neighbor_purity * self.agreement


def estimate_trust(
    rows: torch.Tensor, labels: np.ndarray, num_clusters: int, *, seed: int, agreement: float | None = None
) -> LabelTrust | None:
    """Return the trust in the labels (m,) of embeddings (m, d) float16; None if a cluster has too few rows to tell.

    agreement: that of the clusterings if it is known already; otherwise k-means is repeated on the rows.
    Memory: 6·m·d bytes, 16·m·k for k-means.
    """
    if count_distinct(rows) < MIN_ROWS_PER_CLUSTER * num_clusters:
        return None
    if agreement is None:
        agreement = _agreement_with_repeats(rows, labels, num_clusters, seed)
    queries = np.linspace(0, len(rows) - 1, min(_QUERIES, len(rows))).astype(np.int64)
    return LabelTrust(neighbor_purity(labels, queries, _neighbors(rows.float(), queries)), agreement)


def _agreement_with_repeats(rows: torch.Tensor, labels: np.ndarray, num_clusters: int, seed: int) -> float:
    points = ArrayPoints(rows.cpu().numpy(), np.arange(len(rows)), device=str(rows.device))
    agreements = []
    for repeat in range(1, _REPEATS + 1):
        result = kmeans(points, num_clusters, seed=seed + repeat, max_iterations=25, tolerance=1e-3, num_tries=1)
        other = nearest_centroids(rows, result.centroids).cpu().numpy()
        agreements.append(matched_accuracy(contingency_table(labels, other, num_clusters, num_clusters)))
    return float(np.mean(agreements))


def _neighbors(rows: torch.Tensor, queries: np.ndarray) -> np.ndarray:
    """Return the positions (q, 10) of the rows most similar to each query, itself left out.

    In plain float32 and without faiss: a near tie that falls otherwise does not change a mean over thousands.
    """
    blocks = []
    for start in range(0, len(queries), _BLOCK):
        block = torch.from_numpy(queries[start : start + _BLOCK]).to(rows.device)
        similarity = rows[block] @ rows.T
        similarity[torch.arange(len(block)), block] = -torch.inf
        blocks.append(similarity.topk(NEIGHBORS, dim=1).indices.cpu())
    return torch.cat(blocks).numpy()
