"""Write a benchmark as pools: <out>/train, <out>/test and, for CINIC10, <out>/valid, next to dataset.json.

Everything is written to <out>.part, which is renamed to <out> once it is complete and counted. An interrupted command
that is typed again with the same source keeps what was unpacked and the splits that were finished.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from elfs_ray.datasets.benchmarks import Benchmark, SourceError
from elfs_ray.datasets.pool_writer import write_split
from elfs_ray.datasets.source import Source, find_source
from elfs_ray.runtime.progress import say
from elfs_ray.storage import filesystem, schema

LOCK_FILE = ".lock"
UNPACKED = "unpacked"


@dataclass
class Facts:
    """The contents of dataset.json.

    splits: of each, the number of `images`, that of each class in `images_of_class`, and `files` with sizes in bytes.
    """

    dataset: str
    source: dict[str, str]
    label_names: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Facts | None":
        """Return the facts of a folder; None where dataset.json is missing or damaged."""
        try:
            return cls(**json.loads((folder / schema.DATASET_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write dataset.json to a folder, atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        filesystem.write_bytes(str(folder / schema.DATASET_FILE), text.encode())


def prepare(benchmark: Benchmark, source: str, out: Path) -> Facts:
    """Write the pools of a benchmark to `out`, unless they are there already.

    source: a path, or "download". Memory: at most 350 MB for CIFAR and STL10, else about 300 bytes an image. Disk: the
    pools and, until they are complete, the contents of the archives. Raises SourceError for a source that is not what
    was published, for an `out` that holds something else, and while another process writes to it.
    """
    finished = find_finished(benchmark, out)
    if finished is not None:
        say(f"{out} already holds {benchmark.name}")
        return finished
    origin = find_source(benchmark, source, out.parent)
    part = out.with_name(f"{out.name}.part")
    with _locked(part):
        facts = _begin(part, Facts(benchmark.name, origin.identity))
        try:
            _write_pools(part, benchmark, origin, facts)
        except SourceError:
            # Splits from a wrong source must not be resumed from.
            shutil.rmtree(part)
            raise
        shutil.rmtree(part / UNPACKED, ignore_errors=True)
        # The lock file moves along with the folder, and is still locked until the end of this block.
        part.rename(out)
        (out / LOCK_FILE).unlink()
    return facts


def find_finished(benchmark: Benchmark, out: Path) -> Facts | None:
    """Return the facts of `out` where it holds the whole benchmark; None where it is empty or missing.

    Raises SourceError where it holds something else, or files are missing or cut short.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    facts = Facts.read(out) if out.is_dir() else None
    if facts is None or facts.dataset != benchmark.name or facts.splits.keys() != benchmark.splits.keys():
        raise SourceError(f"out={out} holds something other than {benchmark.name}: give another folder, or remove it")
    for split, known in facts.splits.items():
        for name, num_bytes in known["files"].items():
            if filesystem.file_size(str(out / split / name)) != num_bytes:
                raise SourceError(f"{out / split / name} is missing or damaged: remove {out} and prepare it again")
    return facts


def _begin(part: Path, new: Facts) -> Facts:
    """Return the facts of an interrupted command with the same source; else remove what it left and begin anew."""
    facts = Facts.read(part)
    if facts is not None and (facts.dataset, facts.source) == (new.dataset, new.source):
        return facts
    for path in part.iterdir():
        if path.is_dir():  # everything but dataset.json, which is overwritten, and the lock, which is held
            shutil.rmtree(path)
    new.write(part)
    return new


def _write_pools(part: Path, benchmark: Benchmark, origin: Source, facts: Facts) -> None:
    """Write the splits that are not finished, and record each in dataset.json once it is."""
    from elfs_ray.datasets.unpack import unpack  # imports torchvision, which takes seconds

    root = origin.root
    if root is None:
        root = part / UNPACKED
        unpack(benchmark, origin, root)
    for split in benchmark.splits:
        if split not in facts.splits:
            dataset, counts = _open_checked(benchmark, root, split)
            shutil.rmtree(part / split, ignore_errors=True)
            files = write_split(part / split, split, dataset)
            facts.label_names = dataset.classes
            facts.splits[split] = {"images": len(dataset), "images_of_class": counts.tolist(), "files": files}
            facts.write(part)


def _open_checked(benchmark: Benchmark, root: Path, split: str) -> tuple[Any, np.ndarray]:
    """Return a split and its number of images in each class. Raises SourceError where the published numbers differ."""
    try:
        dataset = benchmark.open_split(root, split)
    except (RuntimeError, FileNotFoundError) as error:
        raise SourceError(
            f"{root} has no complete {split}: a file is missing, cut short or not the published one; give "
            f"{benchmark.valid_sources}"
        ) from error
    known = benchmark.splits[split]
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    if len(counts) != benchmark.num_classes:
        problem = f"{len(counts):,} classes; there must be {benchmark.num_classes:,}"
    elif counts.sum() != known.num_images:
        problem = f"{counts.sum():,} images; there must be {known.num_images:,}"
    elif counts.min() < known.fewest_of_class or counts.max() > known.most_of_class:
        problem = (
            f"{counts.min():,} to {counts.max():,} images of a class; there must be {known.fewest_of_class:,} to "
            f"{known.most_of_class:,}"
        )
    else:
        return dataset, counts
    raise SourceError(f"{split} in {root} has {problem}; give {benchmark.valid_sources}")


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it. The OS frees the lock when the process ends, even if killed."""
    part.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(part / LOCK_FILE, blocking=False):
            yield
    except Timeout as error:
        raise SourceError(f"another process writes to {part}: wait until it ends") from error
