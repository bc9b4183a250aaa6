"""Read the scored samples that a selection chooses from, and share work on them among tasks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from elfs_ray.methods.selection.quantiles import Direction, grouped_keys, hardness_keys
from elfs_ray.methods.selection.scores import SCORES
from elfs_ray.runtime.cluster import num_cpus
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.storage import filesystem, schema

MAX_SHARES = 512
FILES_PER_SHARE = 16
DIRECTIONS: dict[str, Direction] = {**SCORES, schema.PROTOTYPICALITY: "high"}
"""The scores in scores/, with the end of their range, low or high, where the hard samples are."""


class ScoredRows:
    """The rows of one file, without those that must not be chosen; each column is read when it is first used."""

    def __init__(self, path: str, score: str, num_groups: int, left_out: str | None) -> None:
        self._file = filesystem.open_parquet(path)
        self._left_out = left_out and filesystem.join(left_out, filesystem.basename(path))
        self._columns: dict[str, np.ndarray] = {}
        self._score, self._num_groups = score, num_groups

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column, (n,) of its type."""
        if name not in self._columns:
            values = self._file.read([name])[name].to_numpy()
            self._columns[name] = values if self._eligible is None else values[self._eligible]
        return self._columns[name]

    @cached_property
    def _eligible(self) -> np.ndarray | None:
        """Return a mask of the rows that may be chosen, (n,) bool; None for all of them."""
        if self._left_out is None:
            return None
        left_out = filesystem.read_table(self._left_out)[schema.SAMPLE_ID].to_numpy()
        return ~np.isin(self._file.read([schema.SAMPLE_ID])[schema.SAMPLE_ID].to_numpy(), left_out, assume_unique=True)

    @property
    def num_rows(self) -> int:
        return self._file.metadata.num_rows if self._eligible is None else int(np.count_nonzero(self._eligible))

    @property
    def sample_ids(self) -> np.ndarray:
        """Return the ids, (n,) int64."""
        return self.column(schema.SAMPLE_ID)

    @property
    def scores(self) -> np.ndarray:
        """Return the scores, (n,) float32 or int32."""
        return self.column(self._score)

    @cached_property
    def groups(self) -> np.ndarray:
        """Return the groups, (n,) int64: the pseudo-labels, or zeros if the pool is one group."""
        if self._num_groups == 1:
            return np.zeros(self.num_rows, np.int64)
        return self.column(schema.PSEUDO_LABEL).astype(np.int64)


class Order(Protocol):
    """An order of the samples, as keys (n,) uint32; samples with equal keys are ordered by sample_id."""

    def keys(self, pool: "ScoredPool", rows: ScoredRows) -> np.ndarray: ...


@dataclass(frozen=True)
class ScoredPool:
    """The scored samples that a selection chooses from, in files that each hold a range of ids.

    It is small, so that every task can get one.
    """

    files: tuple[str, ...]
    score: str
    direction: Direction
    num_ids: int
    num_groups: int
    rank: str | None = None  # the column of the order of selection, for a method whose score is not that order
    left_out: str | None = None  # folder with the ids of those that must not be chosen, see left_out.py

    def read(self, path: str) -> ScoredRows:
        """Open one file."""
        return ScoredRows(path, self.score, self.num_groups, self.left_out)

    @cached_property
    def whole(self) -> "ScoredPool":
        """Return the pool with the samples that must not be chosen."""
        return replace(self, left_out=None)

    def sample_ids(self) -> np.ndarray:
        """Return the ids of all samples, (n,) int64, also of those that must not be chosen."""
        return np.concatenate([self.whole.read(path).column(schema.SAMPLE_ID) for path in self.files])

    def hardness_keys(self, rows: ScoredRows) -> np.ndarray:
        if self.rank is not None:
            return rows.column(self.rank).astype(np.uint32)
        return hardness_keys(rows.scores, self.direction)

    def keys(self, order: Order, rows: ScoredRows) -> np.ndarray:
        """Return the keys of an order; if there are several groups, the group is in the bits above a key."""
        keys = order.keys(self, rows)
        return grouped_keys(rows.groups, keys) if self.num_groups > 1 else keys

    def shares(self) -> list[tuple[str, ...]]:
        """Return the files in runs of about equal length, one for each task."""
        # Four for each CPU, so that the CPUs end at about the same time; more if a task would get too many files.
        num_shares = min(len(self.files), MAX_SHARES, max(4 * num_cpus(), len(self.files) // FILES_PER_SHARE))
        ends = [len(self.files) * share // num_shares for share in range(num_shares + 1)]
        return [self.files[first:last] for first, last in pairwise(ends)]

    def map_shares(self, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        """Yield the result of `function(pool, files, *arguments)` for every share, in any order."""
        for _, result in run_tasks(function, [(self, files, *arguments) for files in self.shares()]):
            yield result

    @cached_property
    def counts(self) -> np.ndarray:
        """Return the number of samples in each group, (groups,) int64."""
        return sum(self.map_shares(_count_groups), np.zeros(self.num_groups, np.int64))

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())


def _count_groups(pool: ScoredPool, files: Sequence[str]) -> np.ndarray:
    if pool.num_groups == 1:
        return np.array([sum(pool.read(path).num_rows for path in files)])
    sizes = (np.bincount(pool.read(path).groups, minlength=pool.num_groups) for path in files)
    return sum(sizes, np.zeros(pool.num_groups, np.int64))
