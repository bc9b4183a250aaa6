"""What pseudo-labels and embeddings are worth, measured by true labels.

Reads   clusters/pseudo_labels, embeddings/
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from elfs_ray.evaluation.data import NO_LABEL, TrueLabels
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
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

NUM_NEIGHBORS = 10
MAX_QUERIES = 10_000  # whose error is then below 0.5%, as a standard deviation
QUERIES_PER_TASK = 1024
_QUERY_STREAM = 0x6B6E6E


def judge_clustering(run_dir: RunDir, labels: TrueLabels) -> dict[str, Any]:
    """The pseudo-labels beside the true labels of the samples that have one."""
    sample_ids, clusters = (
        run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=column)
        for column in (schema.SAMPLE_ID, schema.PSEUDO_LABEL)
    )
    of_sample = labels.of_id[sample_ids]
    known = of_sample != NO_LABEL
    classes, truth = np.unique(of_sample[known], return_inverse=True)
    num_clusters = ClusterResult.read(run_dir).num_clusters
    table = contingency_table(clusters[known], truth, num_clusters, len(classes))
    return {
        "num_clusters": num_clusters,
        "num_classes": len(classes),
        "accuracy": matched_accuracy(table),
        "purity": purity(table),
        "nmi": normalized_mutual_information(table),
        "ari": adjusted_rand_index(table),
    }


def neighbor_accuracy(run_dir: RunDir, labels: TrueLabels, seed: int, device: str) -> dict[str, Any]:
    """How often the 10 nearest neighbours by cosine, itself excluded, vote for a sample's class (ties: the lowest).

    Of the samples that have a label; of more than 10,000 a random 10,000 are asked. Costs 2·n·d operations each.
    Returns accuracy, num_neighbors, queries. Driver memory: 20 bytes a sample. Raises ValueError where fewer than two
    samples have a label.
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
        for position, own_right in run_tasks(_vote, tasks, num_gpus_each=1 if device == "cuda" else 0):
            num_right += own_right
            progress.advance(len(tasks[position][2]))
    return {
        "accuracy": num_right / len(queries),
        "num_neighbors": min(NUM_NEIGHBORS, len(sample_ids) - 1),
        "queries": len(queries),
    }


def _vote(run_dir: RunDir, labelled: list[ray.ObjectRef], queries: np.ndarray, device: str) -> int:
    """How many of some samples (positions among the labelled ones) have the class of most of their neighbours."""
    torch.set_num_threads(1)
    sample_ids, classes = ray.get(labelled[0])
    numbers = np.unique(classes, return_inverse=True)[1]
    rows = run_dir.read_rows(schema.EMBEDDINGS, sample_ids[queries], [schema.EMBEDDING])
    found = nearest_neighbors(
        schema.matrix_of(rows, schema.EMBEDDING),
        sample_ids[queries],
        _labelled_shards(run_dir, sample_ids),
        min(NUM_NEIGHBORS, len(sample_ids) - 1),
        device=device,
    )
    votes = numbers[np.searchsorted(sample_ids, found.neighbor_ids)]
    counts = np.zeros((len(queries), numbers.max() + 1), np.int64)
    np.add.at(counts, (np.arange(len(queries))[:, None], votes), 1)
    return int((counts.argmax(1) == numbers[queries]).sum())


def _labelled_shards(run_dir: RunDir, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The embeddings of some samples (ascending ids), file by file."""
    for rows in run_dir.read_table(schema.EMBEDDINGS):
        ids = rows[schema.SAMPLE_ID].to_numpy()
        own = np.isin(ids, sample_ids, assume_unique=True)
        yield schema.matrix_of(rows, schema.EMBEDDING)[own], ids[own]
