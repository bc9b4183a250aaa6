"""Keep, beside index/, which files the images came from, and which images have left the pool.

Reads and writes  index/_files/ (key, version, sample_id of the first image, num_rows), a file for each listing that
                  appended to index/
                  gone/ (sample_id, uri), a file for each file of index/ with images that are gone

Driver memory: 34 bytes a file of the pool, and 8 bytes an image that is gone.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from elfs_ray.pool.changes import UNKNOWN, Inventory, Records, compare, key_of
from elfs_ray.pool.folder import versions_of
from elfs_ray.pool.listing import Unit
from elfs_ray.pool.parquet import container_of
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


def read_records(run_dir: RunDir, index: IndexResult | None, units: Sequence[Unit]) -> Records:
    """Return the files that `index` has listed; none if it is None.

    A run that was made before files were recorded has the uris in index/ alone: then versions are UNKNOWN, and `units`
    tell which of the files that hold several images are the pool's.
    """
    if index is None:
        files, first_ids = Inventory.concatenate([]), np.empty(0, np.int64)
    elif index.ends:
        names = (schema.KEY, schema.VERSION, schema.NUM_ROWS, schema.SAMPLE_ID)
        columns = {name: run_dir.read_column(schema.INDEX, schema.FILES_DIR, column=name) for name in names}
        *of_files, first_ids = columns.values()
        files = Inventory(*of_files)
    else:
        files, first_ids = _files_of_index(run_dir, {unit.uri for unit in units if unit.format != "folder"})
    gone = gone_ids(run_dir)
    is_gone = np.isin(first_ids, gone)
    is_lost = np.zeros(len(first_ids), bool)
    if is_gone.any():
        rejected = np.sort(run_dir.read_column(schema.REJECTED, column=schema.SAMPLE_ID))
        num_rejected = np.diff(np.searchsorted(rejected, [first_ids, first_ids + files.rows]), axis=0)[0]
        is_lost = is_gone & (num_rejected == files.rows)
    return Records(files, first_ids, is_gone, is_lost)


def _files_of_index(run_dir: RunDir, containers: set[str]) -> tuple[Inventory, np.ndarray]:
    """Return the files that the uris in index/ lead to, and the first id of each."""
    keys: list[int] = []
    first_ids: list[int] = []
    last, num_ids = None, 0
    for table in run_dir.read_table(schema.INDEX, columns=[schema.URI]):
        for uri in table[schema.URI].to_pylist():
            container = container_of(uri)
            container = container if container in containers else None
            if container is None or container != last:
                keys.append(key_of(container or uri))
                first_ids.append(num_ids)
            last, num_ids = container, num_ids + 1
    rows = np.diff([*first_ids, num_ids])
    return Inventory.of(keys, [UNKNOWN] * len(keys), rows), np.array(first_ids, np.int64)


def divide_units(units: Sequence[Unit], records: Records) -> tuple[list[tuple[Unit, int]], Inventory]:
    """Return the units that must be listed, with the versions of their files, and the files that are known as they are.

    A tar or Parquet file that is known need not be read.
    """
    if units[0].format == "folder":
        return [(unit, UNKNOWN) for unit in units], Inventory.concatenate([])
    versions = versions_of([unit.uri for unit in units])
    keys = [key_of(unit.uri) for unit in units]
    files = Inventory.of(keys, versions, [0] * len(units))
    is_new = compare(records, files).is_new
    to_list = [(unit, version) for unit, version, new in zip(units, versions, is_new, strict=True) if new]
    return to_list, files.among(~is_new)


def write_records(run_dir: RunDir, first: int, files: Inventory, first_ids: np.ndarray) -> None:
    """Write the files that hold the images with the ids from `first` on; nothing if they hold no image."""
    num_ids = int(files.rows.sum())
    if num_ids:
        columns = [files.keys, files.versions, first_ids, files.rows]
        name = schema.range_file(first, first + num_ids - 1)
        filesystem.write_table(
            run_dir.path(schema.INDEX, schema.FILES_DIR, name), pa.table(columns, schema=schema.FILES_SCHEMA)
        )


def gone_ids(run_dir: RunDir) -> np.ndarray:
    """Return the ids (g,) int64, ascending, of the images that have left the pool."""
    return run_dir.read_column(schema.GONE, column=schema.SAMPLE_ID)


def write_gone(run_dir: RunDir, sample_ids: np.ndarray) -> None:
    """Write gone/ with these ids (g,) int64, which must ascend, and nothing else."""
    written = set()
    for path in run_dir.table_files(schema.INDEX):
        first, last = schema.parse_range_file(path)
        ids = sample_ids[slice(*np.searchsorted(sample_ids, [first, last + 1]))]
        if len(ids):
            uris = filesystem.read_table(path, [schema.URI])[schema.URI].take(pa.array(ids - first))
            name = filesystem.basename(path)
            table = pa.table([pa.array(ids), uris], schema=schema.GONE_SCHEMA)
            filesystem.write_table(run_dir.path(schema.GONE, name), table)
            written.add(name)
    for path in run_dir.table_files(schema.GONE):
        if filesystem.basename(path) not in written:
            filesystem.delete(path)
