"""List and read pools as tests do."""

from pathlib import Path

from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, Remarks, check_listing, count_unit, find_units, list_unit, read_images


def remarks_of(uri: str | Path | list[str], columns: PoolColumns | None = None, form: str = "auto") -> Remarks:
    """Return the remarks of listing a pool and checking it. Counting its units must give the same remarks."""
    columns = columns or PoolColumns()
    of_listing, of_count = Remarks(), Remarks()
    for remarks, work in ((of_listing, lambda *of: list_unit(*of).num_rows), (of_count, count_unit)):
        units = find_units(uri if isinstance(uri, list) else str(uri), form, remarks)
        total = sum(work(unit, columns, remarks) for unit in units)
        check_listing(uri, form, units, total, remarks)
    assert of_listing == of_count
    return of_listing


def listed(
    uri: str | Path | list[str], columns: PoolColumns | None = None, form: str = "auto"
) -> tuple[list[str], list]:
    """Return the uris and labels of a pool, in order. Counting its units must agree with listing them."""
    columns = columns or PoolColumns()
    units = find_units(uri if isinstance(uri, list) else str(uri), form)
    tables = [list_unit(unit, columns) for unit in units]
    assert [count_unit(unit, columns) for unit in units] == [table.num_rows for table in tables]
    return tuple([value for table in tables for value in table[name].to_pylist()] for name in ("uri", "label"))


def read(uris: list[str]) -> list[bytes | str]:
    """Return the bytes of each image, or the reason why it cannot be read."""
    return [str(data) if isinstance(data, BadImage) else data for data in read_images(uris, PoolColumns())]
