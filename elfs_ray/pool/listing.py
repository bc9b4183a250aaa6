"""List a pool (a folder tree, Parquet files or WebDataset tars) in a stable order, and read its images by uri.

A pool is a sorted list of units: subfolders, Parquet files or tars. Any worker can list a unit by itself. The uri of a
sample says where its bytes are:

    /pool/cat/001.jpg                                  a file
    /pool/train-000.parquet#row=17                     a row of a Parquet file
    /pool/train-000.tar#cat/001.jpg?offset=512&size=9  a member of a tar, with the position of its bytes
"""

from collections import deque
from collections.abc import Iterator
from itertools import groupby

import pyarrow as pa

from elfs_ray.pool.files import IMAGE_EXTENSIONS, UNIT_EXTENSION, PoolColumns, Unit, format_of_name, is_image, read_file
from elfs_ray.pool.folder import Folder, count_folder, list_folder
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.parquet import check_label_column, find_image_column, list_parquet, open_parquet
from elfs_ray.pool.parquet_rows import ROW_URI, read_parquet_rows
from elfs_ray.pool.tar import MEMBER_URI, list_tar, read_tar_members
from elfs_ray.storage import filesystem, schema

__all__ = ["PoolColumns", "Unit", "count_unit", "find_units", "list_unit", "read_images"]


def find_units(pool_uri: str, pool_format: str = "auto") -> list[Unit]:
    """Return the units of a pool, sorted by uri.

    Raises ValueError where the pool does not exist, its format cannot be detected, it holds nothing of that format, or
    it also holds a benchmark's test images.
    """
    root = filesystem.absolute(pool_uri)
    if not filesystem.exists(root):
        raise ValueError(f"pool.uri={pool_uri!r} does not exist: give a folder of images, Parquet files or tars")
    if filesystem.exists(filesystem.join(root, schema.DATASET_FILE)):
        raise ValueError(
            f"pool.uri={pool_uri!r} holds a benchmark's training and test images: give its subfolder train"
        )
    if not filesystem.is_dir(root):
        units = _units_of_file(root, pool_format)
    else:
        folder = Folder(root)
        pool_format = _detect_format(folder) if pool_format == "auto" else pool_format
        units = _folder_units(folder) if pool_format == "folder" else _file_units(folder, pool_format)
    if not units:
        raise ValueError(f"pool.uri={pool_uri!r} holds no {_describe(pool_format)}: check the path and pool.format")
    return units


def list_unit(unit: Unit, columns: PoolColumns) -> pa.Table:
    """Return the samples of a unit in a table: uri string, and label int32 (in a folder tree the folder's name).

    Labels are null where `columns` names none. Memory: the unit's uris, no images. Raises ValueError for a broken unit
    or a missing column.
    """
    if unit.format == "folder":
        return list_folder(unit, with_labels=columns.label is not None)
    if unit.format == "parquet":
        return list_parquet(unit, columns)
    return list_tar(unit, with_labels=columns.label is not None)


def count_unit(unit: Unit, columns: PoolColumns) -> int:
    """Return the number of samples in a unit.

    Memory: constant for Parquet, whose footer has the number, and for local folders; else the unit's listing.
    """
    if unit.format == "folder":
        return count_folder(unit)
    if unit.format == "parquet":
        with open_parquet(unit.uri) as file:
            # Checked here as well, because a dry run only counts.
            find_image_column(file.schema_arrow, unit.uri, columns.image)
            check_label_column(file.schema_arrow, unit.uri, columns.label)
            return file.metadata.num_rows
    return list_unit(unit, columns).num_rows


def read_images(uris: list[str], columns: PoolColumns) -> Iterator[bytes | BadImage]:
    """Yield the bytes of each image in turn, or why it cannot be read.

    Consecutive samples of a file are read while it is open. Memory: one image, and what is read ahead of a Parquet file
    (see parquet_rows.py). Parquet rows that do not ascend are all held until the last consecutive one of that file is
    read.
    """
    for container, group in groupby(uris, key=_container):
        members = list(group)
        if container is None:
            yield from (read_file(uri) for uri in members)
        elif ROW_URI.fullmatch(members[0]):
            yield from read_parquet_rows(container, [int(uri.rpartition("=")[2]) for uri in members], columns)
        else:
            yield from read_tar_members(container, members)


def _detect_format(root: Folder) -> str:
    """Return the format of the first file whose extension is known, breadth first and by name."""
    queue = deque([root])
    while queue:
        folder, dirs, first = queue.popleft(), [], ""
        for name, is_dir in folder.entries():
            if is_dir:
                dirs.append(name)
            elif format_of_name(name):
                first = min(first or name, name)
        if pool_format := format_of_name(first):
            return pool_format
        queue.extend(folder.child(name) for name in sorted(dirs))
    return _unknown_format(root.uri)


def _unknown_format(root: str) -> str:
    raise ValueError(
        f"pool.uri={root!r} holds no images, Parquet files or tars that are known by their extension: "
        f"check the path (known extensions: {' '.join(sorted(IMAGE_EXTENSIONS))} .parquet .tar)"
    )


def _describe(pool_format: str) -> str:
    return {"folder": "images", "parquet": ".parquet files", "webdataset": ".tar files"}[pool_format]


def _folder_units(folder: Folder) -> list[Unit]:
    """Return a unit for each folder at the first level that has several, and one for the files next to them."""
    # Going down to that level gives several units, which workers list in parallel, to a pool like data/images/train/.
    while True:
        dirs, has_images = [], False
        for name, is_dir in folder.entries():
            if is_dir:
                dirs.append(name)
            else:
                has_images = has_images or is_image(name)
        if len(dirs) == 1 and not has_images:
            folder = folder.child(dirs[0])
            continue
        units = [Unit("folder", filesystem.join(folder.uri, name)) for name in dirs]
        if has_images:
            units.append(Unit("folder", folder.uri, recursive=False))
        return sorted(units, key=lambda unit: unit.uri)


def _file_units(folder: Folder, pool_format: str) -> list[Unit]:
    names = sorted(name for name in folder.walk() if name.lower().endswith(UNIT_EXTENSION[pool_format]))
    return [Unit(pool_format, filesystem.join(folder.uri, name)) for name in names]


def _units_of_file(root: str, pool_format: str) -> list[Unit]:
    """Return the units of a pool that is one file."""
    if pool_format == "auto":
        pool_format = format_of_name(root) or _unknown_format(root)
    if pool_format == "folder":
        raise ValueError(f"pool.uri={root!r} is one file: give the folder that holds the images")
    return [Unit(pool_format, root)] if root.lower().endswith(UNIT_EXTENSION[pool_format]) else []


def _container(uri: str) -> str | None:
    match = MEMBER_URI.fullmatch(uri) or ROW_URI.fullmatch(uri)
    return match["container"] if match else None
