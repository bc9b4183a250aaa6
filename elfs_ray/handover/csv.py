"""CSV: a row for each image, for spreadsheets and every tool that has no format of its own here."""

import pyarrow as pa
from pyarrow import csv

from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.storage import filesystem, schema


def write_csv(coreset: Coreset, out: str, root: str | None) -> None:
    """Write rank, sample_id, uri, pseudo_label, score and similarity; `image` as well where images were mapped."""
    rows = coreset.rows
    if coreset.places != tuple(rows[schema.URI].to_pylist()):
        rows = rows.append_column(schema.IMAGE, pa.array(coreset.places))
    with filesystem.open_atomic(out) as sink:
        csv.write_csv(rows, sink)


FORMAT = Format(name="csv", target="coreset.csv", meaning="a table (CSV)", write=write_csv)
