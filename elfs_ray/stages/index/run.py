"""index: list the pool and give every image an id.

Reads   the pool's listing (Parquet footers, tar headers, folders), no image
Writes  index/ (sample_id, uri, label), one file for each 65,536 ids

Ids are dense, 0..N-1, in the order of the sorted listing. A Ray task lists each unit of the pool (a folder, a Parquet
file, a tar) into index/_units/.

Memory: a task holds the listing of one unit, about 600 bytes a sample, or 1.2 KB in a folder of a bucket; a pool of
many millions should have several folders or files. The driver holds the name and the count of each unit but no samples.
While it looks for the units of a folder pool in a bucket, it also holds about 1 KB for each file that is next to them
(on gs://, for every file of the pool; see pool/folder.py).
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elfs_ray.config import Config, check_against_pool
from elfs_ray.pool.files import describe_passed_over
from elfs_ray.pool.listing import PoolColumns, Remarks, Unit, check_listing, find_units, list_unit
from elfs_ray.runtime.cluster import run_tasks
from elfs_ray.runtime.progress import Progress, count, say
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

ROWS_PER_FILE = 65_536
UNITS_DIR = "_units"


def run_index(config: Config, run_dir: RunDir) -> IndexResult:
    """List the pool. Raises ConfigError for a pool that is empty or too small for the config."""
    remarks = Remarks()
    units = find_units(config.pool.uri, config.pool.format, remarks)
    _remove_unfinished(run_dir)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    counts = np.zeros(len(units), dtype=np.int64)
    names: set[str] = set()
    of_units = [Remarks()] * len(units)
    with Progress("index", len(units), "units listed") as progress:
        listings = [(run_dir, position, unit, columns) for position, unit in enumerate(units)]
        for position, (rows, unit_names, of_units[position]) in run_tasks(_list_unit, listings):
            counts[position] = rows
            names |= unit_names
            progress.advance(1, f"{counts.sum():,} images")
    num_samples = int(counts.sum())
    # In the order of the units, not of the tasks: the result must not depend on which ends first.
    for of_unit in of_units:
        remarks.add(of_unit)
    check_listing(config.pool.uri, config.pool.format, units, num_samples, remarks)
    check_against_pool(config, num_samples)

    # A second pass: a unit's ids depend on the units before it, and its label numbers on the names in all units.
    ends = np.cumsum(counts)
    label_names = sorted(names)
    firsts = range(0, num_samples, ROWS_PER_FILE)
    with Progress("index", num_samples, "images") as progress:
        parts = [(run_dir, first, min(first + ROWS_PER_FILE, num_samples), ends, label_names) for first in firsts]
        for _, rows in run_tasks(_write_part, parts):
            progress.advance(rows)
    filesystem.delete(run_dir.path(schema.INDEX, UNITS_DIR))
    result = IndexResult(
        num_samples,
        len(units),
        units[0].format,
        label_names,
        dict(sorted(remarks.passed_over.items())),
        remarks.shortened_warnings(),
    )
    _say_what_was_listed(result)
    return result


def _say_what_was_listed(result: IndexResult) -> None:
    passed_over = describe_passed_over(result.remarks.passed_over)
    listed = f"{count(result.rows, 'image')}, pool.format={result.format}"
    for line in (
        *(f"warning: {warning}" for warning in result.warnings),
        "; ".join(filter(None, (listed, passed_over))),
    ):
        say(f"index     {line}")


def _remove_unfinished(run_dir: RunDir) -> None:
    """Delete what a killed run has left of the index."""
    # The pool may have changed since, and the index must not mix two listings.
    filesystem.delete(run_dir.path(schema.INDEX, UNITS_DIR))
    for path in run_dir.table_files(schema.INDEX):
        filesystem.delete(path)


def _list_unit(run_dir: RunDir, position: int, unit: Unit, columns: PoolColumns) -> tuple[int, set[str], Remarks]:
    """Write the listing of one unit to index/_units/. Returns its number of samples, label names and remarks."""
    remarks = Remarks()
    listed = list_unit(unit, columns, remarks)
    filesystem.write_table(_unit_file(run_dir, position), listed)
    labels = listed[schema.LABEL]
    names = set(pc.unique(labels.drop_null()).to_pylist()) if pa.types.is_string(labels.type) else set()
    return listed.num_rows, names, remarks


def _write_part(run_dir: RunDir, first: int, end: int, ends: np.ndarray, label_names: list[str]) -> int:
    """Write the index file of the ids first..end-1. `ends` holds the running total of the units' counts."""
    pieces = []
    for position in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
        unit_end = int(ends[position])
        unit_first = int(ends[position - 1]) if position else 0
        if unit_first >= end:
            break
        if unit_end > unit_first:
            start = max(first - unit_first, 0)
            pieces.append(filesystem.read_slice(_unit_file(run_dir, position), start, min(end, unit_end) - unit_first))
    listed = pa.concat_tables(pieces)
    labels = listed[schema.LABEL]
    if pa.types.is_string(labels.type):
        labels = pc.index_in(labels, pa.array(label_names, pa.string()))
    sample_ids = pa.array(np.arange(first, end, dtype=np.int64))
    table = pa.table([sample_ids, listed[schema.URI], labels], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(first, end - 1)), table)
    return end - first


def _unit_file(run_dir: RunDir, position: int) -> str:
    return run_dir.path(schema.INDEX, UNITS_DIR, f"unit-{position:08d}.parquet")
