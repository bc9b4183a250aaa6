"""Pools as Parquet: image (the bytes of an image file) and label (int32); the classes' names are in the metadata."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.datasets.published import SourceError, Split
from elfs_ray.runtime.progress import Progress
from elfs_ray.storage import filesystem, schema

# A group is read as a whole, wherever a block of ids begins in it.
GROUP_BYTES, GROUP_ROWS = 16 << 20, 1_024
FILE_BYTES = 256 << 20
LABEL_NAMES = "label_names"


class PoolWriter:
    """Writes a split's files, <split>-00000.parquet and so on, each whole or not at all. Memory: a group of rows."""

    def __init__(self, folder: Path, split: str, label_names: list[str]):
        self._folder, self._split = folder, split
        metadata = {LABEL_NAMES: json.dumps(label_names)}
        self._schema = pa.schema([(schema.IMAGE, pa.binary()), (schema.LABEL, pa.int32())], metadata=metadata)
        self.counts = np.zeros(len(label_names), np.int64)
        self.files: dict[str, int] = {}

    def write(self, images: Iterable[tuple[bytes, int]], total: int) -> None:
        """Write every image with its label. Raises SourceError for a label that is no class's."""
        rest = iter(images)
        with Progress(self._split, total, "images") as progress:
            group = self._next_group(rest, progress)
            while group.num_rows:
                path = self._folder / f"{self._split}-{len(self.files):05d}.parquet"
                with filesystem.open_atomic(str(path)) as sink, self._open(sink) as writer:
                    num_bytes = 0
                    while group.num_rows and num_bytes < FILE_BYTES:
                        writer.write_table(group)
                        num_bytes += group.nbytes
                        group = self._next_group(rest, progress)
                self.files[path.name] = path.stat().st_size

    def _open(self, sink: Any) -> pq.ParquetWriter:
        # Image files do not shrink further, and no two are alike.
        compression = {schema.IMAGE: "none", schema.LABEL: "zstd"}
        return pq.ParquetWriter(sink, self._schema, compression=compression, use_dictionary=[schema.LABEL])

    def _next_group(self, rest: Iterable[tuple[bytes, int]], progress: Progress) -> pa.Table:
        images, labels, num_bytes = [], [], 0
        for image, label in rest:
            if not 0 <= label < len(self.counts):
                raise SourceError(f"{self._split}: label {label} is none of {len(self.counts)} classes")
            images.append(image)
            labels.append(label)
            num_bytes += len(image)
            if num_bytes >= GROUP_BYTES or len(images) == GROUP_ROWS:
                break
        np.add.at(self.counts, labels, 1)
        progress.advance(len(images))
        return pa.table([pa.array(images, pa.binary()), pa.array(labels, pa.int32())], schema=self._schema)


def check_counts(split: str, counts: np.ndarray, known: Split, needed: str) -> None:
    """Raise SourceError where a split has not the number of images, or of a class, that were published."""
    if counts.sum() != known.num_images:
        raise SourceError(f"{split} has {counts.sum():,} images, published were {known.num_images:,}; {needed}")
    fewest, most = int(counts.min()), int(counts.max())
    if fewest < known.fewest_of_class or most > known.most_of_class:
        raise SourceError(
            f"{split} has {fewest:,} to {most:,} images of a class, published were {known.fewest_of_class:,} to "
            f"{known.most_of_class:,}; {needed}"
        )
