"""Read, write, list and delete files by path or URI, on a local disk or in an object store, through pyarrow.fs.

Every write is atomic: readers see a complete file or none. A local file is written under a temporary name in the same
folder, flushed to disk and renamed; an object store shows an object only once its upload is complete. In a URI,
everything after the bucket is a name, so ? and @ have no special meaning.
"""

import contextlib
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from elfs_ray.storage.credentials import refuse_credentials
from elfs_ray.storage.object_store import BUCKET_SCHEMES, explained, open_store, upload

ROWS_PER_GROUP = 1 << 16
THREADS = 32  # requests at a time; the threads only wait, so there may be many more than CPUs
# A scheme has two letters or more, as C:/ is a drive. Only at the start: names may contain colons.
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/{0,2})(?P<rest>.*)", re.DOTALL)
_HALF_WRITTEN = re.compile(r".*\.[0-9a-f]{32}\.tmp")  # the temporary names of `open_atomic`

T = TypeVar("T")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a local path or URI (s3://, gs://, file://) and the path within it.

    Raises ValueError as `absolute` does, for a scheme that pyarrow does not know, for a missing bucket, and for a URI
    with credentials.
    """
    # Not pyarrow's FileSystem.from_uri for a whole URI: it would parse ?, # and % in the names of files.
    place = absolute(uri)
    if not is_uri(place):
        return fs.LocalFileSystem(), place
    refuse_credentials(place, "a place to read or write")
    scheme, rest = place.split("://", 1)
    bucket, _, path = rest.partition("/")
    try:
        store, root = open_store(scheme, bucket)
    except ValueError as error:
        raise ValueError(
            f"{uri!r} cannot be opened: {error}. Give a local path, s3://bucket/path or gs://bucket/path."
        ) from error
    return store, posixpath.join(root, path).rstrip("/")


def is_uri(place: str) -> bool:
    """Return whether a place is a URI, such as s3://bucket/path, and not a local path."""
    match = _URI.match(place)
    return match is not None and match["slashes"] == "//"


def absolute(uri: str) -> str:
    """Return a path or URI that means the same in every process.

    Local paths become absolute, file: URIs local paths (in which %20 is a space), and schemes lower case.

    Raises ValueError for a URI that lacks a slash, which would otherwise be taken for a local folder, for a file: URI
    of another machine, for . or .. in a bucket, which has no such folders, and for a path that is not UTF-8.
    """
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {os.fsencode(uri)!r} is not UTF-8, which paths must be: rename it") from error
    match = _URI.fullmatch(uri)
    if match is None:
        return os.path.abspath(uri)
    scheme, slashes, rest = match["scheme"].lower(), match["slashes"], match["rest"]
    if scheme == "file" and slashes:
        host, _, path = rest.partition("/") if slashes == "//" else ("", "", rest)
        if host not in ("", "localhost"):
            raise ValueError(f"{uri!r} names the machine {host!r}: give a path on this one, as in file:///folder")
        return os.path.abspath("/" + unquote(path).lstrip("/"))
    if slashes != "//":
        if not slashes and scheme not in (*BUCKET_SCHEMES, "file"):
            return os.path.abspath(uri)
        raise ValueError(
            f"{uri!r} is no URI, as it lacks a slash: give {scheme}://{'/' if scheme == 'file' else ''}{rest}, or "
            f"./{uri} for a local folder of that name"
        )
    if not {".", ".."}.isdisjoint(rest.split("/")):
        raise ValueError(f"{uri!r} has . or .. in it, which mean nothing in a bucket: give the place without them")
    return f"{scheme}://{rest.rstrip('/')}"


def is_within(uri: str, folder: str) -> bool:
    """Return whether a place is a folder or lies below it, wherever links on the way to either of them lead.

    Neither of the two need exist.
    """
    # With the slashes, /data/pool-run is not in /data/pool.
    return f"{_real(uri)}/".startswith(f"{_real(folder).rstrip('/')}/")


def _real(uri: str) -> str:
    place = absolute(uri)
    # gcs:// is another name of gs://.
    return re.sub("^gcs://", "gs://", place) if is_uri(place) else os.path.realpath(place)


def join(uri: str, *parts: str) -> str:
    """Return a path or URI with further parts behind it, separated by slashes."""
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
    """Return the size of a file in bytes, or None if there is no such file."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    return info.size if info.type == fs.FileType.File else None


def list_files(uri: str, *, recursive: bool = False) -> list[fs.FileInfo]:
    """List the files in a folder, sorted by path; a folder that does not exist has none.

    Raises ValueError for a local name that is not UTF-8. Memory: about 1 KB for each file.
    """
    return [info for info in _list(uri, recursive) if info.type == fs.FileType.File]


def list_dirs(uri: str) -> list[fs.FileInfo]:
    """List the folders directly in a folder, sorted by path, as `list_folder` does."""
    return [info for info in list_folder(uri) if info.type == fs.FileType.Directory]


def list_folder(uri: str) -> list[fs.FileInfo]:
    """List the files and folders directly in a folder, sorted by path; a folder that does not exist has none.

    Memory: about 1 KB for each entry; on gs:// about 1 KB for every file below the folder.
    """
    # On gs://, pyarrow does not list folders that exist only as prefixes of names, so all files below are listed.
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
        raise ValueError(f"the name of {error.object!r} is not UTF-8, which file names must be: rename it") from error


def _directly_in(path: str, infos: list[fs.FileInfo]) -> list[fs.FileInfo]:
    """Return the files and folders directly in a folder, from a listing of all files below it."""
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
    """Yield the path of a local file with the content of `uri`: the file itself, or a temporary copy of an object."""
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
def read_range(uri: str, column: str, first: int, last: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a Parquet file with first <= column <= last; row groups that can have none are skipped.

    columns: those to read, None for all.
    """
    filesystem, path = resolve(uri)
    condition = [(column, ">=", first), (column, "<=", last)]
    selected = None if columns is None else list(columns)
    return pq.read_table(path, filesystem=filesystem, partitioning=None, columns=selected, filters=condition)


@explained
def read_rows(uri: str, column: str, values: np.ndarray) -> pa.Table:
    """Read the rows of a Parquet file with one of some values in a column of integers.

    Of all columns only the row groups that hold such rows are read.
    """
    with open_parquet(uri) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        is_wanted = np.isin(file.read([column])[column].to_numpy(), values)
        groups = np.unique(np.repeat(np.arange(len(sizes)), sizes)[is_wanted])
        if not len(groups):  # read_row_groups refuses an empty list
            return file.schema_arrow.empty_table()
        rows = file.read_row_groups(groups.tolist())
        return rows.filter(np.isin(rows[column].to_numpy(), values))


@explained
def read_slice(uri: str, first: int, end: int) -> pa.Table:
    """Read the rows first..end-1 of a Parquet file, counted from 0; row groups without any are skipped."""
    with open_parquet(uri) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        groups = [group for group, size in enumerate(sizes) if starts[group] < end and starts[group] + size > first]
        if not groups:  # read_row_groups refuses an empty list
            return file.schema_arrow.empty_table()
        return file.read_row_groups(groups).slice(first - starts[groups[0]], end - first)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically; its folder is made if there is none."""
    with open_atomic(uri) as sink:
        sink.write(data)


@explained
def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    filesystem, path = resolve(uri)
    # partitioning=None, as pyarrow would take a folder called epoch=003 for a partition and add a column `epoch`.
    return pq.read_table(path, columns=columns, filesystem=filesystem, partitioning=None)


def write_table(
    uri: str, table: pa.Table, rows_per_group: int = ROWS_PER_GROUP, encodings: Mapping[str, str] | None = None
) -> None:
    """Write a Parquet file atomically; the same rows give the same bytes.

    encodings: Parquet encodings by column name, for columns that are smaller without a dictionary.

    Memory: a second copy of the table.
    """
    with open_atomic(uri) as sink:
        # combine_chunks: Parquet's pages and dictionaries end where the chunks of a table end, so that the same rows in
        # other chunks would give other bytes.
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
    """Open a Parquet file to read it in parts; its footer is read once."""
    filesystem, path = resolve(uri)
    # pre_buffer fetches the columns of a row group in few large requests, instead of one for each column.
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)


@explained
def num_rows(uri: str) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    filesystem, path = resolve(uri)
    return pq.read_metadata(path, filesystem=filesystem).num_rows


def map_files(function: Callable[[str], T], uris: Iterable[str]) -> list[T]:
    """Call a function that mostly waits, such as `num_rows`, on many files; return the results in the same order."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, uris))


@explained
def read_schema(uri: str) -> pa.Schema:
    """Return the schema of a Parquet file, from its footer."""
    filesystem, path = resolve(uri)
    return pq.read_schema(path, filesystem=filesystem)


@explained
def delete(uri: str) -> None:
    """Delete a file, or a folder with everything in it; do nothing if there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem.delete_file(path)
    elif kind == fs.FileType.Directory:
        # In an object store a folder is a prefix of names: with its objects deleted, pyarrow finds no folder to delete.
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)


def is_half_written(name: str) -> bool:
    """Return whether a file has the name of one that a writer has not completed."""
    return _HALF_WRITTEN.fullmatch(name) is not None


def delete_half_written(uri: str) -> int:
    """Delete the temporary files that killed writers have left in a folder and below it; return how many.

    Call it only while nobody writes there. Object stores keep no part of an upload that was not completed.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return 0
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    half_written = [name for name in paths if is_half_written(os.path.basename(name))]
    for name in half_written:
        os.unlink(name)
    return len(half_written)


@contextlib.contextmanager
def open_atomic(uri: str) -> Iterator[Any]:
    """Open a binary file to write; it appears under its name, with its folders, if the block ends without an error.

    Memory: the whole content for an object, which is uploaded at the end; none for a local file.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # Closing pyarrow's output stream completes the upload, also on an error. So all is buffered first.
        buffer = pa.BufferOutputStream()
        yield buffer
        upload(uri, buffer.getvalue(), filesystem, path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # In the same folder, as a rename is atomic only within a file system; with a random name, as a lost worker and its
    # replacement may write the same file at the same time.
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as sink:
            yield sink
            sink.flush()
            # Without it, a power failure may leave the new name with no content.
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt, too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def open_atomic_on_disk(uri: str) -> Iterator[Any]:
    """Do what `open_atomic` does, without its memory: an object is a temporary file on disk until its upload."""
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
