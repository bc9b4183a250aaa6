"""How good pseudo-labels and embeddings are, measured by true labels.

Reads   clusters/pseudo_labels, embeddings/
Writes  <folder>/knn-<hash>.json
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import ray
import torch

from elfs_ray.evaluation.data import NO_LABEL, TrueLabels, digest
from elfs_ray.methods.clustering_metrics import (
    adjusted_rand_index,
    contingency_table,
    matched_accuracy,
    normalized_mutual_information,
    purity,
)
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.runtime.cluster import run_tasks
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.training.classifier_inputs import kept_or_computed
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

NUM_NEIGHBORS = 10
MAX_QUERIES = 10_000  # whose error is then below 0.5%, as a standard deviation
QUERIES_PER_TASK = 1024
_QUERY_STREAM = 0x6B6E6E


@dataclass(frozen=True)
class ClusteringQuality:
    """Pseudo-labels compared with true labels; accuracy is that of matching clusters and classes one to one."""

    num_clusters: int
    num_classes: int
    accuracy: float
    purity: float
    nmi: float
    ari: float


@dataclass(frozen=True)
class NeighborVote:
    """How often the nearest neighbours of a sample, by cosine and without itself, vote for its class."""

    accuracy: float
    num_neighbors: int
    num_queries: int


def judge_clustering(run_dir: RunDir, labels: TrueLabels) -> ClusteringQuality:
    """Compare the pseudo-labels with the true labels, on the samples that have one."""
    sample_ids, clusters = (
        run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=column)
        for column in (schema.SAMPLE_ID, schema.PSEUDO_LABEL)
    )
    of_sample = labels.of_id[sample_ids]
    known = of_sample != NO_LABEL
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
    """Return `neighbor_accuracy`, kept as a file in `folder` for later evaluations of the same embeddings."""
    name = f"knn-{digest(run_dir.identity('embed'), labels.of_id, seed)}.json"
    compute = lambda: asdict(neighbor_accuracy(run_dir, labels, seed, device))  # noqa: E731
    return NeighborVote(**kept_or_computed(filesystem.join(folder, name), compute))


def neighbor_accuracy(run_dir: RunDir, labels: TrueLabels, seed: int, device: str) -> NeighborVote:
    """Let the 10 nearest neighbours of each sample vote for its class (ties: the lowest).

    Only samples with a label count, and of more than 10,000 a random 10,000. Costs 2·n·d operations each.
    Driver memory: 20 bytes a sample. Raises ValueError where fewer than two samples have a label.
    """
    embedded = run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    of_sample = labels.of_id[embedded]
    known = of_sample != NO_LABEL
    sample_ids, classes = embedded[known], of_sample[known]
    if len(sample_ids) < 2:
        raise ValueError(f"{len(sample_ids)} samples have a label: at least 2 are needed, check pool.label")
    queries = np.sort(np.argsort(hash_uint64(seed, _QUERY_STREAM, sample_ids), kind="stable")[:MAX_QUERIES])
    labelled = ray.put((sample_ids, classes))
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


def _vote(run_dir: RunDir, labelled: list[ray.ObjectRef], queries: np.ndarray, device: str) -> int:
    """Count the samples (positions among the labelled ones) that have the class of most of their neighbours."""
    torch.set_num_threads(1)
    sample_ids, classes = ray.get(labelled[0])
    numbers = np.unique(classes, return_inverse=True)[1]
    rows = run_dir.read_rows(schema.EMBEDDINGS, sample_ids[queries], [schema.EMBEDDING])
    nearest = nearest_neighbors(
        schema.matrix_of(rows, schema.EMBEDDING),
        sample_ids[queries],
        _labelled_shards(run_dir, sample_ids),
        min(NUM_NEIGHBORS, len(sample_ids) - 1),
        device=device,
    )
    votes = numbers[np.searchsorted(sample_ids, nearest.neighbor_ids)]
    counts = np.zeros((len(queries), numbers.max() + 1), np.int64)
    np.add.at(counts, (np.arange(len(queries))[:, None], votes), 1)
    return int((counts.argmax(1) == numbers[queries]).sum())


def _labelled_shards(run_dir: RunDir, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the embeddings of some samples (ascending ids), file by file."""
    for rows in run_dir.read_table(schema.EMBEDDINGS):
        ids = rows[schema.SAMPLE_ID].to_numpy()
        is_labelled = np.isin(ids, sample_ids, assume_unique=True)
        yield schema.matrix_of(rows, schema.EMBEDDING)[is_labelled], ids[is_labelled]
