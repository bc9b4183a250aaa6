"""cluster: give every embedding a pseudo-label.

Reads   embeddings/; neighbors/ for TEMI, and for metrics where they are; with cluster.method=file also a table of
        pseudo-labels
Writes  clusters/centroids.parquet, and clusters/pseudo_labels/ with one file for each file of embeddings/

k-means runs over workers that each hold a shard of the embeddings (shards.py). With cluster.method=temi, heads
that are trained on the nearest neighbours (temi.py) then give the labels.

The centroids of k-means are those that samples were assigned to, of unit length with cluster.spherical=true. The
centroids of TEMI and of a file are the means of their samples. Each sample has the distance to its cluster's centroid.
"""

import io
import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.methods.clustering_metrics import neighbor_purity
from elfs_ray.methods.kmeans.lloyd import KMeansResult, KMeansState, kmeans
from elfs_ray.methods.kmeans.num_clusters import ESTIMATE_ROWS, estimate_num_clusters
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.cluster.external_labels import write_external_labels
from elfs_ray.stages.cluster.shards import LABELS_DIR, ShardedPoints
from elfs_ray.stages.cluster.temi import run_temi
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

STATE_FILE = "kmeans_state.npz"
SAVE_INTERVAL_S = 2.0  # iterations of a small pool take milliseconds, and a write to a bucket far longer
PURITY_SAMPLES = 20_000  # enough for a standard error below 0.4%


def run_cluster(config: Config, run_dir: RunDir) -> ClusterResult:
    """Give every embedding a pseudo-label.

    Raises ValueError for embeddings that are not finite, for fewer distinct embeddings than clusters, and for a deep
    clustering that collapsed. Driver memory: four copies of the centroids, and 12 bytes a sample for the metrics.
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
        points.release()  # TEMI needs the same CPUs, GPUs and memory
        optional["temi"] = run_temi(config, run_dir, num_clusters, points.count)
    if cluster.method == "kmeans":
        centroids = result.centroids
        sizes = points.write_labels(run_dir, centroids)
    else:
        centroids = points.means_of_labels(run_dir, num_clusters)
        sizes = points.write_labels_and_distances(run_dir, centroids)
        filesystem.delete(run_dir.path("cluster", LABELS_DIR))  # they are in clusters/pseudo_labels/ now
    points.release()
    _write_centroids(run_dir, centroids)
    if config.needs_neighbors:
        optional["neighbor_purity"] = _neighbor_purity(run_dir)
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
    say(f"cluster   {estimate.num_clusters} clusters, estimated from {min(ESTIMATE_ROWS, points.count):,} embeddings")
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


def _neighbor_purity(run_dir: RunDir) -> float:
    """Return the mean share of a sample's neighbours that have its pseudo-label.

    The mean is over the first samples of every file, some 20,000 in all.
    """
    ids = run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=schema.SAMPLE_ID)
    labels = run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=schema.PSEUDO_LABEL)
    files = run_dir.table_files(schema.NEIGHBORS)
    sampled = pa.concat_tables(
        filesystem.read_table(path).slice(0, -(-PURITY_SAMPLES // len(files))).combine_chunks() for path in files
    )
    rows = np.searchsorted(ids, sampled[schema.SAMPLE_ID].to_numpy())
    return neighbor_purity(labels, rows, np.searchsorted(ids, schema.matrix_of(sampled, schema.NEIGHBOR_IDS)))
