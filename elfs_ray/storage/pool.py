"""Pools of images: a folder tree, Parquet files or WebDataset tars, listed in a stable order and read by uri.

A pool is a sorted list of units (a subfolder, a Parquet file, a tar), each of which can be listed by itself on any
worker. The uri of a sample says where its bytes are:

    /pool/cat/001.jpg                                  a file
    /pool/train-000.parquet#row=17                     a row of a Parquet file
    /pool/train-000.tar#cat/001.jpg?offset=512&size=9  a member of a tar, with the place of its bytes
"""

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.images import BadImage

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
READ_AHEAD_BYTES = 1 << 20
_UNIT_EXTENSION = {"parquet": ".parquet", "webdataset": ".tar"}
_ROW_URI = re.compile(r"(?P<container>.*)#row=(?P<row>\d+)", re.DOTALL)
_MEMBER_URI = re.compile(
    r"(?P<container>.*?\.(?i:tar))#(?P<member>.*)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL
)


@dataclass(frozen=True)
class Unit:
    """A part of a pool that is listed by itself. `recursive` is for folders: with the folders below it."""

    format: str
    uri: str
    recursive: bool = True


@dataclass(frozen=True)
class PoolColumns:
    """Where a pool keeps its images and labels.

    image: Parquet column with bytes, a Hugging Face image struct or uris; None takes `image`, else `uri`.
    label: Parquet column of integers; for a folder tree "folder", for WebDataset "cls"; None lists no labels.
    """

    image: str | None = None
    label: str | None = None


def find_units(pool_uri: str, pool_format: str = "auto") -> list[Unit]:
    """The units of a pool, sorted by uri.

    Raises ValueError when there is no such place, it holds nothing of the format, or the format cannot be told.
    """
    root = filesystem.absolute(pool_uri)
    if not filesystem.exists(root):
        raise ValueError(f"pool.uri={pool_uri!r} does not exist: give a folder of images, Parquet files or tars")
    if pool_format == "auto":
        pool_format = _detect_format(root)
    units = _folder_units(root) if pool_format == "folder" else _file_units(root, pool_format)
    if not units:
        raise ValueError(f"pool.uri={pool_uri!r} holds no {_describe(pool_format)}: check the path and pool.format")
    return units


def list_unit(unit: Unit, columns: PoolColumns) -> pa.Table:
    """List one unit: columns uri string and label (int32, null without labels; a folder's name for folders).

    Memory: the unit's uris, no images. Raises ValueError for a broken unit or a missing column.
    """
    if unit.format == "folder":
        return _list_folder(unit, with_labels=columns.label is not None)
    if unit.format == "parquet":
        return _list_parquet(unit, columns)
    return _list_tar(unit, with_labels=columns.label is not None)


def count_unit(unit: Unit, columns: PoolColumns) -> int:
    """The number of samples in a unit, from a Parquet footer where that is enough."""
    if unit.format == "parquet":
        with _open_parquet(unit.uri) as file:
            _image_column(file.schema_arrow, unit.uri, columns.image)
            return file.metadata.num_rows
    return list_unit(unit, columns).num_rows


def read_images(uris: list[str], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """The bytes of each image in turn, or why it cannot be had; samples of one container in a row share its opening.

    Memory: the bytes of the images that one container contributes to `uris`.
    """
    for container, group in groupby(uris, key=_container):
        members = list(group)
        if container is None:
            yield from (_read_file(uri) for uri in members)
        elif _ROW_URI.fullmatch(members[0]):
            yield from _read_parquet_rows(container, [int(uri.rpartition("=")[2]) for uri in members], columns)
        else:
            yield from _read_tar_members(container, members)


def _detect_format(root: str) -> str:
    """Tell the format from the first file that has one's extension, breadth first."""
    if not filesystem.is_dir(root):
        return _format_of_name(root) or _unknown_format(root)
    queue = [root]
    while queue:
        folder = queue.pop(0)
        for info in filesystem.list_files(folder):
            if not _hidden(info.base_name) and (found := _format_of_name(info.base_name)):
                return found
        queue.extend(
            filesystem.join(folder, info.base_name)
            for info in filesystem.list_dirs(folder)
            if not _hidden(info.base_name)
        )
    return _unknown_format(root)


def _format_of_name(name: str) -> str | None:
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "folder"
    return next((form for form, known in _UNIT_EXTENSION.items() if known == extension), None)


def _unknown_format(root: str) -> str:
    raise ValueError(
        f"pool.uri={root!r} holds no images, Parquet files or tars that can be told by their extension: "
        f"check the path (extensions known: {' '.join(sorted(IMAGE_EXTENSIONS))} .parquet .tar)"
    )


def _describe(pool_format: str) -> str:
    return {"folder": "images", "parquet": ".parquet files", "webdataset": ".tar files"}[pool_format]


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_image(name: str) -> bool:
    return _format_of_name(name) == "folder" and not _hidden(name)


def _folder_units(root: str) -> list[Unit]:
    """One unit for each folder at the first level that has several, one for the files beside them."""
    if not filesystem.is_dir(root):
        raise ValueError(f"pool.uri={root!r} is one file: give the folder that holds the images")
    while True:
        dirs = [info for info in filesystem.list_dirs(root) if not _hidden(info.base_name)]
        files = [info for info in filesystem.list_files(root) if _is_image(info.base_name)]
        if len(dirs) == 1 and not files:
            root = filesystem.join(root, dirs[0].base_name)
            continue
        units = [Unit("folder", filesystem.join(root, info.base_name)) for info in dirs]
        if files:
            units.append(Unit("folder", root, recursive=False))
        return sorted(units, key=lambda unit: unit.uri)


def _file_units(root: str, pool_format: str) -> list[Unit]:
    extension = _UNIT_EXTENSION[pool_format]
    if not filesystem.is_dir(root):
        return [Unit(pool_format, root)] if root.lower().endswith(extension) else []
    files = _walk(root, recursive=True)
    return [Unit(pool_format, uri) for uri, name in files if name.lower().endswith(extension)]


def _walk(root: str, recursive: bool) -> Iterator[tuple[str, str]]:
    """(uri, name relative to root) of every file that is not hidden, sorted by path."""
    _, root_path = filesystem.resolve(root)
    for info in filesystem.list_files(root, recursive=recursive):
        relative = posixpath.relpath(info.path, root_path)
        if not any(_hidden(part) for part in relative.split("/")):
            yield filesystem.join(root, relative), relative


def _list_folder(unit: Unit, with_labels: bool) -> pa.Table:
    uris = [uri for uri, name in _walk(unit.uri, unit.recursive) if _is_image(name)]
    labels = [posixpath.basename(posixpath.dirname(uri)) if with_labels else None for uri in uris]
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: pa.array(labels, pa.string())})


def _open_parquet(uri: str) -> pq.ParquetFile:
    store, path = filesystem.resolve(uri)
    try:
        return pq.ParquetFile(path, filesystem=store)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{uri} cannot be read as Parquet: {error}. Mend it or move it out of the pool.") from error


def _image_column(columns: pa.Schema, uri: str, name: str | None) -> str:
    name = name or next((known for known in (schema.IMAGE, schema.URI) if known in columns.names), None)
    if name is None or name not in columns.names:
        raise ValueError(
            f"{uri} has columns {columns.names}, none named {name or 'image or uri'}: set pool.image_column"
        )
    kind = columns.field(name).type
    is_struct = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    if not (is_struct or _is_binary(kind) or _is_string(kind)):
        raise ValueError(
            f"{uri}: column {name!r} is {kind}; needed: image bytes, a struct with bytes and path, or uris as strings"
        )
    return name


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _list_parquet(unit: Unit, columns: PoolColumns) -> pa.Table:
    with _open_parquet(unit.uri) as file:
        image_column = _image_column(file.schema_arrow, unit.uri, columns.image)
        num_rows = file.metadata.num_rows
        if _is_string(file.schema_arrow.field(image_column).type):
            given = _read_column(file, image_column, unit.uri).to_pylist()
            folder = posixpath.dirname(unit.uri)
            uris = [None if uri is None else _against(folder, uri) for uri in given]
        else:
            uris = [f"{unit.uri}#row={row}" for row in range(num_rows)]
        labels = pa.nulls(num_rows, pa.int32()) if columns.label is None else _labels(file, columns.label, unit.uri)
    # A null uri keeps its row, so that it is rejected by name and not lost.
    uris = [f"{unit.uri}#row={row}" if uri is None else uri for row, uri in enumerate(uris)]
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: labels})


def _labels(file: pq.ParquetFile, name: str, uri: str) -> pa.Array:
    if name not in file.schema_arrow.names:
        raise ValueError(f"{uri} has columns {file.schema_arrow.names}, none named {name!r}: set pool.label")
    values = _read_column(file, name, uri)
    try:
        return values.combine_chunks().cast(pa.int32())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{uri}: column {name!r} is {values.type}; needed are integers of 32 bits: {error}") from error


def _read_column(file: pq.ParquetFile, name: str, uri: str) -> pa.ChunkedArray:
    try:
        return file.read([name])[name]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{uri}: column {name!r} cannot be read: {error}. Mend it or move it out of the pool."
        ) from error


def _against(folder: str, uri: str) -> str:
    """A uri that may be relative to a folder. Object stores know no "..", so it is taken out for them."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    scheme, separator, path = folder.rpartition("://")
    joined = posixpath.join(path, uri)
    return scheme + separator + (posixpath.normpath(joined) if separator else joined)


def _list_tar(unit: Unit, with_labels: bool) -> pa.Table:
    uris, keys, classes = [], [], {}
    store, tar_path = filesystem.resolve(unit.uri)
    with store.open_input_file(tar_path) as raw:
        file = cast(BinaryIO, io.BufferedReader(_Seekable(raw), READ_AHEAD_BYTES))
        for member in _tar_members(unit.uri, file):
            path = posixpath.normpath(member.name)
            if any(_hidden(part) for part in path.split("/")):
                continue
            folder, name = posixpath.split(path)
            key = posixpath.join(folder, name.partition(".")[0])
            if with_labels and name.endswith(".cls"):
                classes[key] = _read_class(file, member, unit.uri)
            elif _is_image(name):
                uris.append(f"{unit.uri}#{member.name}?offset={member.offset_data}&size={member.size}")
                keys.append(key)
    labels = pa.array([classes.get(key) for key in keys], pa.int32())
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: labels})


class _Seekable(io.RawIOBase):
    """A pyarrow file as a raw Python stream, so that io.BufferedReader can read ahead of small reads.

    As in any Python file one may seek beyond the end, where object stores raise an error.
    """

    def __init__(self, file: pa.NativeFile):
        self._file, self._size, self._position = file, file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        num_bytes = max(0, min(len(buffer), self._size - self._position))
        buffer[:num_bytes] = self._file.read_at(num_bytes, self._position) if num_bytes else b""
        self._position += num_bytes
        return num_bytes


def _tar_members(uri: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar. One that is cut short ends at its last header, whose bytes may be incomplete."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from (member for member in archive if member.isfile())
    except tarfile.ReadError as error:
        if "unexpected end of data" not in str(error):
            raise ValueError(
                f"{uri} cannot be read as an uncompressed tar: {error}. Mend it or move it out of the pool."
            ) from error


def _read_class(file: BinaryIO, member: tarfile.TarInfo, uri: str) -> int | None:
    """The class in a .cls member; None where the tar is cut short within it."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        return None
    text = data.decode("ascii", "replace").strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{uri}: {member.name} holds {text!r}; needed: the class as an integer") from None


def _container(uri: str) -> str | None:
    match = _MEMBER_URI.fullmatch(uri) or _ROW_URI.fullmatch(uri)
    return match["container"] if match else None


def _read_file(uri: str) -> bytes | BadImage:
    try:
        return filesystem.read_bytes(uri)
    except (OSError, ValueError) as error:
        return BadImage(f"cannot be read: {error}")


def _read_tar_members(container: str, uris: list[str]) -> Iterator[bytes | BadImage]:
    try:
        store, path = filesystem.resolve(container)
        file = store.open_input_file(path)
    except (OSError, ValueError) as error:
        yield from (BadImage(f"cannot be read: {error}") for _ in uris)
        return
    with file:
        for uri in uris:
            match = _MEMBER_URI.fullmatch(uri)
            assert match is not None, uri
            yield _read_tar_member(file, int(match["offset"]), int(match["size"]), container)


def _read_tar_member(file: pa.NativeFile, offset: int, size: int, container: str) -> bytes | BadImage:
    there = max(0, min(size, file.size() - offset))
    if there < size:
        return BadImage(f"{container} is cut short: {there} of {size} bytes are there")
    try:
        return file.read_at(size, offset)
    except OSError as error:
        return BadImage(f"cannot be read: {error}")


def _read_parquet_rows(container: str, rows: list[int], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """Rows in the order given; those in ascending order are streamed, others held until all are read."""
    try:
        file = _open_parquet(container)
        name = _image_column(file.schema_arrow, container, columns.image)
    except ValueError as error:
        yield from (BadImage(f"cannot be read: {error}") for _ in rows)
        return
    with file:
        ascending = sorted(set(rows))
        images = _read_ascending_rows(file, name, ascending, container)
        if rows == ascending:
            yield from images
        else:
            by_row = dict(zip(ascending, images, strict=True))
            yield from (by_row[row] for row in rows)


def _read_ascending_rows(
    file: pq.ParquetFile, column: str, rows: list[int], container: str
) -> Iterator[bytes | BadImage]:
    """From the row groups that hold them; a group that is broken costs no other group its rows."""
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    for group, wanted in groupby(rows, key=lambda row: int(np.searchsorted(ends, row, side="right"))):
        if group == len(ends):
            yield from (BadImage(f"{container} has no row {row}") for row in wanted)
            continue
        start = int(ends[group]) - file.metadata.row_group(group).num_rows
        pending = [row - start for row in wanted]
        num_read = 0
        try:
            for value in _read_row_group(file, group, column, pending):
                yield _image_bytes(value, container)
                num_read += 1
        except (pa.ArrowException, OSError) as error:
            reason = f"{container} cannot be read in row group {group}: {error}"
            yield from (BadImage(reason) for _ in pending[num_read:])


def _read_row_group(file: pq.ParquetFile, group: int, column: str, rows: list[int]) -> Iterator[bytes | dict | None]:
    """The values of a column at ascending rows of one row group."""
    first = 0
    pending = iter(rows)
    row = next(pending, None)
    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
        values = batch.column(0)
        while row is not None and row < first + len(values):
            yield values[row - first].as_py()
            row = next(pending, None)
        first += len(values)
        if row is None:
            return


def _image_bytes(value: bytes | dict | None, container: str) -> bytes | BadImage:
    """The bytes behind one Parquet value: bytes, a struct of bytes and path, or null."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path"):
            return _read_file(_against(posixpath.dirname(container), value["path"]))
    return BadImage("null: the row holds no image")
