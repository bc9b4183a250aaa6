"""Measure how well pseudo-labels and embeddings agree with the true labels.

Reads   clusters/pseudo_labels, embeddings/
Writes  <folder>/knn-<hash>.json
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from elfs_ray.evaluation.true_labels import NO_LABEL, TrueLabels, digest
from elfs_ray.methods.clustering_metrics import (
    adjusted_rand_index,
    contingency_table,
    matched_accuracy,
    normalized_mutual_information,
    purity,
)
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import get_result, put, run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.training.classifier_inputs import kept_or_computed, load_embeddings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

NUM_NEIGHBORS = 10
MAX_QUERIES = 10_000  # the standard error of a share over n queries is at most 0.5/√n: 0.5% here
QUERIES_PER_TASK = 1024
_QUERY_STREAM = 0x6B6E6E  # "knn"; keeps these hashes apart from others of the same seed


@dataclass(frozen=True)
class ClusteringQuality:
    """Pseudo-labels compared with true labels; accuracy is for the best one-to-one matching of clusters and classes."""

    num_clusters: int
    num_classes: int
    accuracy: float
    purity: float
    nmi: float
    ari: float


@dataclass(frozen=True)
class NeighborVote:
    """The share of samples whose nearest neighbours (cosine, without the sample itself) vote for their class."""

    accuracy: float
    num_neighbors: int
    num_queries: int


def judge_clustering(run_dir: RunDir, labels: TrueLabels) -> ClusteringQuality:
    """Compare pseudo-labels with true labels, on the samples that have a true label."""
    sample_ids, clusters = (
        run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=column)
        for column in (schema.SAMPLE_ID, schema.PSEUDO_LABEL)
    )
    of_sample = labels.of_id[sample_ids]
    known = of_sample != NO_LABEL
    # Numbered anew: classes that no sample has would be empty columns of the table.
    classes, truth = np.unique(of_sample[known], return_inverse=True)
    num_clusters = ClusterResult.read(run_dir).num_clusters
    table = contingency_table(clusters[known], truth, num_clusters, len(classes))
    return ClusteringQuality(
        num_clusters,
        len(classes),
        matched_accuracy(table),
        purity(table),
        normalized_mutual_information(table),
        adjusted_rand_index(table),
    )


def judge_embeddings(run_dir: RunDir, labels: TrueLabels, seed: int, device: str, folder: str) -> NeighborVote:
    """Return `neighbor_accuracy`, from a file in `folder` if an earlier evaluation of these embeddings left one."""
    name = f"knn-{digest(run_dir.identity('embed'), labels.of_id, seed)}.json"

    def compute() -> dict[str, float | int]:
        return asdict(neighbor_accuracy(run_dir, labels, seed, device))

    return NeighborVote(**kept_or_computed(filesystem.join(folder, name), compute))


def neighbor_accuracy(run_dir: RunDir, labels: TrueLabels, seed: int, device: str) -> NeighborVote:
    """Measure how often the 10 nearest neighbours of a sample vote for its class; a tie goes to the lowest class.

    Samples without a label neither vote nor are voted on. Of more than 10,000 samples a random 10,000 are queries.
    Cost: 2 · n · d operations a query. Driver memory: 20 bytes a sample. Raises ValueError if fewer than two samples
    have a label.
    """
    embedded = run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    of_sample = labels.of_id[embedded]
    known = of_sample != NO_LABEL
    sample_ids, classes = embedded[known], of_sample[known]
    if len(sample_ids) < 2:
        raise ValueError(f"{len(sample_ids)} samples have a label, but there must be at least 2: check pool.label")
    # Sampled by hashes, which depend on seed and ids only, not on how the tables are cut into files. Sorted, so that
    # the rows of a task lie close together.
    order = np.argsort(hash_uint64(seed, _QUERY_STREAM, sample_ids), kind="stable")
    queries = np.sort(order[:MAX_QUERIES])
    labelled = put((sample_ids, classes))
    tasks = [
        (run_dir, [labelled], queries[start : start + QUERIES_PER_TASK], device)
        for start in range(0, len(queries), QUERIES_PER_TASK)
    ]
    with Progress("evaluate", len(queries), "neighbourhoods") as progress:
        num_right = 0
        for position, num_right_of_task in run_tasks(_vote, tasks, num_gpus_each=1 if device == "cuda" else 0):
            num_right += num_right_of_task
            progress.advance(len(tasks[position][2]))
    return NeighborVote(num_right / len(queries), min(NUM_NEIGHBORS, len(sample_ids) - 1), len(queries))


def _vote(run_dir: RunDir, labelled: list[Any], queries: np.ndarray, device: str) -> int:
    """Return how many queries have the class that most of their neighbours have.

    queries: positions among the labelled samples, (q,) int64.
    """
    torch.set_num_threads(1)  # a task holds one CPU; by default torch would use every core
    sample_ids, classes = get_result(labelled[0])
    numbers = np.unique(classes, return_inverse=True)[1]
    nearest = nearest_neighbors(
        load_embeddings(run_dir, sample_ids[queries]),
        sample_ids[queries],
        _labelled_shards(run_dir, sample_ids),
        min(NUM_NEIGHBORS, len(sample_ids) - 1),
        device=device,
    )
    votes = numbers[np.searchsorted(sample_ids, nearest.neighbor_ids)]
    counts = np.zeros((len(queries), numbers.max() + 1), np.int64)
    # `counts[rows, votes] += 1` would count a class once however many neighbours vote for it.
    np.add.at(counts, (np.arange(len(queries))[:, None], votes), 1)
    winners = counts.argmax(1)
    return int((winners == numbers[queries]).sum())


def _labelled_shards(run_dir: RunDir, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (embeddings, ids) of some samples, file by file; sample_ids ascend."""
    for rows in run_dir.read_table(schema.EMBEDDINGS):
        ids = rows[schema.SAMPLE_ID].to_numpy()
        is_labelled = np.isin(ids, sample_ids, assume_unique=True)
        yield schema.matrix_of(rows, schema.EMBEDDING)[is_labelled], ids[is_labelled]
