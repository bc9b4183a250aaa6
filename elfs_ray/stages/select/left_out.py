"""Find the samples that a selection must not choose: labelled and excluded images, those that left the pool, and
near-duplicates.

Reads   index/, gone/ and the files at select.labelled and select.exclude; duplicates/ if the run has it, and then
        neighbors/ if any image is labelled or excluded
Writes  select/left_out/ (sample_id), a file for each file of the scores
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.runtime.tasks import put, run_tasks
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

LEFT_OUT = "left_out"
FILES_PER_TASK = 16


class LeftOut(NamedTuple):
    """The ids of embedded samples that must not be chosen, each ascending (n,) int64, no id in two of them.

    labelled: images that have a label and cover others. excluded: images that nobody wants to label. gone: all others
    that are no longer in the pool. near_duplicates: of each group of near-duplicates all but the representative, or all
    if one of them is labelled or excluded, and the near-duplicates of these in other groups. If the representative is
    gone, the first one that is not takes its place.
    """

    labelled: np.ndarray
    excluded: np.ndarray
    gone: np.ndarray
    near_duplicates: np.ndarray

    @property
    def never_chosen(self) -> np.ndarray:
        """Return the ids of all, ascending."""
        return np.sort(np.concatenate(self))

    @property
    def ignored(self) -> np.ndarray:
        """Return the ids of those that need not be covered either: all but the labelled ones, ascending."""
        return np.sort(np.concatenate([self.excluded, self.gone, self.near_duplicates]))

    def describe(self) -> str:
        """Return how many there are of each kind, of those that there are."""
        kinds = {
            "labelled": self.labelled,
            "excluded": self.excluded,
            "gone": self.gone,
            "near-duplicates of others": self.near_duplicates,
        }
        return ", ".join(f"{len(ids):,} {kind}" for kind, ids in kinds.items() if len(ids))


def find_left_out(config: Config, run_dir: RunDir) -> LeftOut:
    """Return the samples that must not be chosen. Driver memory: 16 bytes for each of them.

    Raises ValueError as `read_named_images` does.
    """
    labelled, excluded = (read_named_images(key, path, run_dir) for key, path in config.select.files_of_names.items())
    rejected = run_dir.read_column(schema.REJECTED, column=schema.SAMPLE_ID)
    labelled = np.setdiff1d(labelled, rejected)
    excluded = np.setdiff1d(excluded, np.union1d(labelled, rejected))
    named = np.union1d(labelled, excluded)
    gone = np.setdiff1d(gone_ids(run_dir), np.union1d(named, rejected))
    copies = np.empty(0, np.int64)
    if config.duplicates.threshold is not None:
        copies = _near_duplicates(run_dir, named, gone, config.duplicates.threshold)
    return LeftOut(labelled, excluded, gone, copies)


def _near_duplicates(run_dir: RunDir, named: np.ndarray, gone: np.ndarray, threshold: float) -> np.ndarray:
    """Return the near-duplicates of other samples that are neither gone nor among those that a file names."""
    ids = run_dir.read_column(schema.DUPLICATES, column=schema.SAMPLE_ID)
    representatives = run_dir.read_column(schema.DUPLICATES, column=schema.REPRESENTATIVE)
    # A representative is not chosen either if it, or a near-duplicate of it, is labelled or excluded.
    of_named = np.isin(ids, named) | np.isin(representatives, named)
    near = [np.union1d(np.setdiff1d(ids, heirs_of(ids, representatives, gone)), representatives[of_named])]
    near.append(ids[of_named])
    if len(named):
        files = run_dir.table_files(schema.NEIGHBORS)
        shared = put(named)
        tasks = [
            (files[start : start + FILES_PER_TASK], shared, threshold) for start in range(0, len(files), FILES_PER_TASK)
        ]
        near += [ids for _, ids in run_tasks(_neighbors_of, tasks)]
    return np.setdiff1d(np.concatenate(near), np.union1d(named, gone))


def heirs_of(ids: np.ndarray, representatives: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Return, for each group whose representative is gone, the lowest of its ids (n,) that is not."""
    left = np.isin(representatives, gone) & ~np.isin(ids, gone)
    order = np.argsort(ids[left])
    _, first = np.unique(representatives[left][order], return_index=True)
    return ids[left][order][first]


def _neighbors_of(paths: Sequence[str], named: np.ndarray, threshold: float) -> np.ndarray:
    """Return the samples that are near-duplicates of the named ones, in either direction of the graph."""
    near = []
    for path in paths:
        table = filesystem.read_table(path)
        sample_ids, neighbor_ids = table[schema.SAMPLE_ID].to_numpy(), schema.matrix_of(table, schema.NEIGHBOR_IDS)
        is_edge = schema.matrix_of(table, schema.SIMILARITY) >= np.float32(threshold)
        near.append(neighbor_ids[is_edge & np.isin(sample_ids, named)[:, None]])
        near.append(sample_ids[(is_edge & np.isin(neighbor_ids, named)).any(axis=1)])
    return np.unique(np.concatenate(near))


def leave_out(run_dir: RunDir, pool: ScoredPool, sample_ids: np.ndarray) -> ScoredPool:
    """Return the pool without some samples (n,), ascending, after writing their ids, in files that match its own."""
    if not len(sample_ids):
        return pool
    for name, ids in _by_file(pool, sample_ids):
        filesystem.write_table(run_dir.path("select", LEFT_OUT, name), pa.table({schema.SAMPLE_ID: ids}))
    return replace(pool, left_out=run_dir.path("select", LEFT_OUT))


def _by_file(pool: ScoredPool, sample_ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for path in pool.files:
        first, last = schema.parse_range_file(path)
        start, end = np.searchsorted(sample_ids, [first, last + 1])
        yield filesystem.basename(path), sample_ids[start:end]
