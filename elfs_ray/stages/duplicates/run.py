"""duplicates: find near-duplicates, and one image of each group that stands for the others.

Reads   neighbors/, embeddings/ of the samples that have a neighbour above the threshold
Writes  duplicates/ (sample_id, representative, similarity): every near-duplicate, with the image that stands for it

Neighbours above the threshold are edges of a graph. Its connected components are divided into groups
(methods/near_duplicates.py); the representative of a group is its lowest id.

Components lie anywhere in the pool: tasks read the embeddings once, file by file, and hand each part to the task that
divides its component, through the object store.

Memory: the driver holds some 100 bytes for each edge, the object store 2·d bytes for each sample that has one. A task
holds the embeddings of 65,536 samples, or of a 256th of all that have an edge, or of one component that has more.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.config import Config
from elfs_ray.methods.near_duplicates import components, divide
from elfs_ray.runtime.progress import Progress, count, say
from elfs_ray.runtime.tasks import run_tasks, start_task
from elfs_ray.stages.duplicates import MAX_EXAMPLES, DuplicatesResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

SAMPLES_PER_TASK = 65_536
# Every task that reads has a part for every task that divides: so many of each are 65,536 parts.
MAX_TASKS = 256
FILES_PER_TASK = 16
# The table of neighbours has similarities in float32. What is so close to the threshold is settled exactly later.
_ROUNDING = 1e-6


def run_duplicates(config: Config, run_dir: RunDir) -> DuplicatesResult:
    """Write duplicates/."""
    threshold = config.duplicates.threshold
    assert threshold is not None
    parts = components(*_edges(run_dir, threshold))
    num_similar = sum(map(len, parts))
    batches = list(_batches(parts, max(SAMPLES_PER_TASK, -(-num_similar // MAX_TASKS))))
    tasks = [
        (batch, threshold, *pieces) for batch, pieces in zip(batches, _embeddings_of(run_dir, batches), strict=True)
    ]
    tables = {0: schema.DUPLICATES_SCHEMA.empty_table()}
    with Progress("duplicates", num_similar, "similar images compared") as progress:
        for position, table in run_tasks(_divide, tasks):
            tables[position] = table
            progress.advance(sum(map(len, batches[position])))
    rows = pa.concat_tables([tables[position] for position in sorted(tables)]).sort_by(schema.SAMPLE_ID)
    embedded = EmbedResult.read(run_dir)
    name = schema.range_file(0, embedded.rows + embedded.rejected - 1)
    filesystem.write_table(run_dir.path(schema.DUPLICATES, name), rows.combine_chunks())
    num_groups = len(rows[schema.REPRESENTATIVE].unique())
    of_images = f" of {count(num_groups, 'image')}" if num_groups else ""
    say(f"duplicates {count(rows.num_rows, 'near-duplicate')}{of_images}")
    return DuplicatesResult(rows.num_rows, num_groups, embedded.rows, _examples(rows))


def _edges(run_dir: RunDir, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids at the two ends of each edge, (e,) int64."""
    files = run_dir.table_files(schema.NEIGHBORS)
    tasks = [(files[start : start + FILES_PER_TASK], threshold) for start in range(0, len(files), FILES_PER_TASK)]
    ends = dict(run_tasks(_edges_of, tasks))
    left, right = zip(*(ends[position] for position in range(len(tasks))), strict=True)
    return np.concatenate(left), np.concatenate(right)


def _edges_of(paths: Sequence[str], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    left, right = [], []
    for path in paths:
        table = filesystem.read_table(path)
        rows, columns = np.nonzero(schema.matrix_of(table, schema.SIMILARITY) >= threshold - _ROUNDING)
        left.append(table[schema.SAMPLE_ID].to_numpy()[rows])
        right.append(schema.matrix_of(table, schema.NEIGHBOR_IDS)[rows, columns])
    return np.concatenate(left), np.concatenate(right)


def _batches(parts: Sequence[np.ndarray], max_samples: int) -> Iterator[list[np.ndarray]]:
    """Yield components together that have up to `max_samples` samples in all, or a single larger one."""
    batch: list[np.ndarray] = []
    room = max_samples
    for part in parts:
        if batch and len(part) > room:
            yield batch
            batch, room = [], max_samples
        batch.append(part)
        room -= len(part)
    if batch:
        yield batch


def _embeddings_of(run_dir: RunDir, batches: Sequence[Sequence[np.ndarray]]) -> list[list[Any]]:
    """Return references to the pieces of each batch: the (ids, embeddings) of its samples in one range of the pool."""
    if not batches:
        return []
    ids = np.concatenate([part for batch in batches for part in batch])
    batch_of = np.repeat(np.arange(len(batches)), [sum(map(len, batch)) for batch in batches])
    order = np.argsort(ids)
    # One return for each batch, so that the task which divides it fetches nothing else.
    num_returns = len(batches)
    ranges = zip(*(np.array_split(column[order], len(batches)) for column in (ids, batch_of)), strict=True)
    collected = [start_task(_collect, run_dir, *one, len(batches), num_returns=num_returns) for one in ranges]
    if len(batches) == 1:  # Ray returns a single reference, not a list of one
        return [collected]
    return [list(pieces) for pieces in zip(*collected, strict=True)]


def _collect(run_dir: RunDir, ids: np.ndarray, batch_of: np.ndarray, num_batches: int) -> Any:
    """Return (ids, embeddings) of the samples of each batch among some, whose ids (m,) ascend."""
    embeddings = schema.matrix_of(run_dir.read_rows(schema.EMBEDDINGS, ids, [schema.EMBEDDING]), schema.EMBEDDING)
    order = np.argsort(batch_of, kind="stable")
    ends = np.searchsorted(batch_of[order], np.arange(1, num_batches))
    pieces = [(ids[rows], embeddings[rows]) for rows in np.split(order, ends)]
    return pieces[0] if num_batches == 1 else tuple(pieces)


def _divide(parts: Sequence[np.ndarray], threshold: float, *pieces: tuple[np.ndarray, np.ndarray]) -> pa.Table:
    """Return the near-duplicates in some components, as rows of duplicates/."""
    torch.set_num_threads(1)
    ids = np.concatenate(parts)
    held_ids, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
    # The pieces come in the order of the pool, so their ids ascend.
    embeddings = rows[np.searchsorted(held_ids, ids)]
    chosen, similarity = divide(embeddings, [len(part) for part in parts], threshold)
    copies = np.flatnonzero(chosen != np.arange(len(ids)))
    columns = [ids[copies], ids[chosen[copies]], similarity[copies].astype(np.float32)]
    return pa.table(columns, schema=schema.DUPLICATES_SCHEMA)


def _examples(rows: pa.Table) -> list[tuple[int, int, float]]:
    """Return the least similar near-duplicates, which say best whether the threshold is right."""
    first = rows.sort_by([(schema.SIMILARITY, "ascending"), (schema.SAMPLE_ID, "ascending")]).slice(0, MAX_EXAMPLES)
    return list(zip(*(first[name].to_pylist() for name in schema.DUPLICATES_SCHEMA.names), strict=True))
