"""Blocks of ids: what the pool's images are read, decoded and written in, by stage embed and by stage copy before it.

A block is a function of the config and the pool's size alone, and every table has one file for it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from elfs_ray.config import Config
from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image
from elfs_ray.pool.listing import PoolColumns, read_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

BLOCK_PIXEL_BYTES = 64 << 20
MAX_BLOCK_IMAGES = 8192
PROXY_GROUP_BYTES = 1 << 20  # of proxy images in a row group, the unit in which streamed training reads
MIN_BLOCKS = 16
MIN_BLOCK_IMAGES = 64


def plan_blocks(block_images: int | None, side: int, num_samples: int) -> list[tuple[int, int]]:
    """(first, last) id of each block: `block_images` at most, or about 64 MiB of squares of `side` pixels."""
    rows = block_images
    if rows is None:
        rows = min(BLOCK_PIXEL_BYTES // (3 * side * side), MAX_BLOCK_IMAGES, -(-num_samples // MIN_BLOCKS))
        rows = max(rows, MIN_BLOCK_IMAGES)
    return [(first, min(first + rows, num_samples) - 1) for first in range(0, num_samples, rows)]


def rows_by_file(run_dir: RunDir, *table: str) -> dict[str, int]:
    """The rows of each file of a table, from their footers; -1 for a file that has none, and is made again."""
    paths = run_dir.table_files(*table)
    counts = filesystem.map_files(_num_rows, paths)
    return {filesystem.basename(path): count for path, count in zip(paths, counts, strict=True)}


def _num_rows(path: str) -> int:
    try:
        return filesystem.num_rows(path)
    except pa.ArrowInvalid:
        return -1


def copy_images(
    config: Config,
    run_dir: RunDir,
    first: int,
    last: int,
    *,
    stage: str,
    rejected: list[dict[str, Any]],
    min_size: int = 0,
) -> Iterator[tuple[int, Image.Image, bytes]]:
    """(sample_id, image, its copy for the proxy network) of a block in turn.

    An image that cannot be used becomes a row of `rejected` in the name of `stage`. min_size: the short side, in
    pixels, below which a JPEG may not be decoded; at least that of the copy.
    """
    embed = config.embed
    min_size = max(min_size, embed.proxy_image_size)
    for sample_id, uri, image in _decode_images(config, run_dir, first, last, min_size):
        if isinstance(image, BadImage):
            rejected.append({"sample_id": sample_id, "uri": uri, "stage": stage, "reason": str(image)})
            continue
        copy = encode_proxy_image(image, short_side=embed.proxy_image_size, jpeg_quality=embed.proxy_jpeg_quality)
        yield sample_id, image, copy


def _decode_images(
    config: Config, run_dir: RunDir, first: int, last: int, min_size: int
) -> Iterator[tuple[int, str, Image.Image | BadImage]]:
    """(sample_id, uri, image) of a block in turn; in place of an image that cannot be used, the reason."""
    index = run_dir.read_rows(schema.INDEX, np.arange(first, last + 1), [schema.URI])
    uris = index[schema.URI].to_pylist()
    columns = PoolColumns(config.pool.image_column)
    for sample_id, uri, data in zip(range(first, last + 1), uris, read_images(uris, columns), strict=True):
        if isinstance(data, BadImage):
            yield sample_id, uri, data
            continue
        try:
            image = decode_image(data, max_pixels=config.embed.max_image_pixels, min_size=min_size)
        except BadImage as error:
            yield sample_id, uri, error
        else:
            yield sample_id, uri, image


def write_proxy_images(run_dir: RunDir, name: str, sample_ids: list[int], encoded: list[bytes]) -> None:
    """Write a block's file of proxy_images/, in row groups of about 1 MiB."""
    table = pa.table([sample_ids, encoded], schema=schema.PROXY_IMAGES_SCHEMA)
    rows_per_group = max(1, PROXY_GROUP_BYTES * len(encoded) // max(1, sum(map(len, encoded))))
    filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, name), table, rows_per_group)


def write_rejected(path: str, rejected: list[dict[str, Any]]) -> None:
    """Write a block's file of rejected images by ascending sample_id, or none where there is no such image."""
    if not rejected:
        # An earlier try may have failed to read what can be read now.
        filesystem.delete(path)
        return
    rejected.sort(key=lambda row: row["sample_id"])
    filesystem.write_table(path, pa.Table.from_pylist(rejected, schema=schema.REJECTED_SCHEMA))


def rejected_by_copy(run_dir: RunDir, name: str) -> str:
    """The file in which stage copy keeps what it could not use of a block, until embed takes it over."""
    return run_dir.path("copy", schema.REJECTED, name)
