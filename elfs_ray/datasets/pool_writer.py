"""Write pools as Parquet: image (bytes of an image file), label (int32), and the class names in the metadata."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.runtime.progress import Progress
from elfs_ray.storage import filesystem, schema

# A reader loads a row group as a whole, wherever in it a block of ids begins: small groups waste little.
GROUP_BYTES, GROUP_ROWS = 16 << 20, 1_024
FILE_BYTES = 256 << 20
LABEL_NAMES = "label_names"


def write_split(folder: Path, split: str, dataset: Any) -> dict[str, int]:
    """Write a torchvision dataset of (bytes of an image file, label) as <split>-00000.parquet and so on.

    Each file appears only when it is complete. Returns the size of each in bytes, by name. Memory: a row group, and
    the dataset.
    """
    metadata = {LABEL_NAMES: json.dumps(dataset.classes)}
    pool_schema = pa.schema([(schema.IMAGE, pa.binary()), (schema.LABEL, pa.int32())], metadata=metadata)
    # Image files are already compressed, and no two are equal: zstd or a dictionary would only cost time.
    compression = {schema.IMAGE: "none", schema.LABEL: "zstd"}
    files: dict[str, int] = {}
    with Progress(split, len(dataset), "images") as progress:
        groups = _row_groups(dataset, pool_schema)
        group = next(groups, None)
        while group is not None:
            path = folder / f"{split}-{len(files):05d}.parquet"
            num_bytes = 0
            with (
                filesystem.open_atomic(str(path)) as sink,
                pq.ParquetWriter(sink, pool_schema, compression=compression, use_dictionary=[schema.LABEL]) as writer,
            ):
                while group is not None and num_bytes < FILE_BYTES:
                    writer.write_table(group)
                    num_bytes += group.nbytes
                    progress.advance(group.num_rows)
                    group = next(groups, None)
            files[path.name] = path.stat().st_size
    return files


def _row_groups(dataset: Any, pool_schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the dataset in tables of GROUP_ROWS images or GROUP_BYTES, whichever is reached first."""
    images, labels, num_bytes = [], [], 0
    for index in range(len(dataset)):
        image, label = dataset[index]
        images.append(image)
        labels.append(label)
        num_bytes += len(image)
        if num_bytes >= GROUP_BYTES or len(images) == GROUP_ROWS or index == len(dataset) - 1:
            yield pa.table([pa.array(images, pa.binary()), pa.array(labels, pa.int32())], schema=pool_schema)
            images, labels, num_bytes = [], [], 0
