"""Read the original bytes of a coreset's images, from files, tars and Parquet files."""

import posixpath
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

from elfs_ray.handover.coreset import Coreset
from elfs_ray.pool.files import image_extensions
from elfs_ray.pool.images import BadImage, read_header
from elfs_ray.pool.listing import read_images
from elfs_ray.pool.parquet import container_of
from elfs_ray.pool.tar import MEMBER_URI
from elfs_ray.runtime.progress import Progress
from elfs_ray.storage import filesystem, schema

CHUNK = 64  # images that are held at once
MAX_STEM = 60  # characters: with a rank and an extension, below the 255 bytes that a file's name may have
OTHER_EXTENSIONS = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "HEIF": ".heic", "DIB": ".bmp"}


class Original(NamedTuple):
    """An image as it is in the pool: its row of the coreset, its bytes, its size, and a name for it.

    width, height: in pixels, upright. stem: the name without extension; it need not be unique.
    """

    row: dict[str, Any]
    data: bytes
    width: int
    height: int
    stem: str
    extension: str


def read_originals(coreset: Coreset, *, show_progress: bool = True) -> Iterator[Original]:
    """Yield every image in the order of the coreset. Memory: 64 images and what is read ahead of a Parquet file.

    Raises ValueError for an image that can no longer be read.
    """
    with Progress("export", coreset.rows.num_rows, "images") if show_progress else nullcontext() as progress:
        for start in range(0, coreset.rows.num_rows, CHUNK):
            rows = coreset.rows.slice(start, CHUNK).to_pylist()
            images = _read_chunk([(row[schema.SAMPLE_ID], row[schema.URI]) for row in rows], coreset)
            for row in rows:
                yield _original(row, images[row[schema.SAMPLE_ID]])
            if progress:
                progress.advance(len(rows))


def _read_chunk(samples: list[tuple[int, str]], coreset: Coreset) -> dict[int, bytes | BadImage]:
    """Return the bytes of some images by sample_id. Images in different files are read at the same time."""
    # In the order of ids, the rows of a Parquet file ascend, so that each of its row groups is read once.
    by_file: dict[str, list[tuple[int, str]]] = {}
    for sample_id, uri in sorted(samples):
        by_file.setdefault(container_of(uri) or uri, []).append((sample_id, uri))

    def read(file: str) -> list[bytes | BadImage]:
        return list(read_images([uri for _, uri in by_file[file]], coreset.columns))

    ids = [sample_id for members in by_file.values() for sample_id, _ in members]
    images = [image for part in filesystem.map_files(read, by_file) for image in part]
    return dict(zip(ids, images, strict=True))


def _original(row: dict[str, Any], data: bytes | BadImage) -> Original:
    uri = row[schema.URI]
    try:
        if isinstance(data, BadImage):
            raise data
        name, width, height = read_header(data)
    except BadImage as error:
        raise ValueError(
            f"{uri} could be read when it was embedded, and cannot be now: {error}. Restore it."
        ) from error
    stem, extension = _name_of(uri)
    if extension.lower() not in image_extensions():
        extension = OTHER_EXTENSIONS.get(name, f".{name.lower()}")
    return Original(row, data, width, height, stem[:MAX_STEM], extension.lower())


def _name_of(uri: str) -> tuple[str, str]:
    """Return the stem and extension of an image's name; of a row of a Parquet file the file's name with the row."""
    member = MEMBER_URI.fullmatch(uri)
    if member is None and container_of(uri) is not None:
        container, _, row = uri.rpartition("#row=")
        return f"{posixpath.splitext(filesystem.basename(container))[0]}-{row}", ""
    return posixpath.splitext(posixpath.basename(member["member"] if member else uri))
