"""Find the samples that a selection must not choose: labelled and excluded images.

Reads   index/ and the files at select.labelled and select.exclude
Writes  select/left_out/ (sample_id), a file for each file of the scores
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

LEFT_OUT = "left_out"


class LeftOut(NamedTuple):
    """The ids of samples that must not be chosen, each ascending (n,) int64, no id in two of them.

    labelled: images that have a label and cover others. excluded: images that nobody wants to label.
    """

    labelled: np.ndarray
    excluded: np.ndarray

    @property
    def never_chosen(self) -> np.ndarray:
        """Return the ids of all, ascending."""
        return np.sort(np.concatenate(self))

    @property
    def ignored(self) -> np.ndarray:
        """Return the ids of those that need not be covered either, ascending."""
        return self.excluded

    def describe(self) -> str:
        """Return how many there are of each kind, of those that there are."""
        kinds = {
            "labelled": self.labelled,
            "excluded": self.excluded,
        }
        return ", ".join(f"{len(ids):,} {kind}" for kind, ids in kinds.items() if len(ids))


def find_left_out(config: Config, run_dir: RunDir) -> LeftOut:
    """Return the samples that must not be chosen. Driver memory: 16 bytes for each of them.

    Raises ValueError as `read_named_images` does.
    """
    labelled = read_named_images("select.labelled", config.select.labelled, run_dir)
    excluded = read_named_images("select.exclude", config.select.exclude, run_dir)
    excluded = np.setdiff1d(excluded, labelled, assume_unique=True)
    return LeftOut(labelled, excluded)


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
