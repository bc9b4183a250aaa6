"""CINIC10: train/, valid/ and test/, in each a folder for each class, with PNGs of 32 pixels."""

import re
from collections.abc import Iterator
from pathlib import Path

from elfs_ray.datasets.contents import Contents
from elfs_ray.datasets.published import Benchmark
from elfs_ray.datasets.source import open_source

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_IMAGE = re.compile(rf"(?P<split>train|valid|test)/(?P<name>{'|'.join(CLASSES)})/[^/.][^/]*\.png")


def open_cinic10(benchmark: Benchmark, given: Path) -> Contents:
    """The contents of the archive or its folder, by class and name. Memory: a split's files, of an archive."""
    source = open_source(benchmark, given)

    def read(split: str) -> Iterator[tuple[bytes, int]]:
        def wanted(path: str) -> bool:
            match = _IMAGE.fullmatch(path)
            return match is not None and match["split"] == split

        for path, data in source.read(wanted):
            yield data, CLASSES.index(path.split("/")[1])

    return Contents(CLASSES, read, source.identity)
