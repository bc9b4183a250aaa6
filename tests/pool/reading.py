"""List and read pools as tests do."""

from pathlib import Path

from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, count_unit, find_units, list_unit, read_images


def listed(uri: str | Path, columns: PoolColumns | None = None, form: str = "auto") -> tuple[list[str], list]:
    """Return the uris and labels of a pool, in order. Counting its units must agree with listing them."""
    columns = columns or PoolColumns()
    units = find_units(str(uri), form)
    tables = [list_unit(unit, columns) for unit in units]
    assert [count_unit(unit, columns) for unit in units] == [table.num_rows for table in tables]
    return tuple([value for table in tables for value in table[name].to_pylist()] for name in ("uri", "label"))


def read(uris: list[str]) -> list[bytes | str]:
    """Return the bytes of each image, or the reason why it cannot be read."""
    return [str(data) if isinstance(data, BadImage) else data for data in read_images(uris, PoolColumns())]
