"""Hugging Face datasets: a folder of Parquet files with the images' original bytes, which load_dataset reads."""

import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.originals import Original, read_originals
from elfs_ray.storage import filesystem, schema

IMAGES_PER_FILE = 1_000
ROWS_PER_GROUP = 100  # as in the hub's files: a viewer reads one group


def write_huggingface(coreset: Coreset, out: str, root: str | None) -> None:
    """Write data/train-<number>-of-<count>.parquet, 1,000 images each: image, and the columns of the coreset.

    Memory: 100 images; a file in a bucket is first written to the machine's temporary folder.
    """
    originals = read_originals(coreset)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = pa.schema([pa.field(schema.IMAGE, image), *coreset.rows.schema])
    columns = columns.with_metadata({"huggingface": json.dumps({"info": {"features": _features(columns)}})})
    num_rows = coreset.rows.num_rows
    num_files = -(-num_rows // IMAGES_PER_FILE)
    for number in range(num_files):
        name = f"train-{number:05d}-of-{num_files:05d}.parquet"
        end = min((number + 1) * IMAGES_PER_FILE, num_rows)
        with (
            filesystem.open_atomic_on_disk(filesystem.join(out, "data", name)) as sink,
            pq.ParquetWriter(sink, columns, compression="none") as writer,  # image files are compressed already
        ):
            for start in range(number * IMAGES_PER_FILE, end, ROWS_PER_GROUP):
                rows = [_row(original) for original in islice(originals, min(ROWS_PER_GROUP, end - start))]
                writer.write_table(pa.Table.from_pylist(rows, schema=columns))


def _row(original: Original) -> dict:
    path = f"{original.row[schema.RANK]:09d}-{original.stem}{original.extension}"
    return {schema.IMAGE: {"bytes": original.data, "path": path}, **original.row}


def _features(columns: pa.Schema) -> dict[str, dict[str, str]]:
    """Return the features by which `datasets` decodes the column of images, as it writes them itself."""
    # Arrow calls float32 "float".
    dtypes = {field.name: str(field.type).replace("float", "float32") for field in list(columns)[1:]}
    return {schema.IMAGE: {"_type": "Image"}} | {
        name: {"dtype": dtype, "_type": "Value"} for name, dtype in dtypes.items()
    }


FORMAT = Format(
    name="huggingface",
    target="huggingface",
    meaning="a data set of Hugging Face (folder of Parquet files with the images)",
    write=write_huggingface,
    takes_places=False,
)
