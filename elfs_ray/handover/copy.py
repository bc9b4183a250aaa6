"""Copies: the images' original bytes as files whose names sort in the order of the coreset."""

import pyarrow as pa
from pyarrow import csv

from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.originals import read_originals
from elfs_ray.handover.places import COPIES_FILE, FILE
from elfs_ray.storage import filesystem


def write_copies(coreset: Coreset, out: str, root: str | None) -> None:
    """Write each image as <rank>-<name>, and coreset.csv with the file, uri and metadata of each."""
    digits = len(str(coreset.rows.num_rows - 1))
    files = []
    for original in read_originals(coreset):
        files.append(f"{original.row['rank']:0{digits}d}-{original.stem}{original.extension}")
        filesystem.write_bytes(filesystem.join(out, files[-1]), original.data)
    # Last, so that a folder that has it is complete.
    with filesystem.open_atomic(filesystem.join(out, COPIES_FILE)) as sink:
        csv.write_csv(coreset.rows.append_column(FILE, pa.array(files)), sink)


FORMAT = Format(
    name="copy",
    target="images",
    meaning="copies of the images, named in their order, and a table (CSV)",
    write=write_copies,
    takes_places=False,
)
