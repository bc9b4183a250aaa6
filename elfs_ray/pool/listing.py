"""List a pool (a folder tree, Parquet files or WebDataset tars) in a stable order, and read its images by uri.

A pool is a sorted list of units: subfolders, Parquet files or tars. Any worker can list a unit by itself. The uri of a
sample says where its bytes are:

    /pool/cat/001.jpg                                  a file
    /pool/train-000.parquet#row=17                     a row of a Parquet file
    /pool/train-000.tar#cat/001.jpg?offset=512&size=9  a member of a tar, with the position of its bytes
"""

import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

import numpy as np
import pyarrow as pa

from elfs_ray.pool.changes import UNKNOWN, Inventory, key_of
from elfs_ray.pool.files import (
    UNIT_EXTENSION,
    UNIT_NOUNS,
    PoolColumns,
    Remarks,
    Unit,
    describe_passed_over,
    format_of_name,
    image_extensions,
    is_image,
    read_files,
    split_names,
)
from elfs_ray.pool.folder import Folder, count_folder, inventory_of_folder, list_folder
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.parquet import ROW_URI, container_of, count_parquet, list_parquet, names_images
from elfs_ray.pool.parquet_rows import read_parquet_rows
from elfs_ray.pool.places import Places, find_places, refuse_overlaps
from elfs_ray.pool.tar import list_tar, read_tar_members
from elfs_ray.storage import filesystem, schema

__all__ = [
    "PoolColumns",
    "Remarks",
    "Unit",
    "check_listing",
    "count_unit",
    "find_units",
    "holds_its_images",
    "inventory_of_rows",
    "list_unit",
    "map_in_threads",
    "read_images",
    "take_inventory",
]

LISTING_THREADS = 16  # which mostly wait for a disk or an object store

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def map_in_threads(
    work: Callable[[_Item, Remarks], _Answer], items: Iterable[_Item], remarks: Remarks
) -> Iterator[_Answer]:
    """Yield `work(item, remarks)` for each item in order, from several threads at a time."""

    def work_alone(item: _Item) -> tuple[_Answer, Remarks]:
        of_item = Remarks()  # one for each item, as a Counter is not safe for several threads
        return work(item, of_item), of_item

    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        for answer, of_item in threads.map(work_alone, items):
            remarks.add(of_item)
            yield answer


def find_units(pool_uri: str | list[str], pool_format: str = "auto", remarks: Remarks | None = None) -> list[Unit]:
    """Return the units of a pool, sorted by uri.

    pool_uri: a path, a glob pattern of paths, or a list of these. A path that exists is no pattern.
    remarks: told of the files that belong to no unit; those of a unit are counted when it is listed.

    Raises ValueError where the pool does not exist, its format cannot be detected, it holds nothing of that format,
    names a folder twice, or also holds a benchmark's test images.
    """
    remarks = remarks or Remarks()
    places = find_places(pool_uri)
    pool_format = _detect_format(places, pool_uri) if pool_format == "auto" else pool_format
    units: list[Unit] = []
    for root in places.folders:
        folder = Folder(root)
        units += (
            _folder_units(folder, remarks) if pool_format == "folder" else _file_units(folder, pool_format, remarks)
        )
    units += [Unit(pool_format, uri) for uri in places.containers if format_of_name(uri) == pool_format]
    if pool_format == "folder":
        refuse_overlaps(places, pool_uri)
    for uri, matches in places.matches.items():
        if pool_format == "folder" and matches.has_images:
            units.append(Unit("folder", uri, recursive=False, patterns=tuple(matches.patterns)))
        else:
            others = {
                reason: n for reason, n in matches.seen.passed_over.items() if reason != UNIT_EXTENSION.get(pool_format)
            }
            remarks.passed_over.update(others)
    if not units:
        raise ValueError(f"pool.uri={pool_uri!r} holds no {_noun(pool_format, 0)}: check the path and pool.format")
    units = sorted(set(units), key=lambda unit: unit.uri)
    # What all uris begin with says nothing of splits: a pool may be in /data/test.
    shared = posixpath.commonprefix([unit.uri for unit in units]).rpartition("/")[0]
    _warn_of_held_out([unit.uri.removeprefix(shared) for unit in units], UNIT_NOUNS[pool_format], remarks)
    return units


def check_listing(pool_uri: str | list[str], pool_format: str, units: list[Unit], count: int, remarks: Remarks) -> None:
    """Check the listing of a pool as a whole, and warn of test data deeper in its folders.

    pool_format: as in the config. count: the number of samples.

    Raises ValueError where the format was detected and the pool also holds files of another one, and where the pool
    holds no images.
    """
    used = units[0].format
    counts = {"folder": sum(remarks.passed_over[extension] for extension in image_extensions())}
    counts |= {name: remarks.passed_over[extension] for name, extension in UNIT_EXTENSION.items()}
    counts[used] = count if used == "folder" else len(units)
    kinds = [f"{number:,} {_noun(name, number)}" for name, number in counts.items() if number]
    if pool_format == "auto" and len(kinds) > 1:
        formats = " or ".join(f"pool.format={name}" for name, number in counts.items() if number)
        raise ValueError(
            f"pool.uri={pool_uri!r} holds {' and '.join(kinds)}: give {formats}, or a pool.uri that names one kind, "
            "such as data/train-*.parquet"
        )
    if remarks.training_folders and remarks.held_out_folders:
        remarks.warnings.append(
            f"{min(remarks.held_out_folders)} looks like test or validation data beside "
            f"{min(remarks.training_folders)}: to leave it out, give a pool.uri such as images/train"
        )
    if not count and remarks.passed_over:
        raise ValueError(
            f"pool.uri={pool_uri!r} holds no images that are listed: {describe_passed_over(remarks.passed_over)}. "
            "Check the path, pool.format and pool.image_column."
        )


def list_unit(unit: Unit, columns: PoolColumns, remarks: Remarks | None = None) -> pa.Table:
    """Return the samples of a unit in a table: uri string, label int32 (in a folder tree the folder's name), version.

    version: of the file of an image (see pool/changes.py); UNKNOWN for images that are no files of the pool.
    remarks: told of the files or members that are not listed, and of what is wrong with the unit.

    Labels are null where `columns` names none. Memory: the unit's uris, no images. Raises ValueError for a broken unit
    or a missing column.
    """
    remarks = remarks or Remarks()
    if unit.format == "folder":
        return list_folder(unit, columns.label is not None, remarks)
    listed = (list_parquet if unit.format == "parquet" else list_tar)(unit, columns, remarks)
    versions = pa.array(np.full(listed.num_rows, UNKNOWN, np.uint64))
    return listed.append_column(schema.VERSION, versions)


def holds_its_images(unit: Unit, listed: pa.Table) -> bool:
    """Return whether all images of a unit are within its file, so that they change with it.

    listed: as `list_unit` returns it.
    """
    return unit.format != "folder" and all(container_of(uri) == unit.uri for uri in listed[schema.URI].to_pylist())


def take_inventory(unit: Unit, columns: PoolColumns, remarks: Remarks, version: int) -> Inventory:
    """Return the files of a unit: the images of a folder, else the file itself or what it names by uris.

    version: of the unit's file. Raises ValueError as `list_unit` does.
    """
    if unit.format == "folder":
        return inventory_of_folder(unit, remarks)
    if unit.format == "parquet" and not names_images(unit, columns):
        return Inventory.of([key_of(unit.uri)], [version], [count_parquet(unit, columns, remarks)])
    listed = list_unit(unit, columns, remarks)
    if holds_its_images(unit, listed):
        return Inventory.of([key_of(unit.uri)], [version], [listed.num_rows])
    return inventory_of_rows(listed)


def inventory_of_rows(listed: pa.Table) -> Inventory:
    """Return the images in a listing as an inventory, in which each is a file."""
    keys = map(key_of, listed[schema.URI].to_pylist())
    return Inventory.of(keys, listed[schema.VERSION].to_pylist(), [1] * listed.num_rows)


def count_unit(unit: Unit, columns: PoolColumns, remarks: Remarks | None = None) -> int:
    """Return the number of samples in a unit; remarks as in `list_unit`.

    Memory: constant for Parquet, whose footer has the number, and for local folders; else the unit's listing.
    """
    remarks = remarks or Remarks()
    if unit.format == "folder":
        return count_folder(unit, remarks)
    if unit.format == "parquet":
        return count_parquet(unit, columns, remarks)
    return list_unit(unit, columns, remarks).num_rows


def read_images(uris: list[str], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """Yield the bytes of each image in turn, or why it cannot be read.

    Consecutive samples of a file are read while it is open. Memory: one image, and what is read ahead: 16 files, 4 MiB
    of a tar, or of a Parquet file what parquet_rows.py says. Parquet rows that do not ascend are all held until the
    last consecutive one of that file is read.
    """
    for container, group in groupby(uris, key=container_of):
        members = list(group)
        if container is None:
            yield from read_files(members)
        elif ROW_URI.fullmatch(members[0]):
            yield from read_parquet_rows(container, [int(uri.rpartition("=")[2]) for uri in members], columns)
        else:
            yield from read_tar_members(container, members)


def _warn_of_held_out(names: list[str], noun: str, remarks: Remarks) -> None:
    """Warn where some names are those of test or validation data and others those of training data."""
    training, held_out = split_names(names)
    if training and held_out:
        remarks.warnings.append(
            f"{len(held_out):,} of {len(names):,} {noun}s look like test or validation data beside training data, such "
            f"as {min(held_out).lstrip('/')}: to leave them out, give a pool.uri such as data/train-*"
        )


def _detect_format(places: Places, pool_uri: str | list[str]) -> str:
    """Return the format of the first file whose extension is known."""
    seen = Remarks()
    for uri in places.folders:
        if pool_format := _format_in(Folder(uri), seen):
            return pool_format
    if any(matches.has_images for matches in places.matches.values()):
        return "folder"
    for uri in places.containers:
        if pool_format := format_of_name(uri):
            return pool_format
    for matches in places.matches.values():
        seen.add(matches.seen)
    raise ValueError(
        f"pool.uri={pool_uri!r} holds no images, Parquet files or tars that are known by their extension: check the "
        f"path (known extensions: {' '.join(sorted(image_extensions()))} .parquet .tar)"
        + (f"; {describe_passed_over(seen.passed_over)}" if seen.passed_over else "")
    )


def _format_in(root: Folder, seen: Remarks) -> str | None:
    """Return the format of the first file whose extension is known, breadth first and by name; count those before."""
    queue = deque([root])
    while queue:
        folder, dirs, first = queue.popleft(), [], ""
        for name, is_dir in folder.entries():
            if is_dir:
                dirs.append(name)
            elif format_of_name(name):
                first = min(first or name, name)
            else:
                seen.pass_over(name)
        if pool_format := format_of_name(first):
            return pool_format
        queue.extend(folder.child(name) for name in sorted(dirs))
    return None


def _noun(pool_format: str, number: int) -> str:
    noun = {"folder": "image", "parquet": ".parquet file", "webdataset": ".tar file"}[pool_format]
    return noun if number == 1 else f"{noun}s"


def _folder_units(folder: Folder, remarks: Remarks) -> list[Unit]:
    """Return a unit for each folder at the first level that has several, and one for the files next to them."""
    # Going down to that level gives several units, which workers list in parallel, to a pool like data/images/train/.
    while True:
        dirs, has_images, seen = [], False, Remarks()
        for name, is_dir in folder.entries(seen):
            if is_dir:
                dirs.append(name)
            elif has_images or is_image(name):
                has_images = True  # the others are counted when the unit is listed
            else:
                seen.pass_over(name)
        if not has_images:
            remarks.add(seen)
        if len(dirs) == 1 and not has_images:
            folder = folder.child(dirs[0])
            continue
        units = [Unit("folder", filesystem.join(folder.uri, name)) for name in dirs]
        return [*units, Unit("folder", folder.uri, recursive=False)] if has_images else units


def _file_units(folder: Folder, pool_format: str, remarks: Remarks) -> list[Unit]:
    units = []
    for name in folder.walk(remarks):
        if format_of_name(name) == pool_format:
            units.append(Unit(pool_format, filesystem.join(folder.uri, name)))
        else:
            remarks.pass_over(name)
    return units
