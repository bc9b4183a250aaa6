"""List the labelled test images and check that none of them is in the pool. Nothing is decoded here."""

import numpy as np
import pyarrow as pa

from elfs_ray.config import ConfigError
from elfs_ray.pool.listing import PoolColumns, Remarks, Unit, check_listing, find_units, list_unit
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


def list_test_images(test_uri: str, test_format: str, columns: PoolColumns) -> pa.Table:
    """Return the uri and label of every test image. Labels are integers, or names if folders name the classes.

    Raises ConfigError if there are no images, or one has no label.
    """
    try:
        remarks = Remarks()
        units = find_units(test_uri, test_format, remarks)
        listed = pa.concat_tables([list_unit(unit, columns, remarks) for unit in units])
        check_listing(test_uri, test_format, units, listed.num_rows, remarks)
    except (ValueError, OSError) as error:
        # The listing is the pool's, so its messages name pool.uri.
        raise ConfigError(f"test_uri: {str(error).replace('pool.uri', 'test_uri')}") from error
    if not listed.num_rows:
        raise ConfigError(f"test_uri={test_uri!r} holds no images")
    if listed[schema.LABEL].null_count:
        raise ConfigError(
            f"test_uri={test_uri!r} has {listed[schema.LABEL].null_count} images without a label: check pool.label"
        )
    return listed


def refuse_shared_units(test_uri: str, pool_uri: str | list[str], pool_format: str) -> None:
    """Raise ConfigError if a folder or file belongs to both the pool and the test images.

    Compares the units that would be listed, as there is no index yet. `refuse_shared_images` later compares images.
    """
    tested, pooled = find_units(test_uri, pool_format), find_units(pool_uri, pool_format)
    shared = [*_inside(tested, pooled), *_inside(pooled, tested)]
    if shared:
        raise ConfigError(
            f"test_uri={test_uri!r} and the pool share {shared[0]}: images that could be selected cannot test a "
            "selection; give other images"
        )


def _inside(units: list[Unit], others: list[Unit]) -> list[str]:
    """Return the uris of the units that are among `others`, or below a folder among them."""
    # Patterns may divide a folder's files without sharing any; `refuse_shared_images` knows.
    uris = {unit.uri for unit in others if not unit.patterns}
    # With the slash: "pool/a" is not inside "pool/a-b".
    folders = tuple(f"{unit.uri.rstrip('/')}/" for unit in others if unit.format == "folder" and unit.recursive)
    return [unit.uri for unit in units if unit.uri in uris or unit.uri.startswith(folders)]


def refuse_shared_images(test_uri: str, listed: pa.Table, run_dir: RunDir) -> None:
    """Raise ConfigError if a test image is in the index of a run. Memory: the test uris and those of one index file."""
    tested = listed[schema.URI].to_numpy()
    for path in run_dir.table_files(schema.INDEX):
        shared = np.intersect1d(tested, filesystem.read_table(path, [schema.URI])[schema.URI].to_numpy())
        if len(shared):
            raise ConfigError(
                f"test_uri={test_uri!r} shares {len(shared)} images with the pool, {shared[0]} among them: images that "
                "could be selected cannot test a selection"
            )


def class_numbers(test_uri: str, listed: pa.Table, names: tuple[str, ...]) -> np.ndarray:
    """Return the labels of the test images, (n,) int, numbered as in the pool's index.

    names: the pool's class names in the order of their numbers. Raises ConfigError for a name that is not among them.
    """
    labels = listed[schema.LABEL]
    if not pa.types.is_string(labels.type):
        return labels.to_numpy()
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(labels.to_pylist()) - set(numbers))
    if unknown:
        raise ConfigError(f"test_uri={test_uri!r} has classes that the pool does not have: {', '.join(unknown[:5])}")
    return np.array([numbers[name] for name in labels.to_pylist()])
