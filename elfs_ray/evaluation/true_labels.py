"""Read true labels and test images, which an evaluation needs and a selection must not see."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from elfs_ray.config import EmbedConfig
from elfs_ray.evaluation.held_out import class_numbers, list_test_images
from elfs_ray.methods.training.classifier import LabelledImages
from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image, open_proxy_image
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

NO_LABEL = -1


@dataclass(frozen=True)
class TrueLabels:
    """The true labels of a pool.

    of_id: (num ids,) int32, the label of each sample_id, NO_LABEL where it has none.
    names: the class names in the order of their numbers; empty if the pool's labels are integers.
    """

    of_id: np.ndarray
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return the largest label plus one."""
        return int(self.of_id.max()) + 1

    def of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the labels of some samples, (n,) int32. Raises ValueError if any has none."""
        labels = self.of_id[sample_ids]
        num_missing = int((labels == NO_LABEL).sum())
        if num_missing:
            raise ValueError(f"{num_missing} samples of the pool have no label: check pool.label")
        return labels


def read_labels(run_dir: RunDir) -> TrueLabels:
    """Read the labels that a run copied from its pool into its index. Memory: 4 bytes a sample, 20 while reading."""
    index = IndexResult.read(run_dir)
    of_id = np.full(index.rows, NO_LABEL, np.int32)
    for rows in run_dir.read_table(schema.INDEX, columns=[schema.SAMPLE_ID, schema.LABEL]):
        of_id[rows[schema.SAMPLE_ID].to_numpy()] = rows[schema.LABEL].fill_null(NO_LABEL).to_numpy()
    return TrueLabels(of_id, tuple(index.label_names))


def list_labels(run_dir: RunDir, pool_uri: str | list[str], pool_format: str, columns: PoolColumns) -> TrueLabels:
    """Read labels from the pool itself, for a run whose index has none; samples are matched by uri.

    Memory: the pool's uris twice. Raises ValueError if the pool no longer lists the images of the run's index.
    """
    listed = pa.concat_tables([list_unit(unit, columns) for unit in find_units(pool_uri, pool_format)])
    labels = listed[schema.LABEL]
    names: tuple[str, ...] = ()
    if pa.types.is_string(labels.type):
        names = tuple(sorted(set(labels.drop_null().to_pylist())))
        numbers = {name: number for number, name in enumerate(names)}
        of_row = np.array([numbers.get(name, NO_LABEL) for name in labels.to_pylist()], np.int32)
    else:
        of_row = labels.fill_null(NO_LABEL).to_numpy().astype(np.int32)
    index = IndexResult.read(run_dir)
    of_id = np.full(index.rows, NO_LABEL, np.int32)
    # large_string: the uris of a large pool exceed the 2 GiB that a string array can hold.
    listed_uris = listed[schema.URI].cast(pa.large_string()).combine_chunks()
    # Images that have left the pool are labelled in no place, and they are never selected.
    gone = gone_ids(run_dir)
    for rows in run_dir.read_table(schema.INDEX, columns=[schema.SAMPLE_ID, schema.URI]):
        rows = rows.filter(~np.isin(rows[schema.SAMPLE_ID].to_numpy(), gone))
        places = pc.index_in(rows[schema.URI].cast(pa.large_string()), value_set=listed_uris)
        if places.null_count:
            raise ValueError(
                f"{pool_uri} no longer lists the images of {run_dir.uri}, so its labels cannot be matched: run the "
                "pipeline again with pool.label=..."
            )
        of_id[rows[schema.SAMPLE_ID].to_numpy()] = of_row[places.to_numpy()]
    return TrueLabels(of_id, names)


def load_images(run_dir: RunDir, sample_ids: np.ndarray, size: int) -> np.ndarray:
    """Return the centre squares of the copies of samples, reduced to (n, size, size, 3) uint8.

    Memory: that, and the encoded copies.
    """
    copies = run_dir.read_rows(schema.PROXY_IMAGES, sample_ids, [schema.IMAGE])[schema.IMAGE].to_pylist()
    return np.stack([_square_of(copy, size) for copy in copies])


def _square_of(copy: bytes, size: int) -> np.ndarray:
    """Return the centre square of what `encode_proxy_image` wrote, reduced to (size, size, 3) uint8."""
    image = open_proxy_image(copy)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    # Pillow copies a square that has the size already, bit by bit.
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def load_test_images(
    test_uri: str, test_format: str, columns: PoolColumns, embed: EmbedConfig, names: tuple[str, ...], size: int
) -> LabelledImages:
    """Decode the test images, as copies of the pool's are made, with classes numbered as in the pool.

    Memory: 3 · size² bytes an image. Raises ValueError for an image that cannot be decoded, has no label, or has a
    class that the pool does not have.
    """
    listed = list_test_images(test_uri, test_format, columns)
    copy_size = embed.proxy_image_size
    images = np.empty((listed.num_rows, size, size, 3), np.uint8)
    uris = listed[schema.URI].to_pylist()
    for position, data in enumerate(read_images(uris, columns)):
        if isinstance(data, BadImage):
            raise ValueError(f"test image {uris[position]}: {data}")
        image = decode_image(data, max_pixels=embed.max_image_pixels, min_size=copy_size)
        # Proxy images above 64 pixels are JPEG. Test images get the same encoding, so that both have its artefacts.
        copy = encode_proxy_image(image, short_side=copy_size, jpeg_quality=embed.proxy_jpeg_quality)
        images[position] = _square_of(copy, size)
    return LabelledImages(images, class_numbers(test_uri, listed, names), np.arange(len(images)))


def digest(*parts: Any) -> str:
    """Return a hash of 16 hex digits: of arrays by dtype, shape and bytes, of anything else by its repr."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            hashed.update(f"{part.dtype}{part.shape}".encode())
            hashed.update(np.ascontiguousarray(part).data)
        else:
            hashed.update(repr(part).encode())
        hashed.update(b"\0")  # keeps ("ab", "c") and ("a", "bc") apart
    return hashed.hexdigest()[:16]
