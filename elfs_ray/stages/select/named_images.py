"""Read which images a file names, for select.labelled and select.exclude.

Reads   index/, and a file of uris or ids: a coreset.txt, Parquet, CSV, or an export of Label Studio (JSON)

It must not import torch or Ray: a plan reads the files, too.
"""

import json
from urllib.parse import urlparse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_NAMED = 5


def read_named_images(key: str, path: str | None, run_dir: RunDir) -> np.ndarray:
    """Return the ids (l,) int64, ascending, of the samples that a file names by sample_id or by uri; none for null.

    key: the config key that names the file, for messages.

    Raises ValueError for a file that cannot be read, has neither column, or names samples that are not in the pool.
    Driver memory: the uris of the file and of one file of index/.
    """
    if path is None:
        return np.empty(0, np.int64)
    source = f"{key}={path!r}"
    try:
        kind, names = _read(path, source)
    except (pa.ArrowInvalid, pa.ArrowKeyError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    if kind == schema.SAMPLE_ID:
        return _checked_ids(names, IndexResult.read(run_dir).rows, source)
    return _ids_of_uris(names, run_dir, source)


def _read(path: str, source: str) -> tuple[str, pa.Array]:
    """Return (sample_id or uri, the distinct values); uris as in a coreset.txt, with line breaks escaped."""
    suffix = path.rpartition(".")[2].lower()
    if suffix == "txt":
        # Not splitlines: a coreset.txt escapes only the line breaks that end its lines, and editors add a BOM.
        lines = [line.removesuffix("\r") for line in filesystem.read_bytes(path).decode("utf-8-sig").split("\n")]
        return schema.URI, pa.array([line for line in lines if line], pa.large_string()).unique()
    if suffix == "json":
        return schema.URI, _escaped(_annotated(json.loads(filesystem.read_bytes(path)), source))
    if suffix == "csv":
        # Guessed types would make numbers of uris such as 00012, and null of a file that has only its header.
        types = {schema.SAMPLE_ID: pa.int64(), schema.URI: pa.large_string()}
        options = csv.ConvertOptions(column_types=types)
        table = csv.read_csv(pa.BufferReader(filesystem.read_bytes(path)), convert_options=options)
    else:
        table = filesystem.read_table(path)
    for name in (schema.SAMPLE_ID, schema.URI):
        if name in table.column_names:
            column = table[name].combine_chunks().drop_null()
            return name, column.unique() if name == schema.SAMPLE_ID else _escaped(column.to_pylist())
    raise ValueError(f"{source} has columns {table.column_names}: it must have sample_id or uri")


def _escaped(uris: list[str]) -> pa.Array:
    return pa.array([schema.escape_line_breaks(str(uri)) for uri in uris], pa.large_string()).unique()


def _annotated(tasks: object, source: str) -> list[str]:
    """Return the image of every annotated task of an export of Label Studio, in JSON or JSON-MIN."""
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{source} must be a list of tasks, as Label Studio exports it")
    uris = []
    for task in tasks:
        if task.get("annotations", True):  # JSON-MIN lists only annotated tasks, and no annotations
            data = task.get("data", task)
            # Exports of a coreset have its uri beside `image`, which says where Label Studio reads it.
            values = [data[name] for name in ("uri", "image", "img") if isinstance(data.get(name), str)]
            if not values:
                raise ValueError(f"{source}: the task {task.get('id')} has no data.image")
            uris.append(_local_path(values[0]))
    return uris


def _local_path(uri: str) -> str:
    """Return the path in a uri of Label Studio's local storage, /data/local-files/?d=path; other uris as they are."""
    parsed = urlparse(uri)
    is_local = parsed.path.endswith("/local-files/") and parsed.query.startswith("d=")
    return parsed.query.removeprefix("d=") if is_local else uri


def _checked_ids(ids: pa.Array, num_samples: int, source: str) -> np.ndarray:
    if not pa.types.is_integer(ids.type):
        raise ValueError(f"{source}: sample_id is {ids.type}; it must be integers")
    sample_ids = np.sort(ids.to_numpy(zero_copy_only=False).astype(np.int64))
    unknown = sample_ids[(sample_ids < 0) | (sample_ids >= num_samples)]
    if len(unknown):
        raise ValueError(
            f"{source} names sample_id {unknown[0]}, which is not in the pool: its "
            f"{num_samples} samples are numbered from 0"
        )
    return sample_ids


def _ids_of_uris(uris: pa.Array, run_dir: RunDir, source: str) -> np.ndarray:
    matches, sample_ids, first = np.zeros(len(uris), bool), [], ""
    for rows in run_dir.read_table(schema.INDEX, columns=[schema.SAMPLE_ID, schema.URI]):
        escaped = [schema.escape_line_breaks(uri) for uri in rows[schema.URI].to_pylist()]
        first = first or next(iter(escaped), "")
        positions = pc.index_in(pa.array(escaped, pa.large_string()), value_set=uris)
        matches[positions.drop_null().to_numpy()] = True
        sample_ids.append(rows[schema.SAMPLE_ID].to_numpy()[pc.is_valid(positions).to_numpy(zero_copy_only=False)])
    if not matches.all():
        unknown = uris.filter(pa.array(~matches)).to_pylist()
        shown = ", ".join(unknown[:MAX_NAMED]) + (", …" if len(unknown) > MAX_NAMED else "")
        raise ValueError(
            f"{source} names {len(unknown)} images that are not in the pool: {shown}. Give uris "
            f"as in index/ and coreset.txt, such as {first}"
        )
    return np.concatenate(sample_ids)
