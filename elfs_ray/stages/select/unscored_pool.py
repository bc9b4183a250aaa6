"""List the samples that a selection chooses from without training dynamics: every embedded one.

Reads   embeddings/ (ids); clusters/ where it is complete
Writes  select/pool/ (sample_id, pseudo_label, prototypicality), a file for each range of ids; null without clusters
        select/random/ (sample_id, pseudo_label, score, rank) for the method random
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from elfs_ray.methods.selection.pruning import random_keys
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

POOL, RANDOM = "pool", "random"


def write_pool(run_dir: RunDir, ranges: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Write a file for each range of ids (first, last); return the files. Memory: some 20 bytes a sample of a file."""
    has_clusters = run_dir.success_marker(ClusterResult.stage) is not None
    for _ in run_tasks(_write_range, [(run_dir, first, last, has_clusters) for first, last in ranges]):
        pass
    return tuple(run_dir.table_files("select", POOL))


def score_at_random(run_dir: RunDir, pool: ScoredPool, seed: int) -> ScoredPool:
    """Write a random number from 0 to 1 for each sample. Returns the pool with these, the samples in their order."""
    targets = [run_dir.path("select", RANDOM, filesystem.basename(path)) for path in pool.files]
    for _ in run_tasks(_draw, [(source, target, seed) for source, target in zip(pool.files, targets, strict=True)]):
        pass
    return replace(pool, files=tuple(targets), score=schema.SCORE, direction="low", rank=schema.RANK)


def _draw(source: str, target: str, seed: int) -> None:
    rows = filesystem.read_table(source, [schema.SAMPLE_ID, schema.PSEUDO_LABEL])
    keys = random_keys(rows[schema.SAMPLE_ID].to_numpy(), seed)
    numbers = pa.array((keys * 2.0**-32).astype(np.float32))
    filesystem.write_table(target, rows.append_column(schema.SCORE, numbers).append_column(schema.RANK, pa.array(keys)))


def _write_range(run_dir: RunDir, first: int, last: int, has_clusters: bool) -> None:
    sample_ids = _embedded_ids(run_dir, first, last)
    if not sample_ids.size:
        return
    if has_clusters:
        rows = pa.concat_tables(run_dir.read_range(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, first=first, last=last))
        assert np.array_equal(rows[schema.SAMPLE_ID].to_numpy(), sample_ids), "clusters/ and embeddings/ differ"
        labels, distances = rows[schema.PSEUDO_LABEL], rows[schema.DISTANCE]
    else:
        labels, distances = pa.nulls(sample_ids.size, pa.int32()), pa.nulls(sample_ids.size, pa.float32())
    table = pa.table({schema.SAMPLE_ID: sample_ids, schema.PSEUDO_LABEL: labels, schema.PROTOTYPICALITY: distances})
    filesystem.write_table(run_dir.path("select", POOL, schema.range_file(first, last)), table)


def _embedded_ids(run_dir: RunDir, first: int, last: int) -> np.ndarray:
    """Return the ids of the embedded samples from first to last, ascending (n,) int64."""
    parts = run_dir.read_range(schema.EMBEDDINGS, first=first, last=last, columns=[schema.SAMPLE_ID])
    return np.concatenate([np.empty(0, np.int64), *(rows[schema.SAMPLE_ID].to_numpy() for rows in parts)])
