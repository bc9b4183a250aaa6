"""Read rows of Parquet pools: once, in little memory and with few requests, however large a row group is."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, read_images
from elfs_ray.storage import filesystem

NUM_ROWS, IMAGE_BYTES, BLOCK = 3000, 20_000, 100
POOL_BYTES = NUM_ROWS * IMAGE_BYTES


def image(row: int) -> bytes:
    """Return bytes that do not compress, different for each row."""
    return np.random.default_rng(row).bytes(IMAGE_BYTES)


def write_pool(path: Path, rows_per_group: int, *, flat: bool = False, **options) -> str:
    structs = [{"bytes": image(row), "path": None} for row in range(NUM_ROWS)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(structs, kind)})
    # Small pages, as of other writers: pyarrow puts 1,024 images into one.
    pq.write_table(
        table.flatten() if flat else table,
        path,
        row_group_size=rows_per_group,
        write_batch_size=16,
        **options,
    )
    return str(path)


@pytest.fixture(scope="module")
def one_group(tmp_path_factory) -> str:
    """Return the uri of 60 MB of images in one row group."""
    return write_pool(tmp_path_factory.mktemp("pool") / "pool.parquet", NUM_ROWS)


def read_block(uri: str, rows) -> list[bytes | BadImage]:
    return list(read_images([f"{uri}#row={row}" for row in rows], PoolColumns()))


def blocks() -> list[range]:
    return [range(first, first + BLOCK) for first in range(0, NUM_ROWS, BLOCK)]


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_blocks_of_one_large_row_group_are_read_once(one_group):
    before = bytes_read()
    for rows in blocks():
        assert read_block(one_group, rows) == [image(row) for row in rows]
    assert bytes_read() - before < 1.2 * POOL_BYTES


def test_a_process_that_reads_every_other_block_reads_the_file_once(one_group):
    before = bytes_read()
    for rows in blocks()[1::2]:
        assert read_block(one_group, rows) == [image(row) for row in rows]
    assert bytes_read() - before < 1.2 * POOL_BYTES


def test_only_part_of_a_large_row_group_is_in_memory(one_group):
    most, before = 0, pa.total_allocated_bytes()
    for rows in blocks():
        for row, data in zip(rows, read_images([f"{one_group}#row={row}" for row in rows], PoolColumns()), strict=True):
            most = max(most, pa.total_allocated_bytes() - before)
            assert data == image(row)
    assert most < 30 << 20


@pytest.mark.parametrize("column", ["image.bytes", "a.b.c"])
def test_a_column_with_dots_in_its_name_takes_no_more_memory(tmp_path, column):
    # As `flatten` of pyarrow and of Hugging Face names the fields of a struct.
    write_pool(tmp_path / "struct.parquet", NUM_ROWS, flat=True)
    table = pq.read_table(tmp_path / "struct.parquet").select(["image.bytes"]).rename_columns([column])
    uri = str(tmp_path / "pool.parquet")
    pq.write_table(table, uri, row_group_size=NUM_ROWS, write_batch_size=16)
    del table
    before = pa.total_allocated_bytes()
    for row, data in enumerate(read_images([f"{uri}#row={row}" for row in range(9)], PoolColumns(image=column))):
        assert data == image(row)
        assert pa.total_allocated_bytes() - before < 30 << 20


def test_blocks_in_any_order_of_alternating_files_give_their_images(one_group, tmp_path):
    other = write_pool(tmp_path / "pool.parquet", 70, compression="none")
    rng = np.random.default_rng(0)
    for _ in range(6):
        for uri in (one_group, other):
            rows = np.sort(rng.integers(0, NUM_ROWS, 20))
            assert read_block(uri, rows) == [image(row) for row in rows]


def test_a_file_replaced_between_two_blocks_is_opened_again(tmp_path):
    path = tmp_path / "pool.parquet"
    for prefix in (b"old", b"replaced"):
        pq.write_table(pa.table({"image": [prefix + b"%d" % row for row in range(100)]}), tmp_path / "new")
        os.replace(tmp_path / "new", path)
        first = 0 if prefix == b"old" else 50
        assert read_block(str(path), range(first, first + 50)) == [prefix + b"%d" % i for i in range(first, first + 50)]


def test_threads_that_read_one_file_do_not_interfere(one_group):
    wrong: list[int] = []

    def read(start: int) -> None:
        for rows in blocks()[start::8]:
            wrong.extend(row for row, data in zip(rows, read_block(one_group, rows), strict=True) if data != image(row))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("rows_per_group", [pytest.param(NUM_ROWS, marks=pytest.mark.slow), 100])
def test_a_block_in_a_bucket_takes_few_requests(s3_server, s3_bucket, one_group, tmp_path, rows_per_group):
    local = one_group if rows_per_group == NUM_ROWS else write_pool(tmp_path / "pool.parquet", rows_per_group)
    uri = filesystem.join(s3_bucket, "pool.parquet")
    filesystem.write_bytes(uri, Path(local).read_bytes())
    before = s3_server.num_requests()
    for rows in blocks():
        assert read_block(uri, rows) == [image(row) for row in rows]
    # Each block takes a request to see that the file has not changed, and some for images, 8 MiB at a time.
    assert s3_server.num_requests() - before <= 3 * len(blocks()) + 10
