"""Make the tables of a large pool for scale.py: embeddings, index, pseudo-labels and dynamics, each a function of ids.

An embedding is one of 1,000 class centres, plus a point of a 16-dimensional subspace of its class, as those of images
have few directions in which their neighbours differ, plus a little noise. A tenth of the samples, those whose ids end
in 9, are near copies of others anywhere in the pool, with a similarity of about 0.97.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from kmeans import ROWS_PER_FILE, unit

from elfs_ray.methods.numeric.hashing import hash_uint64, hash_uniform
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

DIM, EPOCHS, RANKS = 128, 10, 8
NUM_CLASSES, DIRECTIONS, SUBSPACES, NOISE_ROWS = 1000, 16, 50, 8191
NUM_PROCESSES = 2


def write_pool(run_dir: RunDir, num_samples: int, *, dynamics: bool, embeddings: bool) -> None:
    """Write index/ and pseudo-labels, and dynamics or embeddings, without those files that are there already."""
    writes: dict[str, Callable[[], pa.Table]] = {}
    for first in range(0, num_samples, ROWS_PER_FILE):
        end = min(first + ROWS_PER_FILE, num_samples)
        name = schema.range_file(first, end - 1)
        writes[run_dir.path(schema.INDEX, name)] = partial(_index, first, end)
        writes[run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, name)] = partial(_labels, first, end)
        if embeddings:
            writes[run_dir.path(schema.EMBEDDINGS, name)] = partial(_embeddings, first, end, num_samples)
    for epoch, rank in product(range(EPOCHS if dynamics else 0), range(RANKS)):
        path = run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch), schema.rank_file(rank, RANKS))
        writes[path] = partial(_dynamics, epoch, rank, num_samples)
    missing = {path: write for path, write in writes.items() if not Path(path).exists()}
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(NUM_PROCESSES, context) as processes:
            list(processes.map(_write, missing, missing.values()))
    sizes = np.bincount(np.arange(num_samples) % NUM_CLASSES, minlength=NUM_CLASSES).tolist()
    for result in (
        IndexResult(num_samples, 1, "folder", []),
        EmbedResult(num_samples, 0, DIM),
        ClusterResult(num_samples, NUM_CLASSES, "kmeans", 1, sizes),
        TrainResult(num_samples, EPOCHS, RANKS, "memory", []),
    ):
        run_dir.mark_complete(Marker(result.stage, {}, {}, result.to_json()))


def embeddings_of(sample_ids: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the embeddings (m, d) float16 of samples (m,) of a pool of `num_samples`."""
    is_copy = sample_ids % 10 == 9
    others = hash_uint64(0, 1, sample_ids) % np.uint64(max(1, num_samples // 10)) * np.uint64(10)
    originals = np.where(is_copy, others.astype(np.int64) + sample_ids // 10 % 9, sample_ids)
    points = _points_of(originals)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    noise = _table(2, NOISE_ROWS)[sample_ids[is_copy] % NOISE_ROWS]
    points[is_copy] += 0.25 / DIM**0.5 * noise
    return unit(points)


def _points_of(sample_ids: np.ndarray) -> np.ndarray:
    classes = (hash_uint64(0, 3, sample_ids) % np.uint64(NUM_CLASSES)).astype(np.int64)
    draws = hash_uniform(0, 4, sample_ids[:, None], np.arange(DIRECTIONS)[None])
    places = ((draws - 0.5) * 12**0.5).astype(np.float32)  # of variance 1
    bases = _table(5, SUBSPACES * DIRECTIONS).reshape(SUBSPACES, DIRECTIONS, DIM)
    points = _table(6, NUM_CLASSES)[classes] + 0.1 * _table(7, NOISE_ROWS)[sample_ids % NOISE_ROWS]
    for subspace in range(SUBSPACES):
        rows = np.flatnonzero(classes % SUBSPACES == subspace)
        points[rows] += 0.4 * (places[rows] @ bases[subspace])
    return points


@cache
def _table(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32)


def _write(path: str, make: Callable[[], pa.Table]) -> None:
    filesystem.write_table(path, make())


def _index(first: int, end: int) -> pa.Table:
    ids = np.arange(first, end)
    uris = list(map("/pool/{:010d}.jpg".format, ids))
    return pa.table([ids, uris, pa.nulls(len(ids), pa.int32())], schema=schema.INDEX_SCHEMA)


def _labels(first: int, end: int) -> pa.Table:
    ids = np.arange(first, end)
    columns = [ids, (ids % NUM_CLASSES).astype(np.int32), hash_uniform(0, 8, ids).astype(np.float32)]
    return pa.table(columns, schema=schema.PSEUDO_LABELS_SCHEMA)


def _embeddings(first: int, end: int, num_samples: int) -> pa.Table:
    ids = np.arange(first, end)
    columns = [ids, schema.matrix_column(embeddings_of(ids, num_samples))]
    return pa.table(columns, schema=schema.embeddings_schema(DIM))


def _dynamics(epoch: int, rank: int, num_samples: int) -> pa.Table:
    """Return what one of the training workers recorded in an epoch: random samples, ascending by id."""
    ids = np.arange(num_samples)
    ids = ids[hash_uint64(0, 9, epoch, ids) % np.uint64(RANKS) == rank]
    rng = np.random.default_rng([epoch, rank])
    target = rng.beta(3, 1, len(ids)).astype(np.float32)
    columns = [ids, target, (1 - target) * rng.random(len(ids), np.float32), 1.4 * (1 - target)]
    return pa.table(columns, schema=schema.DYNAMICS_SCHEMA)
