"""List pools in Parquet files: a column of image bytes, of Hugging Face image structs, or of uris."""

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.pool.files import PoolColumns, Remarks, Unit, rejection
from elfs_ray.pool.tar import MEMBER_URI
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.credentials import refuse_credentials

ROW_URI = re.compile(r"(?P<container>.*)#row=(?P<row>\d+)", re.DOTALL)
ROWS_TRIED = 8  # of a file, to find out whether all its rows fail


def list_parquet(unit: Unit, columns: PoolColumns, remarks: Remarks) -> pa.Table:
    """List one Parquet file as `listing.list_unit` does."""
    with open_parquet(unit.uri) as file:
        image_column = find_image_column(file.schema_arrow, unit.uri, columns.image)
        _warn_of_useless_rows(file, image_column, unit.uri, remarks)
        num_rows = file.metadata.num_rows
        if is_string(file.schema_arrow.field(image_column).type):
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


def count_parquet(unit: Unit, columns: PoolColumns, remarks: Remarks) -> int:
    """Count the rows of a Parquet file from its footer, and check its columns."""
    with open_parquet(unit.uri) as file:
        image_column = find_image_column(file.schema_arrow, unit.uri, columns.image)
        check_label_column(file.schema_arrow, unit.uri, columns.label)
        _warn_of_useless_rows(file, image_column, unit.uri, remarks)
        return file.metadata.num_rows


def names_images(unit: Unit, columns: PoolColumns) -> bool:
    """Return whether a Parquet file names its images by their uris instead of holding them; from its footer."""
    with open_parquet(unit.uri) as file:
        column = find_image_column(file.schema_arrow, unit.uri, columns.image)
        return is_string(file.schema_arrow.field(column).type)


def container_of(uri: str) -> str | None:
    """Return the tar or Parquet file that holds an image, None for an image that is a file."""
    match = MEMBER_URI.fullmatch(uri) or ROW_URI.fullmatch(uri)
    return match["container"] if match else None


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
    _refuse_duplicate(columns, uri, name)
    kind = columns.field(name).type
    if not (_is_binary(kind) or is_string(kind) or _is_image_struct(kind)):
        raise ValueError(
            f"{uri}: column {name!r} is {kind}; it must hold image bytes, structs with bytes and path, or uri strings"
        )
    return name


def _refuse_duplicate(columns: pa.Schema, uri: str, name: str) -> None:
    num_columns = columns.names.count(name)
    if num_columns > 1:
        raise ValueError(f"{uri} has {num_columns} columns named {name!r}: rename them, so that each name occurs once")


def _is_image_struct(kind: pa.DataType) -> bool:
    # The bytes are null in all rows, and so is their type, where a data set keeps only paths.
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and (_is_binary(field.type) or pa.types.is_null(field.type)) for field in kind
    )


def _is_binary(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_string(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts, which are uris."""
    kind = _value_type(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, which a dictionary, such as pandas' categories, only points to."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _warn_of_useless_rows(file: pq.ParquetFile, column: str, uri: str, remarks: Remarks) -> None:
    """Warn where the first rows of a file are null or lead nowhere, as in a table whose images are elsewhere."""
    kind = file.schema_arrow.field(column).type
    if _is_binary(kind):
        if _is_null(file, column):
            remarks.warnings.append(f"{uri}: every row of column {column!r} is null, so that no image can be read")
        return
    if pa.types.is_struct(kind) and not (
        pa.types.is_null(kind.field("bytes").type) or _is_null(file, f"{column}.bytes")
    ):
        return
    with _broken_column_named(column, uri):
        rows = next(file.iter_batches(ROWS_TRIED, columns=[column]), None)
    values = [] if rows is None else rows[column].to_pylist()
    paths = [value.get("path") if isinstance(value, dict) else value for value in values]
    faults = [_fault(against(posixpath.dirname(uri), path)) if path else "it is null" for path in paths]
    if faults and all(faults):
        remarks.warnings.append(
            f"{uri}: none of the first {len(faults)} rows of column {column!r} leads to an image: {faults[0]}. Uris "
            "must be absolute, or relative to the Parquet file"
        )


def _is_null(file: pq.ParquetFile, leaf: str) -> bool:
    """Return whether the footer says that a column has no value in any row."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    chunks = [chunk for group in groups for chunk in _chunks(group) if chunk.path_in_schema == leaf]
    return bool(chunks) and all(
        chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values for chunk in chunks
    )


def _fault(uri: str) -> str | None:
    """Return why there is no file that holds an image, None if there is one."""
    try:
        return None if filesystem.exists(container_of(uri) or uri) else f"{uri:.200} does not exist"
    except (OSError, ValueError) as error:
        return f"{rejection(error, uri)!s:.200}"


def column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Return the uncompressed bytes of a column in a row group."""
    # A struct is stored as one chunk for each of its fields, such as image.bytes. A column of bytes may have that name.
    chunks = (chunk for chunk in _chunks(group) if f"{chunk.path_in_schema}.".startswith(f"{column}."))
    return sum(chunk.total_uncompressed_size for chunk in chunks)


def _chunks(group: pq.RowGroupMetaData) -> list[pq.ColumnChunkMetaData]:
    return [group.column(number) for number in range(group.num_columns)]


def check_label_column(columns: pa.Schema, uri: str, name: str | None) -> None:
    """Raise ValueError if a column of labels is named and the file does not have it, or has two of that name."""
    if name is None:
        return
    if name not in columns.names:
        raise ValueError(f"{uri} has columns {columns.names}, none named {name!r}: set pool.label")
    _refuse_duplicate(columns, uri, name)


def _labels(file: pq.ParquetFile, name: str, uri: str) -> pa.Array:
    check_label_column(file.schema_arrow, uri, name)
    values = _read_column(file, name, uri)
    try:
        return values.cast(_value_type(values.type)).combine_chunks().cast(pa.int32())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{uri}: column {name!r} is {values.type}; it must hold 32-bit integers: {error}") from error


def _read_column(file: pq.ParquetFile, name: str, uri: str) -> pa.ChunkedArray:
    with _broken_column_named(name, uri):
        return file.read([name])[name]


@contextlib.contextmanager
def _broken_column_named(name: str, uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        rejection(error, uri)
        raise ValueError(
            f"{uri}: column {name!r} cannot be read: {error}. Repair it or move it out of the pool."
        ) from error


def against(folder: str, uri: str) -> str:
    """Return a uri that may be relative to a folder as an absolute one."""
    if uri.startswith("file:/"):
        return _local_path(uri)
    if "://" in uri or os.path.isabs(uri):
        return uri
    scheme, separator, path = folder.rpartition("://")
    joined = posixpath.join(path, uri)
    # An object store has no ".."; on a disk, resolving it here would be wrong behind a symlink.
    return scheme + separator + (posixpath.normpath(joined) if separator else joined)


def _local_path(uri: str) -> str:
    """Return the path of a file:/ or file:/// uri, which Python and Spark write with escapes such as %20."""
    path = "/" + uri.removeprefix("file:").removeprefix("//localhost/").lstrip("/")
    # A file's name may hold a % itself, and the uris of our own listings have no escapes.
    is_as_written = "%" not in path or os.path.exists(container_of(path) or path)
    return path if is_as_written else unquote(path)
