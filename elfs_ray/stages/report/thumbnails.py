"""Make thumbnails of some images of a run: from its copies or, where it keeps none, from the originals.

Driver memory: the thumbnails, and for each of 8 threads one decoded image and what it reads, such as row groups of 1
MiB of proxy_images/ for up to 32 images.
"""

import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from elfs_ray.config import Config
from elfs_ray.pool.images import BadImage, encode_png, open_proxy_image
from elfs_ray.stages.embed.blocks import decode_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

THREADS = 8  # more than CPUs help: a bucket answers slowly, and Pillow decodes outside Python's lock
BATCH = 32
JPEG_QUALITY = 72
LOSSLESS_SIDE = 32  # of smaller images, a PNG takes fewer bytes than the tables of a JPEG

Images = Iterator[tuple[int, Image.Image | BadImage]]


def make_thumbnails(
    config: Config, run_dir: RunDir, uris: Mapping[int, str], *, side: int, max_bytes: int, max_seconds: float
) -> dict[int, bytes]:
    """Return an encoded image, whose long side has at most `side` pixels, by sample_id.

    uris: the uri of each sample, the most important first: the last ones get no thumbnail if the bytes or the seconds
    do not suffice. Nor do images that cannot be read.
    """
    ids = list(uris)
    read = _reader_of_copies(run_dir) if config.keeps_copies else _reader_of_originals(config, uris, side)

    def make(batch: list[int]) -> dict[int, bytes]:
        return {i: _shrink(image, side) for i, image in read(sorted(batch)) if not isinstance(image, BadImage)}

    thumbnails: dict[int, bytes] = {}
    num_bytes, deadline = 0, time.monotonic() + max_seconds
    batches = deque(ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
    running: deque[tuple[list[int], Future[dict[int, bytes]]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        while batches or running:
            while batches and len(running) < THREADS:
                batch = batches.popleft()
                running.append((batch, threads.submit(make, batch)))
            batch, future = running.popleft()
            made = future.result()
            for sample_id in batch:
                if sample_id in made and num_bytes + len(made[sample_id]) <= max_bytes:
                    thumbnails[sample_id] = made[sample_id]
                    num_bytes += len(made[sample_id])
            if num_bytes > 0.98 * max_bytes or time.monotonic() > deadline:
                batches.clear()
    return thumbnails


def _reader_of_originals(config: Config, uris: Mapping[int, str], side: int) -> Callable[[list[int]], Images]:
    def read(batch: list[int]) -> Images:
        yield from zip(batch, decode_images(config, [uris[i] for i in batch], side // 2), strict=True)

    return read


def _reader_of_copies(run_dir: RunDir) -> Callable[[list[int]], Images]:
    """Return a function that reads copies by ascending sample_id, and of each file the row groups that hold them."""
    files = [(*schema.parse_range_file(path), path) for path in run_dir.table_files(schema.PROXY_IMAGES)]

    def read(batch: list[int]) -> Images:
        ids = np.array(batch)
        for first, last, path in files:
            wanted = ids[(ids >= first) & (ids <= last)]
            if len(wanted):
                rows = filesystem.read_rows(path, schema.SAMPLE_ID, wanted)
                for sample_id, data in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
                    yield sample_id, open_proxy_image(data)

    return read


def _shrink(image: Image.Image, side: int) -> bytes:
    """Encode an image, made smaller if its long side has more than `side` pixels."""
    scale = min(1.0, side / max(image.size))
    if scale < 1:
        width, height = (max(1, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if max(image.size) <= LOSSLESS_SIDE:
        return encode_png(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
