"""cluster: give every embedding a pseudo-label.

Reads   embeddings/; neighbors/ for TEMI; with cluster.method=file also a table of pseudo-labels
Writes  clusters/centroids.parquet, and clusters/pseudo_labels/ with one file for each file of embeddings/

k-means runs over workers that each hold a shard of the embeddings (shards.py). With cluster.method=temi, heads
that are trained on the nearest neighbours (temi.py) then give the labels.

The centroids of k-means are those that samples were assigned to, of unit length with cluster.spherical=true. The
centroids of TEMI and of a file are the means of their samples. Each sample has the distance to its cluster's centroid.
"""

import dataclasses
import io
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.methods.clustering_trust import TRUST_ROWS, estimate_trust
from elfs_ray.methods.kmeans.lloyd import KMeansResult, KMeansState, kmeans
from elfs_ray.methods.kmeans.num_clusters import ESTIMATE_ROWS, estimate_num_clusters
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.cluster.external_labels import write_external_labels
from elfs_ray.stages.cluster.shards import LABELS_DIR, ShardedPoints
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

STATE_FILE = "kmeans_state.npz"
SAVE_INTERVAL_S = 2.0  # iterations of a small pool take milliseconds, and a write to a bucket far longer


def run_cluster(config: Config, run_dir: RunDir) -> ClusterResult:
    """Give every embedding a pseudo-label.

    Raises ValueError for embeddings that are not finite, for fewer distinct embeddings than clusters, and for a deep
    clustering that collapsed. Driver memory: four copies of the centroids.
    """
    cluster = config.cluster
    # Before any worker starts, since the file may be refused.
    if cluster.method == "file":
        num_clusters = write_external_labels(cluster, run_dir)
    points = ShardedPoints(cluster, run_dir)
    optional: dict[str, Any] = {}
    if cluster.method != "file":
        num_clusters, optional["num_clusters_evidence"] = _choose_num_clusters(config, points)
        result = _fit(config, run_dir, points, num_clusters)
        optional |= {"objective": result.objective / points.count, "iterations": result.num_iterations}

    if cluster.method == "temi":
        # Imported only here: it imports Ray Train, which takes seconds.
        from elfs_ray.stages.cluster.temi import run_temi

        points.release()  # TEMI needs the same CPUs, GPUs and memory
        optional["temi"] = run_temi(config, run_dir, num_clusters, points.count)
    if cluster.method == "kmeans":
        centroids = result.centroids
        sizes = points.write_labels(run_dir, centroids)
    else:
        centroids = points.means_of_labels(run_dir, num_clusters)
        sizes = points.write_labels_and_distances(run_dir, centroids)
        filesystem.delete(run_dir.path("cluster", LABELS_DIR))  # they are in clusters/pseudo_labels/ now
    _write_centroids(run_dir, centroids)
    optional["trust"] = _trust(config, run_dir, points, num_clusters, optional.get("temi"))
    points.release()
    return ClusterResult(
        rows=points.count,
        num_clusters=num_clusters,
        method=cluster.method,
        workers=points.num_shards,
        sizes=sizes.tolist(),
        **optional,
    )


def _choose_num_clusters(config: Config, points: ShardedPoints) -> tuple[int, list[dict[str, float]]]:
    """Return the number of clusters of the config, or an estimate with its evidence for num_clusters=auto."""
    num_clusters = config.cluster.num_clusters
    if not isinstance(num_clusters, str):
        return int(num_clusters), []
    estimate = points.on_sample(partial(estimate_num_clusters, seed=config.seed), ESTIMATE_ROWS, config.seed)
    fewest, most = estimate.fitting
    others = f"; {fewest} to {most} fit nearly as well" if fewest < most else ""
    embeddings = f"{min(ESTIMATE_ROWS, points.count):,} embeddings"
    say(f"cluster   {estimate.num_clusters} clusters, estimated from {embeddings}{others}")
    return estimate.num_clusters, list(estimate.evidence)


def _fit(config: Config, run_dir: RunDir, points: ShardedPoints, num_clusters: int) -> KMeansResult:
    """Run k-means from the state that an earlier run saved, and save the state as it goes."""
    cluster = config.cluster
    saved_s = time.monotonic()
    total = cluster.num_tries * cluster.max_iterations
    with Progress("cluster", total, "iterations at most") as progress:

        def on_iteration(state: KMeansState) -> None:
            nonlocal saved_s
            history = state.history or (state.best.history if state.best else ())
            done = state.attempt * cluster.max_iterations + max(0, len(state.history) - 1)
            attempt = min(state.attempt + 1, cluster.num_tries)
            note = f"try {attempt}/{cluster.num_tries}, mean squared distance {history[-1] / points.count:.5f}"
            progress.update(min(done, total), note)
            if time.monotonic() - saved_s > SAVE_INTERVAL_S:
                _save_state(run_dir, state)
                saved_s = time.monotonic()

        result = kmeans(
            points,
            num_clusters,
            seed=config.seed,
            max_iterations=cluster.max_iterations,
            tolerance=cluster.tolerance,
            num_tries=cluster.num_tries,
            spherical=cluster.spherical,
            start=_load_state(run_dir),
            on_iteration=on_iteration,
        )
    # A run that is killed while it writes tables resumes with the result.
    _save_state(run_dir, KMeansState(attempt=cluster.num_tries, best=result))
    return result


def _save_state(run_dir: RunDir, state: KMeansState) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **state.to_arrays())
    filesystem.write_bytes(run_dir.path("cluster", STATE_FILE), buffer.getvalue())


def _load_state(run_dir: RunDir) -> KMeansState | None:
    path = run_dir.path("cluster", STATE_FILE)
    if not filesystem.exists(path):
        return None
    with np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False) as arrays:
        return KMeansState.from_arrays(dict(arrays))


def _write_centroids(run_dir: RunDir, centroids: np.ndarray) -> None:
    num_clusters, dim = centroids.shape
    ids = np.arange(num_clusters, dtype=np.int32)
    table = pa.table([ids, schema.matrix_column(centroids)], schema=schema.centroids_schema(dim))
    filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.CENTROIDS_FILE), table)


def _trust(
    config: Config, run_dir: RunDir, points: ShardedPoints, num_clusters: int, temi: Mapping[str, Any] | None
) -> dict[str, float] | None:
    """Return how far the pseudo-labels can be trusted, measured on a sample of the pool, and say so."""
    sample_ids = points.sample_ids(TRUST_ROWS, config.seed)
    labels = _labels_of(run_dir, sample_ids)
    if temi is not None:  # the other heads have the matched labels already
        others = np.delete(temi["head_agreement"], temi["head"])
        agreement = float(others.mean()) if others.size else None
    else:
        # Labels made elsewhere have no repetition to agree with: their neighbours alone speak for them.
        agreement = 1.0 if config.cluster.method == "file" else None
    estimate = partial(estimate_trust, labels=labels, num_clusters=num_clusters, seed=config.seed, agreement=agreement)
    trust = points.on_rows(estimate, sample_ids)
    if trust is None:
        return None
    say(f"cluster   about {trust.right:.0%} of the pseudo-labels look right")
    return {**dataclasses.asdict(trust), "right": trust.right}


def _labels_of(run_dir: RunDir, sample_ids: np.ndarray) -> np.ndarray:
    """Return the pseudo-labels (m,) int64 of some samples, ids ascending. Memory: one file of labels."""
    parts = []
    for path in run_dir.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path, [schema.SAMPLE_ID, schema.PSEUDO_LABEL])
        is_sampled = np.isin(rows[schema.SAMPLE_ID].to_numpy(), sample_ids)
        parts.append(rows[schema.PSEUDO_LABEL].to_numpy()[is_sampled])
    return np.concatenate(parts).astype(np.int64)
