"""List pools in Parquet files: a column of image bytes, of Hugging Face image structs, or of uris."""

import os
import posixpath

import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.pool.files import PoolColumns, Unit, rejection
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.credentials import refuse_credentials


def list_parquet(unit: Unit, columns: PoolColumns) -> pa.Table:
    """List one Parquet file as `listing.list_unit` does."""
    with open_parquet(unit.uri) as file:
        image_column = find_image_column(file.schema_arrow, unit.uri, columns.image)
        num_rows = file.metadata.num_rows
        if _is_string(file.schema_arrow.field(image_column).type):
            column = _read_column(file, image_column, unit.uri).to_pylist()
            # The uris go into index/ and coreset.txt, which are passed on: a signed URL must not.
            for row, uri in enumerate(column):
                refuse_credentials(uri or "", f"{unit.uri}, row {row}, column {image_column!r}")
            folder = posixpath.dirname(unit.uri)
            uris = [None if uri is None else against(folder, uri) for uri in column]
        else:
            uris = [f"{unit.uri}#row={row}" for row in range(num_rows)]
        labels = pa.nulls(num_rows, pa.int32()) if columns.label is None else _labels(file, columns.label, unit.uri)
    # A null uri is replaced by that of its row, so that it is rejected by name instead of disappearing.
    uris = [f"{unit.uri}#row={row}" if uri is None else uri for row, uri in enumerate(uris)]
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: labels})


def open_parquet(uri: str, buffer_bytes: int = 0, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file by its uri. metadata: its footer, where that was read before.

    A row group is read as a whole, or with `buffer_bytes` in pieces of that size for each of its columns. Raises
    ValueError where the file is not Parquet, OSError where it cannot be reached.
    """
    store, path = filesystem.resolve(uri)
    try:
        return pq.ParquetFile(
            path, filesystem=store, metadata=metadata, buffer_size=buffer_bytes, pre_buffer=not buffer_bytes
        )
    except (pa.ArrowInvalid, OSError) as error:
        rejection(error, uri)
        raise ValueError(f"{uri} cannot be read as Parquet: {error}. Repair it or move it out of the pool.") from error


def find_image_column(columns: pa.Schema, uri: str, name: str | None) -> str:
    """Return the name of the column of images. Raises ValueError if there is none, or it has another type."""
    name = name or next((known for known in (schema.IMAGE, schema.URI) if known in columns.names), None)
    if name is None or name not in columns.names:
        raise ValueError(
            f"{uri} has columns {columns.names}, none named {name or 'image or uri'}: set pool.image_column"
        )
    kind = columns.field(name).type
    is_struct = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    if not (is_struct or _is_binary(kind) or _is_string(kind)):
        raise ValueError(
            f"{uri}: column {name!r} is {kind}; it must hold image bytes, structs with bytes and path, or uri strings"
        )
    return name


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def check_label_column(columns: pa.Schema, uri: str, name: str | None) -> None:
    """Raise ValueError if a column of labels is named and the file does not have it."""
    if name is not None and name not in columns.names:
        raise ValueError(f"{uri} has columns {columns.names}, none named {name!r}: set pool.label")


def _labels(file: pq.ParquetFile, name: str, uri: str) -> pa.Array:
    check_label_column(file.schema_arrow, uri, name)
    values = _read_column(file, name, uri)
    try:
        return values.combine_chunks().cast(pa.int32())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{uri}: column {name!r} is {values.type}; it must hold 32-bit integers: {error}") from error


def _read_column(file: pq.ParquetFile, name: str, uri: str) -> pa.ChunkedArray:
    try:
        return file.read([name])[name]
    except (pa.ArrowInvalid, OSError) as error:
        rejection(error, uri)
        raise ValueError(
            f"{uri}: column {name!r} cannot be read: {error}. Repair it or move it out of the pool."
        ) from error


def against(folder: str, uri: str) -> str:
    """Return a uri that may be relative to a folder as an absolute one."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    scheme, separator, path = folder.rpartition("://")
    joined = posixpath.join(path, uri)
    # An object store has no ".."; on a disk, resolving it here would be wrong behind a symlink.
    return scheme + separator + (posixpath.normpath(joined) if separator else joined)
