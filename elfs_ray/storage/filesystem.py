"""Files by path or URI, local or in an object store, through pyarrow.fs alone.

A write is seen whole or not at all: local files are written beside their place, flushed, and moved there; an object
store shows an object only when its upload is complete. A URI is a bucket and a name, in which ? and @ are letters.
"""

import contextlib
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from elfs_ray.storage.credentials import refuse_credentials
from elfs_ray.storage.object_store import explained, open_store, upload

ROWS_PER_GROUP = 1 << 16
THREADS = 32  # that wait for an object store at a time
_HALF_WRITTEN = re.compile(r".*\.[0-9a-f]{32}\.tmp")

T = TypeVar("T")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a local path or URI (s3://, gs://, file://) and the path within it.

    Raises ValueError for a scheme that pyarrow does not know, for no bucket, and for credentials.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    scheme, rest = uri.split("://", 1)
    if scheme == "file":
        return fs.LocalFileSystem(), "/" + rest.lstrip("/")
    refuse_credentials(uri, "a place to read or write")
    bucket, _, path = rest.partition("/")
    try:
        store, root = open_store(scheme, bucket)
    except ValueError as error:
        raise ValueError(
            f"{uri!r} cannot be opened: {error}. Give a local path, s3://bucket/path or gs://bucket/path."
        ) from error
    return store, posixpath.join(root, path).rstrip("/")


def absolute(uri: str) -> str:
    """Return a form of the path that means the same on every machine: local paths become absolute."""
    return uri.rstrip("/") if "://" in uri else os.path.abspath(uri)


def join(uri: str, *parts: str) -> str:
    return posixpath.join(uri, *parts)


def basename(uri: str) -> str:
    """Return the last part of a path or URI: the name of the file or folder."""
    return posixpath.basename(uri)


@explained
def exists(uri: str) -> bool:
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


@explained
def is_dir(uri: str) -> bool:
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type == fs.FileType.Directory


@explained
def file_size(uri: str) -> int | None:
    """Return the number of bytes of a file; None if there is no file of that name."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    return info.size if info.type == fs.FileType.File else None


def list_files(uri: str, *, recursive: bool = False) -> list[fs.FileInfo]:
    """List the files in a folder, sorted by path; none when the folder does not exist.

    Memory: about 1 KB a file. Raises ValueError for a local name that is not UTF-8.
    """
    return [info for info in _list(uri, recursive) if info.type == fs.FileType.File]


def list_dirs(uri: str) -> list[fs.FileInfo]:
    """List the folders directly in a folder, as `list_folder` does."""
    return [info for info in list_folder(uri) if info.type == fs.FileType.Directory]


def list_folder(uri: str) -> list[fs.FileInfo]:
    """List the files and folders directly in a folder, sorted by path; none when the folder does not exist.

    Memory: about 1 KB for each; on gs:// for every file below it, as pyarrow lists no folders of names there.
    """
    if isinstance(resolve(uri)[0], fs.GcsFileSystem):
        return _directly_in(resolve(uri)[1], _list(uri, recursive=True))
    return _list(uri, recursive=False)


@explained
def _list(uri: str, recursive: bool) -> list[fs.FileInfo]:
    filesystem, path = resolve(uri)
    selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    try:
        return sorted(filesystem.get_file_info(selector), key=lambda info: info.path)
    except UnicodeDecodeError as error:
        raise ValueError(f"the name of {error.object!r} is not UTF-8, as names of files must be: rename it") from error


def _directly_in(path: str, infos: list[fs.FileInfo]) -> list[fs.FileInfo]:
    """Return what lies directly in a folder, for a store that lists all objects below it and has no folders."""
    files = [info for info in infos if info.type == fs.FileType.File]
    depth = len(path.split("/"))
    folders = {info.path.split("/")[depth] for info in files if len(info.path.split("/")) > depth + 1}
    dirs = [fs.FileInfo(f"{path}/{name}", fs.FileType.Directory) for name in folders]
    direct = [info for info in files if len(info.path.split("/")) == depth + 1]
    return sorted([*direct, *dirs], key=lambda info: info.path)


@explained
def read_bytes(uri: str) -> bytes:
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as file:
        return file.read()


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[str]:
    """Yield the path of a file on this machine with the content of `uri`: the file itself, else a temporary copy."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, posixpath.basename(path))
        with open(copy, "wb") as sink:
            sink.write(read_bytes(uri))
        yield copy


@explained
def read_range(uri: str, column: str, first: int, last: int) -> pa.Table:
    """Read the rows of a Parquet file with first <= column <= last, from the row groups that can hold any."""
    filesystem, path = resolve(uri)
    condition = [(column, ">=", first), (column, "<=", last)]
    return pq.read_table(path, filesystem=filesystem, partitioning=None, filters=condition)


@explained
def read_slice(uri: str, first: int, end: int) -> pa.Table:
    """Read the rows first..end-1 of a Parquet file, counted from 0, from the row groups that hold them."""
    with open_parquet(uri) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        groups = [group for group, size in enumerate(sizes) if starts[group] < end and starts[group] + size > first]
        if not groups:
            return file.schema_arrow.empty_table()
        return file.read_row_groups(groups).slice(first - starts[groups[0]], end - first)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all, making its folder where there is none."""
    with open_atomic(uri) as sink:
        sink.write(data)


@explained
def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    filesystem, path = resolve(uri)
    # partitioning=None: a folder called epoch=003 adds no column.
    return pq.read_table(path, columns=columns, filesystem=filesystem, partitioning=None)


def write_table(
    uri: str, table: pa.Table, rows_per_group: int = ROWS_PER_GROUP, encodings: Mapping[str, str] | None = None
) -> None:
    """Write a Parquet file whole or not at all; the same rows give the same bytes. Memory: the table once more.

    encodings: Parquet's encoding of columns that do better without a dictionary.
    """
    with open_atomic(uri) as sink:
        # Pages and dictionaries end where chunks do.
        pq.write_table(
            table.combine_chunks(),
            sink,
            compression="zstd",
            row_group_size=rows_per_group,
            use_dictionary=[name for name in table.column_names if name not in encodings] if encodings else True,
            column_encoding=dict(encodings) if encodings else None,
        )


@explained
def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a Parquet file to read column by column; its footer is read once."""
    filesystem, path = resolve(uri)
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)


@explained
def num_rows(uri: str) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    filesystem, path = resolve(uri)
    return pq.read_metadata(path, filesystem=filesystem).num_rows


def map_files(function: Callable[[str], T], uris: Iterable[str]) -> list[T]:
    """Call a function that mostly waits, as `num_rows` does, on many files, 32 at a time; results in their order."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, uris))


@explained
def read_schema(uri: str) -> pa.Schema:
    """Return the columns of a Parquet file, from its footer."""
    filesystem, path = resolve(uri)
    return pq.read_schema(path, filesystem=filesystem)


@explained
def delete(uri: str) -> None:
    """Delete a file, or a folder with all it holds; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem.delete_file(path)
    elif kind == fs.FileType.Directory:
        # Of a folder that is only a part of names nothing is left to delete once its objects are.
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)


def delete_half_written(uri: str) -> int:
    """Delete what killed writers left of their files in a folder and below it, and return how many there were.

    Only local folders have any, and only while nobody writes to one may this be called.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return 0
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    half_written = [name for name in paths if _HALF_WRITTEN.fullmatch(os.path.basename(name))]
    for name in half_written:
        os.unlink(name)
    return len(half_written)


@contextlib.contextmanager
def open_atomic(uri: str) -> Iterator[Any]:
    """Open a binary file to write, which appears under its name, with its folders, if the block ends without error.

    Memory: none of a local file, an object's bytes until it is uploaded.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # Buffered, so that a failure half-way uploads nothing.
        buffer = pa.BufferOutputStream()
        yield buffer
        upload(uri, buffer.getvalue(), filesystem, path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def open_atomic_on_disk(uri: str) -> Iterator[Any]:
    """Do what `open_atomic` does for a file of any size: an object lies in a temporary folder until its upload."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        with open_atomic(uri) as sink:
            yield sink
        return
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        with pa.memory_map(file.name) as whole:
            upload(uri, whole.read_buffer(), filesystem, path)
