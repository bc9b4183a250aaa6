"""index: list the pool and give every image an id.

Reads   the pool's listing (Parquet footers, tar headers, folders), no image
Writes  index/ (sample_id, uri, label), one file for each 65,536 ids; index/_files/ and gone/ (records.py)

Ids are dense, 0..N-1, in the order of the sorted listing. A Ray task lists each unit of the pool (a folder, a Parquet
file, a tar) into index/_units/. If the pool has changed since an earlier listing, what is new is appended with the ids
after the last one, and what is gone is marked in gone/. Files of index/ that exist are never written again.

Memory: a task holds the listing of one unit, about 600 bytes a sample, or 1.2 KB in a folder of a bucket; a pool of
many millions should have several folders or files. The driver holds the name and the count of each unit and about 180
bytes for each file of the pool, in a folder pool each image. While it looks for the units of a folder pool in a bucket,
it also holds about 1 KB for each file that is next to them (on gs://, for every file of the pool; see pool/folder.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elfs_ray.config import Config, check_against_pool
from elfs_ray.pool.changes import Changes, Inventory, Records, compare, key_of, match
from elfs_ray.pool.files import describe_passed_over
from elfs_ray.pool.listing import (
    PoolColumns,
    Remarks,
    Unit,
    check_listing,
    find_units,
    holds_its_images,
    inventory_of_rows,
    list_unit,
)
from elfs_ray.runtime.progress import Progress, count, say
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.index import STAGE, IndexResult
from elfs_ray.stages.index.records import divide_units, read_records, write_gone, write_records
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

ROWS_PER_FILE = 65_536
UNITS_DIR = "_units"


@dataclass(frozen=True)
class Listing:
    """What a task found in a unit: the number of samples, the names of labels, and remarks.

    files: None if each sample is a file, so that the file of the unit's listing has their keys and versions.
    """

    rows: int
    names: set[str]
    remarks: Remarks
    files: Inventory | None


def run_index(config: Config, run_dir: RunDir) -> IndexResult:
    """List the pool. Raises ConfigError for a pool that is empty or too small for the config."""
    remarks = Remarks()
    units = find_units(config.pool.uri, config.pool.format, remarks)
    before = _listed_before(run_dir)
    _remove_unfinished(run_dir, before)
    records = read_records(run_dir, before, units)
    to_list, known = divide_units(units, records)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    listings = _list_units(run_dir, to_list, columns)
    # In the order of the units, not of the tasks: the result must not depend on which ends first.
    for listing in listings:
        remarks.add(listing.remarks)
    files = Inventory.concatenate([known, *(_files_of(run_dir, *item) for item in enumerate(listings))])
    changes = compare(records, files)
    first = before.rows if before else 0
    result = IndexResult(
        first + changes.num_appended,
        len(units),
        units[0].format,
        _names_of_labels(before, listings),
        dict(sorted(remarks.passed_over.items())),
        remarks.shortened_warnings(),
        _ends(before, changes),
        int(records.files.rows[changes.is_gone].sum()),
    )
    if before and len(to_list) < len(units):
        result = _with_remarks_of(result, before)
    check_listing(config.pool.uri, config.pool.format, units, result.present, remarks)
    check_against_pool(config, result.present)

    # A second pass: a unit's ids depend on the units before it, and its label numbers on the names in all units.
    counts = _keep_new_rows(run_dir, listings, changes.is_new[len(known) :])
    _write_parts(run_dir, first, counts, result.label_names)
    new = files.among(changes.is_new)
    write_records(run_dir, first, new, first + np.cumsum(new.rows) - new.rows)
    if before:
        say(f"index     {changes.describe()}")
        _record_changes(run_dir, before, records, files, changes)
    filesystem.delete(run_dir.path(schema.INDEX, UNITS_DIR))
    _say_what_was_listed(result)
    return result


def _listed_before(run_dir: RunDir) -> IndexResult | None:
    """Return the result of the listing to which this one appends; None for the first listing."""
    started = run_dir.started_marker(STAGE.name)
    return IndexResult.from_json(started.result) if started is not None and started.follows else None


def _remove_unfinished(run_dir: RunDir, before: IndexResult | None) -> None:
    """Delete what a killed run has left of this listing."""
    # The pool may have changed since, and the index must not mix two listings.
    filesystem.delete(run_dir.path(schema.INDEX, UNITS_DIR))
    paths = run_dir.table_files(schema.INDEX)
    files = run_dir.table_files(schema.INDEX, schema.FILES_DIR)
    num_kept = before.rows if before else 0
    for path in (*paths, *files):
        # A run whose files were not recorded has its records written anew in whole.
        is_kept = schema.parse_range_file(path)[0] < num_kept and (path in paths or (before and before.ends))
        if not is_kept:
            filesystem.delete(path)


def _list_units(run_dir: RunDir, units: Sequence[tuple[Unit, int]], columns: PoolColumns) -> list[Listing]:
    """List units, each with the version of its file, in tasks. Returns what was found, in the order of the units."""
    listings: list[Listing] = [Listing(0, set(), Remarks(), None)] * len(units)
    num_samples = 0
    with Progress("index", len(units), "units listed") as progress:
        tasks = [(run_dir, position, *unit, columns) for position, unit in enumerate(units)]
        for position, listings[position] in run_tasks(_list_unit, tasks):
            num_samples += listings[position].rows
            progress.advance(1, f"{num_samples:,} images")
    return listings


def _list_unit(run_dir: RunDir, position: int, unit: Unit, version: int, columns: PoolColumns) -> Listing:
    """Write the listing of one unit to index/_units/."""
    remarks = Remarks()
    listed = list_unit(unit, columns, remarks)
    files = None
    if holds_its_images(unit, listed):
        files = Inventory.of([key_of(unit.uri)], [version], [listed.num_rows])
    else:
        listed = listed.append_column(schema.KEY, pa.array(inventory_of_rows(listed).keys))
    filesystem.write_table(_unit_file(run_dir, position), listed)
    labels = listed[schema.LABEL]
    names = set(pc.unique(labels.drop_null()).to_pylist()) if pa.types.is_string(labels.type) else set()
    return Listing(listed.num_rows, names, remarks, files)


def _files_of(run_dir: RunDir, position: int, listing: Listing) -> Inventory:
    """Return the files of one unit that was listed."""
    if listing.files is not None:
        return listing.files
    listed = filesystem.read_table(_unit_file(run_dir, position), [schema.KEY, schema.VERSION])
    ones = np.ones(listed.num_rows, np.int64)
    return Inventory(listed[schema.KEY].to_numpy(), listed[schema.VERSION].to_numpy(), ones)


def _names_of_labels(before: IndexResult | None, listings: Sequence[Listing]) -> list[str]:
    """Return the names of labels in the order of their numbers, new ones after those that have a number."""
    numbered = before.label_names if before else []
    return [*numbered, *sorted(set().union(*(listing.names for listing in listings)).difference(numbered))]


def _ends(before: IndexResult | None, changes: Changes) -> list[int]:
    """Return the number of ids after each listing that appended some."""
    ends = [end for _, end in before.ranges] if before else []
    return [*ends, (ends[-1] if ends else 0) + changes.num_appended] if changes.num_appended else ends


def _with_remarks_of(result: IndexResult, before: IndexResult) -> IndexResult:
    """Return a result that also has the remarks on files that were listed before, and were not read again."""
    passed_over = dict(sorted((Counter(before.passed_over) | Counter(result.passed_over)).items()))
    return replace(result, passed_over=passed_over, warnings=list(dict.fromkeys(before.warnings + result.warnings)))


def _keep_new_rows(run_dir: RunDir, listings: Sequence[Listing], is_new: np.ndarray) -> np.ndarray:
    """Remove from index/_units/ the samples that have an id. Returns the number left in each unit, (units,) int64.

    is_new: of each file in the listings, (files,) bool.
    """
    counts, tasks, start = np.zeros(len(listings), np.int64), [], 0
    for position, listing in enumerate(listings):
        if listing.files is not None:
            counts[position] = listing.rows * is_new[start]
            start += 1
            continue
        mask = is_new[start : start + listing.rows]
        counts[position] = mask.sum()
        if 0 < counts[position] < listing.rows:
            tasks.append((run_dir, position, mask))
        start += listing.rows
    for _ in run_tasks(_keep_rows, tasks):
        pass
    return counts


def _keep_rows(run_dir: RunDir, position: int, mask: np.ndarray) -> None:
    path = _unit_file(run_dir, position)
    filesystem.write_table(path, filesystem.read_table(path).filter(mask))


def _write_parts(run_dir: RunDir, first: int, counts: np.ndarray, label_names: Sequence[str]) -> None:
    """Append the samples in index/_units/, of which each unit has `counts`, with the ids from `first` on."""
    ends = first + np.cumsum(counts)
    num_ids = int(ends[-1]) if len(ends) else first
    firsts = range(first, num_ids, ROWS_PER_FILE)
    with Progress("index", num_ids - first, "images") as progress:
        parts = [(run_dir, start, min(start + ROWS_PER_FILE, num_ids), first, ends, label_names) for start in firsts]
        for _, rows in run_tasks(_write_part, parts):
            progress.advance(rows)


def _write_part(
    run_dir: RunDir, first: int, end: int, first_of_all: int, ends: np.ndarray, label_names: Sequence[str]
) -> int:
    """Write the index file of the ids first..end-1. `ends` holds the id behind the last one of each unit."""
    pieces = []
    for position in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
        unit_end = int(ends[position])
        unit_first = int(ends[position - 1]) if position else first_of_all
        if unit_first >= end:
            break
        if unit_end > unit_first:
            start = max(first - unit_first, 0)
            pieces.append(filesystem.read_slice(_unit_file(run_dir, position), start, min(end, unit_end) - unit_first))
    listed = pa.concat_tables([piece.select([schema.URI, schema.LABEL]) for piece in pieces])
    labels = listed[schema.LABEL]
    if pa.types.is_string(labels.type):
        labels = pc.index_in(labels, pa.array(label_names, pa.string()))
    sample_ids = pa.array(np.arange(first, end, dtype=np.int64))
    table = pa.table([sample_ids, listed[schema.URI], labels], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(first, end - 1)), table)
    return end - first


def _record_changes(run_dir: RunDir, before: IndexResult, records: Records, files: Inventory, changes: Changes) -> None:
    """Write which images are gone and, for a run whose files were not recorded, the files that it listed before."""
    if not before.ends:
        listed = files.among(~changes.is_new)
        places, of_records = match(listed.keys, records.files.keys)
        versions = records.files.versions.copy()
        versions[of_records] = listed.versions[places]
        write_records(run_dir, 0, replace(records.files, versions=versions), records.first_ids)
    rows = records.files.rows[changes.is_gone]
    # The ids of each file follow each other: its first one, and as many as it has rows.
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    write_gone(run_dir, np.repeat(records.first_ids[changes.is_gone], rows) + within)


def _say_what_was_listed(result: IndexResult) -> None:
    passed_over = describe_passed_over(result.remarks.passed_over)
    listed = f"{count(result.present, 'image')}, pool.format={result.format}"
    for line in (
        *(f"warning: {warning}" for warning in result.warnings),
        "; ".join(filter(None, (listed, passed_over))),
    ):
        say(f"index     {line}")


def _unit_file(run_dir: RunDir, position: int) -> str:
    return run_dir.path(schema.INDEX, UNITS_DIR, f"unit-{position:08d}.parquet")
