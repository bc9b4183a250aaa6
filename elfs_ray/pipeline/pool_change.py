"""Compare the pool with index/ before a run starts, and refuse changes that are no growth."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elfs_ray.config import Config, ConfigError
from elfs_ray.pool.changes import Changes, Inventory, compare, key_of
from elfs_ray.pool.files import UNIT_NOUNS
from elfs_ray.pool.listing import (
    PoolColumns,
    Remarks,
    Unit,
    check_listing,
    find_units,
    map_in_threads,
    take_inventory,
)
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index.records import divide_units, read_records
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

MIN_UNITS_COUNTED = 64  # of more than twice as many tars or folders, only every second, third, ... is counted
MAX_SHARE_GONE = 0.5  # of a pool that is not mounted, or another one at the same place, all images are gone


@dataclass(frozen=True)
class PoolChange:
    """How the pool differs from index/ as it was made by the run `index_run` of stage index.

    reason_to_keep: why the run does not follow the changes; empty if it does.
    """

    changes: Changes
    index_run: str
    format: str
    remarks: Remarks = field(default_factory=Remarks)
    reason_to_keep: str = ""


def find_change(config: Config, run_dir: RunDir) -> PoolChange:
    """Compare the pool with index/, by one listing; tars and Parquet files are read only where they are new or changed.

    Raises ConfigError for a pool that cannot be listed. Memory: about 180 bytes for each file of the pool, in a folder
    pool each image, and the listings of 16 folders of a bucket at a time.
    """
    index = IndexResult.read(run_dir)
    remarks = Remarks()
    try:
        units = find_units(config.pool.uri, config.pool.format, remarks)
        refuse_listed_tables(config, run_dir, units)
        records = read_records(run_dir, index, units)
        to_list, known = divide_units(units, records)
        inventory, basis = _take_inventory(config, to_list, remarks)
        check_listing(config.pool.uri, config.pool.format, units, len(known) + len(inventory), remarks)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{error} ({index.present:,} images were listed here before: on_pool_change=keep goes on with these)"
        ) from error
    changes = compare(records, Inventory.concatenate([known, inventory]))
    marker = run_dir.complete_marker(IndexResult.stage)
    return PoolChange(replace(changes, basis=basis), marker.run_id, units[0].format, remarks)


def _take_inventory(config: Config, units: Sequence[tuple[Unit, int]], remarks: Remarks) -> tuple[Inventory, str]:
    """Return the files of some units, each with the version of its file, and what their numbers of rows rest on.

    Of 128 or more tars, at least 64 are read, and the others are assumed to hold as many images on average.
    """
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    is_sampled = bool(units) and units[0][0].format == "webdataset"
    step = max(1, len(units) // MIN_UNITS_COUNTED) if is_sampled else 1

    def take(item: tuple[Unit, int], of_unit: Remarks) -> Inventory:
        unit, version = item
        return take_inventory(unit, columns, of_unit, version)

    parts = list(map_in_threads(take, units[::step], remarks))
    if step == 1:
        return Inventory.concatenate(parts), ""
    mean = round(np.mean([part.rows.sum() for part in parts]))
    others = [item for position, item in enumerate(units) if position % step]
    parts.append(Inventory.of((key_of(unit.uri) for unit, _ in others), (of for _, of in others), [mean] * len(others)))
    return Inventory.concatenate(parts), f"{len(units[::step]):,} of {len(units):,} new {UNIT_NOUNS['webdataset']}s"


def refuse_change(changes: Changes, config: Config) -> None:
    """Raise ConfigError for changes that config.on_pool_change refuses."""
    follow = "on_pool_change=extend to follow the pool as it is"
    keep = "on_pool_change=keep to go on with the images that were listed"
    pool = f"pool.uri={config.pool.uri} has changed since this run listed it: {changes.describe()}"
    if config.on_pool_change == "refuse":
        raise ConfigError(f"{pool}. Give {follow}, or {keep}")
    num_lost = changes.num_listed - (changes.num_present - changes.num_new - changes.num_changed - changes.num_back)
    if config.on_pool_change == "auto" and num_lost > MAX_SHARE_GONE * changes.num_listed:
        raise ConfigError(
            f"{pool}. {num_lost:,} of {changes.num_listed:,} images are gone, or changed in size or time of change: "
            f"is the disk mounted, and is this the same pool? Give {keep}, {follow}, or another run_dir"
        )


def refuse_listed_tables(config: Config, run_dir: RunDir, units: list[Unit]) -> None:
    """Raise ConfigError for a pool that leads into the run directory through a link."""
    # The parents of files, as there are far fewer of them than files.
    folders = {unit.uri if unit.format == "folder" else posixpath.dirname(unit.uri) for unit in units}
    trees = {unit.uri for unit in units if unit.format == "folder" and unit.recursive}
    inside = [folder for folder in folders if filesystem.is_within(folder, run_dir.uri)]
    inside += [folder for folder in trees if filesystem.is_within(run_dir.uri, folder)]
    # A pool that lies beside the tables in the run directory itself is found there without a link.
    if inside and not any(filesystem.is_within(pool, run_dir.uri) for pool in config.pool.uris):
        raise ConfigError(
            f"run_dir={config.run_dir} is in the pool, pool.uri={config.pool.uri}, through the link {min(inside)}: its "
            "tables would be listed as images. Remove the link, or give a folder outside of the pool"
        )
