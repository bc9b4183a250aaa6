"""STL10, the binary version: 3 x 96 x 96 pixels an image, one channel after the other, columns first; labels from 1.

Its labelled images alone are read: 5,000 to train on and 8,000 to test on, not the 100,000 without labels.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elfs_ray.datasets.cifar import read_files
from elfs_ray.datasets.contents import Contents, lines_of, png
from elfs_ray.datasets.published import Benchmark, SourceError
from elfs_ray.datasets.source import open_source

SIDE = 96


def open_stl10(benchmark: Benchmark, given: Path) -> Contents:
    """The contents of the binary archive or its folder, in the order of the files. Memory: a split's pixels."""
    source = open_source(benchmark, given)
    names = lines_of(read_files(source, ("class_names.txt",))[0])
    known = benchmark.file_md5 or {}

    def read(split: str) -> Iterator[tuple[bytes, int]]:
        files = (f"{split}_X.bin", f"{split}_y.bin")
        data, labels = read_files(source, files)
        for name, found in zip(files, (data, labels), strict=True):
            if name in known and hashlib.md5(found, usedforsecurity=False).hexdigest() != known[name]:
                raise SourceError(f"{source.path}: {name} has another MD5 than {known[name]}; {source.needed}")
        if len(data) != len(labels) * 3 * SIDE * SIDE:
            raise SourceError(f"{source.path}: {split}_X.bin has not {len(labels):,} images; {source.needed}")
        for pixels, label in zip(np.frombuffer(data, np.uint8).reshape(-1, 3, SIDE, SIDE), labels, strict=True):
            yield png(np.ascontiguousarray(pixels.transpose(2, 1, 0))), label - 1

    return Contents(names, read, source.identity)
