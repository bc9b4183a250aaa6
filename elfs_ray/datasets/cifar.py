"""CIFAR10 and CIFAR100, the binary version: records of a label (CIFAR100: the coarse one, then the fine one) and
3 x 32 x 32 pixels, one channel after the other, rows first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elfs_ray.datasets.contents import Contents, lines_of, png
from elfs_ray.datasets.published import TEST, TRAIN, Benchmark, SourceError
from elfs_ray.datasets.source import Source, open_source

SIDE = 32


@dataclass(frozen=True)
class Layout:
    files: dict[str, tuple[str, ...]]
    names_file: str
    label_bytes: int  # the last of them is the class


LAYOUTS = {
    "cifar10": Layout(
        {TRAIN: tuple(f"data_batch_{number}.bin" for number in range(1, 6)), TEST: ("test_batch.bin",)},
        "batches.meta.txt",
        1,
    ),
    "cifar100": Layout({TRAIN: ("train.bin",), TEST: ("test.bin",)}, "fine_label_names.txt", 2),
}


def open_cifar(benchmark: Benchmark, given: Path) -> Contents:
    """The contents of the binary archive or its folder, in the order of the records. Memory: a split's files."""
    source = open_source(benchmark, given)
    layout = LAYOUTS[benchmark.name]
    names = lines_of(read_files(source, (layout.names_file,))[0])

    def read(split: str) -> Iterator[tuple[bytes, int]]:
        for name, data in zip(layout.files[split], read_files(source, layout.files[split]), strict=True):
            size = layout.label_bytes + 3 * SIDE * SIDE
            if len(data) % size:
                raise SourceError(
                    f"{source.path}: {name} has {len(data):,} bytes, no multiple of a record's {size:,}; "
                    f"{source.needed}"
                )
            for record in np.frombuffer(data, np.uint8).reshape(-1, size):
                yield _image_and_label(record, layout.label_bytes)

    return Contents(names, read, source.identity)


def read_files(source: Source, names: tuple[str, ...]) -> list[bytes]:
    """Some files of a source, in the order given. Raises SourceError for those that are not there."""
    found = dict(source.read(set(names).__contains__))
    missing = [name for name in names if name not in found]
    if missing:
        raise SourceError(f"{source.path} has no {', '.join(missing)}; {source.needed}")
    return [found[name] for name in names]


def _image_and_label(record: np.ndarray, label_bytes: int) -> tuple[bytes, int]:
    pixels = record[label_bytes:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
    return png(np.ascontiguousarray(pixels)), int(record[label_bytes - 1])
