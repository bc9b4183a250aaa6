"""Read, decode and write the pool's images in blocks of ids, for stages embed and copy.

The blocks depend only on the config and on the number of images in each listing of the pool, and every table has one
file for each block. So a resumed run, on any number of workers, finds the blocks that are done by the names of their
files, and a pool that grew leaves the blocks of its earlier images as they are.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from elfs_ray.config import Config
from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image
from elfs_ray.pool.listing import PoolColumns, read_images
from elfs_ray.pool.parquet_rows import has_long_groups
from elfs_ray.runtime.progress import count, say
from elfs_ray.stages.embed.clock import COPY, READ, Clock
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

BLOCK_PIXEL_BYTES = 64 << 20  # a block crosses the object store as one row: a few must fit in a worker's memory
MAX_BLOCK_IMAGES = 8192
PROXY_GROUP_BYTES = 1 << 20  # encoded images in a row group, which streamed training reads at once
MIN_BLOCKS = 16  # a small pool still has enough blocks to share among workers
MIN_BLOCK_IMAGES = 64
MAX_BLOCKS_A_TURN = 16  # a lost worker repeats its turn
MIN_TURNS = 4  # of each worker, so that all are busy until the end


def plan_blocks(block_images: int | None, side: int, num_samples: int) -> list[tuple[int, int]]:
    """Return the (first, last) id of each block.

    A block has `block_images` images or, if that is None, about 64 MiB of pixels of squares with `side` pixels.
    """
    rows = block_images
    if rows is None:
        rows = min(BLOCK_PIXEL_BYTES // (3 * side * side), MAX_BLOCK_IMAGES, -(-num_samples // MIN_BLOCKS))
        rows = max(rows, MIN_BLOCK_IMAGES)
    return [(first, min(first + rows, num_samples) - 1) for first in range(0, num_samples, rows)]


def blocks_of(index: IndexResult, block_images: int | None, side: int) -> list[tuple[int, int]]:
    """Return the (first, last) id of each block of a pool: those of `plan_blocks` for each of its listings."""
    return [
        (start + first, start + last)
        for start, end in index.ranges
        for first, last in plan_blocks(block_images, side, end - start)
    ]


def blocks_a_turn(config: Config, run_dir: RunDir, blocks: list[tuple[int, int]], num_workers: int) -> int:
    """Return how many adjacent blocks a worker should take at a time: one, unless the pool has long row groups.

    A row group of Parquet is read from its start. If each block of a long one went to another worker, every worker
    would read all of it. The pool's first image stands for all.
    """
    most = min(MAX_BLOCKS_A_TURN, len(blocks) // (MIN_TURNS * num_workers))
    if most < 2:
        return 1
    first = run_dir.read_rows(schema.INDEX, np.array([blocks[0][0]]), [schema.URI])[schema.URI][0].as_py()
    try:
        return most if has_long_groups(first, config.pool.image_column) else 1
    except (OSError, ValueError):  # whoever reads the block will say so
        return 1


def rows_by_file(run_dir: RunDir, *table: str) -> dict[str, int]:
    """Return the number of rows in each file of a table, from its footer; -1 for a damaged file."""
    paths = run_dir.table_files(*table)
    counts = filesystem.map_files(_num_rows, paths)
    return {filesystem.basename(path): count for path, count in zip(paths, counts, strict=True)}


def _num_rows(path: str) -> int:
    try:
        return filesystem.num_rows(path)
    except pa.ArrowInvalid:  # cut short by a full disk or a copy: its block counts as not done and is written again
        return -1


def decode_images(config: Config, uris: list[str], min_size: int) -> Iterator[Image.Image | BadImage]:
    """Yield each of some images of the pool, with a BadImage for one that cannot be used.

    min_size: the smallest short side, in pixels, to which a JPEG may be scaled while it is decoded.
    """
    for data in read_images(uris, PoolColumns(config.pool.image_column)):
        if isinstance(data, BadImage):
            yield data
            continue
        try:
            image = decode_image(data, max_pixels=config.embed.max_image_pixels, min_size=min_size)
        except BadImage as error:
            yield error
        else:
            yield image


def copy_images(
    config: Config,
    run_dir: RunDir,
    first: int,
    last: int,
    *,
    stage: str,
    rejected: list[dict[str, Any]],
    clock: Clock,
    min_size: int = 0,
) -> Iterator[tuple[int, Image.Image, bytes]]:
    """Yield (sample_id, image, its encoded copy for the proxy network) for the images of a block.

    The copy is empty in a run that keeps none.

    Appends a row to `rejected`, in the name of `stage`, for each image that cannot be used. `min_size` is the smallest
    short side, in pixels, to which a JPEG may be scaled while it is decoded; it is raised to that of the copy. `clock`
    is told what each step has taken.
    """
    min_size = max(min_size, config.embed.proxy_image_size)
    sample_ids = np.arange(first, last + 1)
    uris = run_dir.read_rows(schema.INDEX, sample_ids, [schema.URI])[schema.URI].to_pylist()
    images = decode_images(config, uris, min_size)
    for sample_id, uri, image in zip(sample_ids.tolist(), uris, images, strict=True):
        clock.lap(READ)
        copy = _encode_copy(config, image) if config.keeps_copies else b""
        clock.lap(COPY)
        if isinstance(image, BadImage) or isinstance(copy, BadImage):
            reason = str(image if isinstance(image, BadImage) else copy)
            rejected.append({"sample_id": sample_id, "uri": uri, "stage": stage, "reason": reason})
            continue
        yield sample_id, image, copy


def _encode_copy(config: Config, image: Image.Image | BadImage) -> bytes | BadImage:
    """Return the encoded copy of an image, or why there is none."""
    if isinstance(image, BadImage):
        return image
    embed = config.embed
    try:
        return encode_proxy_image(image, short_side=embed.proxy_image_size, jpeg_quality=embed.proxy_jpeg_quality)
    except BadImage as error:
        return error


def say_own_range(stage: str, num_images: int) -> None:
    """Say how many images were shown in their own range, if any were."""
    if num_images:
        say(
            f"{stage:<10}{count(num_images, 'image')} of more than 8 bits: the file does not say what is white, so its "
            "darkest sample is black and its brightest white"
        )


def write_proxy_images(run_dir: RunDir, name: str, sample_ids: list[int], encoded: list[bytes]) -> None:
    """Write a block's file of proxy_images/, in row groups of about 1 MiB."""
    table = pa.table([sample_ids, encoded], schema=schema.PROXY_IMAGES_SCHEMA)
    rows_per_group = max(1, PROXY_GROUP_BYTES * len(encoded) // max(1, sum(map(len, encoded))))
    filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, name), table, rows_per_group)


def write_rejected(path: str, rejected: list[dict[str, Any]]) -> None:
    """Write a block's file of rejected images by ascending sample_id; write none for a block without any."""
    if not rejected:
        # An earlier run may have rejected an image that could not be read then and can be read now.
        filesystem.delete(path)
        return
    rejected.sort(key=lambda row: row["sample_id"])
    filesystem.write_table(path, pa.Table.from_pylist(rejected, schema=schema.REJECTED_SCHEMA))


def rejected_by_copy(run_dir: RunDir, name: str) -> str:
    """Return the path of the file in which stage copy keeps a block's rejected images, for embed to take over."""
    return run_dir.path("copy", schema.REJECTED, name)
