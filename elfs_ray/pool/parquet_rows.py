"""Read images from the rows of a Parquet file as a forward stream.

A row group can only be read from its first row, and some writers put a million images into one. So a large group is
never loaded as a whole, and the reader keeps its position for the next block of ids: a process that reads a file in
ascending order reads it once, however long its groups are. Processes that share a long group each read it from its
start, to skip one another's blocks: they should take many adjacent blocks at a time (`has_long_groups`). With many
workers, groups of a few hundred images are better.

Memory does not depend on the length of a group. A group that is read at once takes at most twice 32 MiB. Otherwise each
leaf column of the images takes 8 MiB, a page of the file compressed and uncompressed (1,024 images from pandas and
pyarrow, 1 MiB from other writers), and 4 MiB of values, up to three times while they are assembled.
"""

import posixpath
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.pool.files import PoolColumns, read_file, rejection
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.parquet import ROW_URI, against, column_bytes, find_image_column, open_parquet
from elfs_ray.storage import filesystem

MAX_WHOLE_BYTES = 32 << 20  # of images in a row group that is read at once
BUFFER_BYTES = 8 << 20  # of a request; a bucket does not answer smaller ones any faster
BATCH_BYTES = 4 << 20  # of the values that are decoded at a time
MAX_BATCH_ROWS = 1024


def read_parquet_rows(container: str, rows: list[int], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """Yield the images in the order of `rows`. Ascending rows are streamed, others are held until all are read."""
    try:
        reader = _take_reader(container, columns.image)
    except (OSError, ValueError) as error:
        yield from (rejection(error, container) for _ in rows)
        return
    ascending = sorted(set(rows))
    images = _read_ascending_rows(reader, ascending)
    if rows == ascending:
        yield from images
    else:
        by_row = dict(zip(ascending, images, strict=True))
        yield from (by_row[row] for row in rows)
    # Not in a `finally`: a reader whose stream was broken off or failed is in an unknown state.
    _kept.append(reader)


def has_long_groups(uri: str, column: str | None) -> bool:
    """Return whether an image is in a row group too large to be read at once; from the footer of its Parquet file.

    Raises ValueError or OSError for a file that cannot be read.
    """
    row = ROW_URI.fullmatch(uri)
    if row is None:
        return False
    with open_parquet(row["container"]) as file:
        column = find_image_column(file.schema_arrow, row["container"], column)
        return _longest(file, column) > MAX_WHOLE_BYTES


def _longest(file: pq.ParquetFile, column: str) -> int:
    """Return the bytes of a column in the row group that has most of them."""
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    return max((column_bytes(group, column) for group in groups), default=0)


class _RowReader:
    """A stream over the column of images of one Parquet file."""

    def __init__(self, container: str, column: str | None):
        self.container = container
        self._requested_column = column
        # Taken before the file is opened: a file that is replaced in between is opened anew next time.
        self._version = _version(container)
        self._file = open_parquet(container)
        self._column = find_image_column(self._file.schema_arrow, container, column)
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups])
        # Arrow buffers a whole row group by default, and only a file that is opened with a buffer size is read in
        # pieces. The footer is passed on: reading it again would cost another request.
        if _longest(self._file, self._column) > MAX_WHOLE_BYTES:
            self._file = open_parquet(container, BUFFER_BYTES, metadata)
        self._group: int | None = None
        self._first, self._values = 0, pa.nulls(0)
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def reads(self, container: str, column: str | None) -> bool:
        """Return whether it reads this column of this file, and the file has not changed since it was opened."""
        is_same_column = (container, column) == (self.container, self._requested_column)
        return is_same_column and self._version == _version(container)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def group_of(self, row: int) -> int | None:
        """Return the row group that holds a row of the file; None if there is no such row."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        return group if group < len(self._ends) else None

    def value(self, row: int) -> bytes | dict | str | None:
        """Return the column's value in a row of the file. Raises ArrowException or OSError for a broken group."""
        group = self.group_of(row)
        assert group is not None, row
        if group != self._group or row < self._first:
            self._begin(group)
        # Forwards only: values before the row are decoded and dropped.
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            try:
                self._values = next(self._batches).column(self._column)
            except BaseException:
                # The iterator of a failed group yields nothing more: the next row begins its group anew.
                self._group = None
                raise
        return self._values[row - self._first].as_py()

    def _begin(self, group: int) -> None:
        """Start at the first row of a group."""
        description = self._file.metadata.row_group(group)
        row_bytes = column_bytes(description, self._column) // description.num_rows
        batch_rows = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes)))
        self._group = group
        self._first = int(self._ends[group]) - description.num_rows
        self._values = pa.nulls(0)
        self._batches = self._file.iter_batches(batch_rows, row_groups=[group], columns=[self._column])


# The reader of the last call in this process, so that the next call continues from its position. It is taken out while
# in use, so that no two threads share it.
_kept: list[_RowReader] = []


def _take_reader(container: str, column: str | None) -> _RowReader:
    """Return the kept reader if it reads this column of this file, else a new one."""
    # Pop and catch rather than test and pop: another thread may take the reader in between.
    while True:
        try:
            kept = _kept.pop()
        except IndexError:
            return _RowReader(container, column)
        if kept.reads(container, column):
            return kept
        kept.close()


def _version(container: str) -> tuple[int | None, int | None]:
    """Return a file's size and modification time, which change with its contents."""
    store, path = filesystem.resolve(container)
    info = store.get_file_info(path)
    return info.size, info.mtime_ns


def _read_ascending_rows(reader: _RowReader, rows: list[int]) -> Iterator[bytes | BadImage]:
    """Yield the rows group by group. A broken group does not affect the rows of other groups."""
    for group, rows_of_group in groupby(rows, key=reader.group_of):
        if group is None:
            yield from (BadImage(f"{reader.container} has no row {row}") for row in rows_of_group)
            continue
        pending = list(rows_of_group)
        for number, row in enumerate(pending):
            try:
                value = reader.value(row)
            except (pa.ArrowException, OSError, StopIteration) as error:
                rejection(error, reader.container)
                reason = f"{reader.container} cannot be read in row group {group}: {error}"
                # The rows before the damage were yielded. Those after it are lost: a group is read forwards only.
                yield from (BadImage(reason) for _ in pending[number:])
                break
            yield _bytes_of(value, reader.container)


def _bytes_of(value: bytes | dict | str | None, container: str) -> bytes | BadImage:
    """Return the image of one Parquet value: bytes, a struct of bytes and path, or null."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path"):
            return read_file(against(posixpath.dirname(container), value["path"]))
    return BadImage("null: the row holds no image")
