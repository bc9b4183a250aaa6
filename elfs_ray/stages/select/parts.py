"""Read a pool's embeddings in parts, each some rows of the table, wherever its files begin and end.

Memory: the rows that are read, and a few numbers for each file.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elfs_ray.methods.selection import greedi
from elfs_ray.storage import filesystem, schema


class Slice(NamedTuple):
    """Name some rows of one file of embeddings/, and the file of the same samples' pseudo-labels where these matter."""

    path: str
    first: int
    end: int
    labels: str | None


class Part(NamedTuple):
    """Name some rows of embeddings/, and the centre (d,) float64 that they are taken relative to, if any."""

    slices: Sequence[Slice]
    centre: np.ndarray | None


def slices_of(
    files: Sequence[tuple[str, int]], label_files: Sequence[str | None], parts: Sequence[range]
) -> list[list[Slice]]:
    """Return, for each part, a range of the rows of a table, the slices of files that hold it."""
    ends = np.cumsum([num_rows for _, num_rows in files]).tolist()
    slices: list[list[Slice]] = []
    for part in parts:
        slices.append([])
        # From the file with the part's first row: to look at all files would take the square of the pool's time.
        number = bisect_right(ends, part.start)
        while number < len(files) and ends[number] - files[number][1] < part.stop:
            path, num_rows = files[number]
            start = ends[number] - num_rows
            first, end = max(part.start - start, 0), min(part.stop - start, num_rows)
            if first < end:
                slices[-1].append(Slice(path, first, end, label_files[number]))
            number += 1
    return slices


def read_centred(part: Part) -> greedi.Rows:
    """Return the samples of a part, relative to its centre."""
    rows = read(part.slices)
    return rows if part.centre is None else rows.centred(part.centre)


def read(slices: Sequence[Slice]) -> greedi.Rows:
    """Return the samples of some slices, with their pseudo-labels as groups where the slices name these."""
    embeddings, sample_ids, labels = [], [], []
    for path, first, end, label_path in slices:
        rows = filesystem.read_slice(path, first, end)
        embeddings.append(schema.matrix_of(rows, schema.EMBEDDING))
        sample_ids.append(rows[schema.SAMPLE_ID].to_numpy())
        if label_path is not None:
            labelled = filesystem.read_slice(label_path, first, end)
            assert np.array_equal(labelled[schema.SAMPLE_ID], rows[schema.SAMPLE_ID]), (
                "clusters/ and embeddings/ differ"
            )
            labels.append(labelled[schema.PSEUDO_LABEL].to_numpy())
    groups = np.concatenate(labels) if labels else None
    return greedi.Rows(np.concatenate(embeddings), np.concatenate(sample_ids), groups)
