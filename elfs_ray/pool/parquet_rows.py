"""Read images in rows of a Parquet file, forwards in a stream.

A row group can only be read from its first row, and some writers put a million images into one. So a large group is
never loaded whole, and the place that was reached in it is kept for the next block of ids: a process that reads a file
in ascending order reads it once, however long its groups are. Processes that share a long group read past one another's
blocks: without decoding them, but the whole group each. For many workers groups of some hundred images are better.

Memory, whatever the length of a group: 32 MiB twice for a group that is read at once, else for each column that holds
the images 8 MiB, a page of the file, compressed and not (pandas and pyarrow put 1,024 images into one, other writers
1 MiB), and 4 MiB of values, up to thrice while they are put together.
"""

import posixpath
import re
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.pool.files import PoolColumns, read_file, rejection
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.parquet import against, find_image_column, open_parquet
from elfs_ray.storage import filesystem

ROW_URI = re.compile(r"(?P<container>.*)#row=(?P<row>\d+)", re.DOTALL)
MAX_WHOLE_BYTES = 32 << 20  # of a row group that is read at once
BUFFER_BYTES = 8 << 20  # of a request: a bucket answers smaller ones no faster
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 1024


def read_parquet_rows(container: str, rows: list[int], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """Yield the rows in the order of `rows`; ascending ones are streamed, others are held until all are read."""
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
    _kept.append(reader)


class _RowReader:
    """The column of images of one file, and how far it has been read."""

    def __init__(self, container: str, column: str | None):
        self.container, self._asked, self._version = container, column, _version(container)
        self._file = open_parquet(container)
        self._column = find_image_column(self._file.schema_arrow, container, column)
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups])
        if max((_column_bytes(group, self._column) for group in groups), default=0) > MAX_WHOLE_BYTES:
            self._file = open_parquet(container, BUFFER_BYTES, metadata)
        self._group: int | None = None
        self._first, self._values = 0, pa.nulls(0)
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def reads(self, container: str, column: str | None) -> bool:
        """Return whether it can go on with this column of this file, unchanged since it was opened."""
        return (container, column) == (self.container, self._asked) and self._version == _version(container)

    def close(self) -> None:
        self._file.close()

    def group_of(self, row: int) -> int | None:
        """Return the row group that holds a row of the file; None if there is no such row."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        return group if group < len(self._ends) else None

    def value(self, row: int) -> bytes | dict | str | None:
        """Return what the column holds at a row of the file. Raises ArrowException or OSError for a broken group."""
        group = self.group_of(row)
        assert group is not None, row
        if group != self._group or row < self._first:
            self._begin(group)
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            try:
                self._values = next(self._batches).column(0)
            except BaseException:
                self._group = None
                raise
        return self._values[row - self._first].as_py()

    def _begin(self, group: int) -> None:
        """Go to the first row of a group."""
        description = self._file.metadata.row_group(group)
        row_bytes = _column_bytes(description, self._column) // description.num_rows
        batch_rows = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes)))
        self._group = group
        self._first = int(self._ends[group]) - description.num_rows
        self._values = pa.nulls(0)
        self._batches = self._file.iter_batches(batch_rows, row_groups=[group], columns=[self._column])


# The reader of the last call in this process, at most one, so that the next call goes on from there. It is taken out
# while in use, so that no two threads share one.
_kept: list[_RowReader] = []


def _take_reader(container: str, column: str | None) -> _RowReader:
    """Return the reader that was kept if it is of this file, else a new one."""
    while True:
        try:
            kept = _kept.pop()
        except IndexError:
            return _RowReader(container, column)
        if kept.reads(container, column):
            return kept
        kept.close()


def _version(container: str) -> tuple[int | None, int | None]:
    """Return what changes with a file: its size and time."""
    store, path = filesystem.resolve(container)
    info = store.get_file_info(path)
    return info.size, info.mtime_ns


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Return the bytes of a column in a row group, uncompressed."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _read_ascending_rows(reader: _RowReader, rows: list[int]) -> Iterator[bytes | BadImage]:
    """Yield the rows from the groups that hold them; a broken group costs no other group its rows."""
    for group, wanted in groupby(rows, key=reader.group_of):
        if group is None:
            yield from (BadImage(f"{reader.container} has no row {row}") for row in wanted)
            continue
        pending = list(wanted)
        for number, row in enumerate(pending):
            try:
                value = reader.value(row)
            except (pa.ArrowException, OSError, StopIteration) as error:
                rejection(error, reader.container)
                reason = f"{reader.container} cannot be read in row group {group}: {error}"
                yield from (BadImage(reason) for _ in pending[number:])
                break
            yield _bytes_of(value, reader.container)


def _bytes_of(value: bytes | dict | str | None, container: str) -> bytes | BadImage:
    """Return the bytes behind one Parquet value: bytes, a struct of bytes and path, or null."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path"):
            return read_file(against(posixpath.dirname(container), value["path"]))
    return BadImage("null: the row holds no image")
