"""A published benchmark as pools: <out>/train, <out>/test and, for CINIC10, <out>/valid, beside dataset.json.

They are written to <out>.part, which becomes <out> when all is there and counted. A split that is finished is kept when
the command is interrupted and typed again with the same source; one that is not begins anew.
"""

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elfs_ray.datasets.cifar import open_cifar
from elfs_ray.datasets.cinic10 import open_cinic10
from elfs_ray.datasets.contents import Contents
from elfs_ray.datasets.download import download
from elfs_ray.datasets.imagenet import open_imagenet
from elfs_ray.datasets.pool_writer import PoolWriter, check_counts
from elfs_ray.datasets.published import Benchmark, SourceError
from elfs_ray.datasets.stl10 import open_stl10
from elfs_ray.runtime.progress import say
from elfs_ray.storage import filesystem, schema

DOWNLOAD = "download"
LOCK_FILE = ".lock"
OPEN: dict[str, Callable[[Benchmark, Path], Contents]] = {
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "stl10": open_stl10,
    "cinic10": open_cinic10,
    "imagenet": open_imagenet,
}


@dataclass
class Facts:
    """What dataset.json says. splits: for each, `images`, `images_of_class` and `files` with their bytes."""

    dataset: str
    source: dict[str, str]
    label_names: list[str]
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Facts | None":
        """None where there are none, or no whole ones."""
        try:
            return cls(**json.loads((folder / schema.DATASET_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        filesystem.write_bytes(str(folder / schema.DATASET_FILE), text.encode())


def prepare(benchmark: Benchmark, source: str, out: Path) -> Facts:
    """Check `source` (a path, or "download"), and write its pools to `out` unless they are there already.

    Raises SourceError for a source that is not what was published, for an `out` that holds something else, and where
    another process writes to it.
    """
    finished = find_finished(benchmark, out)
    if finished is not None:
        say(f"{out} has {benchmark.name} already")
        return finished
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    with _lock(part):
        given = download(benchmark, out.parent) if source == DOWNLOAD else Path(source).expanduser()
        contents = OPEN[benchmark.name](benchmark, given)
        if len(contents.label_names) != benchmark.num_classes:
            raise SourceError(
                f"{given} names {len(contents.label_names)} classes, {benchmark.name} has {benchmark.num_classes}; "
                f"{benchmark.needed()}"
            )
        facts = _begin(part, benchmark, contents)
        for split in benchmark.splits.keys() - facts.splits.keys():
            shutil.rmtree(part / split, ignore_errors=True)
        for split in benchmark.splits:
            if split not in facts.splits:
                facts.splits[split] = _write_split(part / split, split, benchmark, contents)
                facts.write(part)
        part.rename(out)
        (out / LOCK_FILE).unlink()
    return facts


def find_finished(benchmark: Benchmark, out: Path) -> Facts | None:
    """What is known of `out` where the benchmark is there as a whole; None where nothing is.

    Raises SourceError where something else is there, or files are missing or cut short.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    facts = Facts.read(out) if out.is_dir() else None
    if facts is None or facts.dataset != benchmark.name or facts.splits.keys() != benchmark.splits.keys():
        raise SourceError(f"out={out} holds something else than {benchmark.name}: give another folder, or remove it")
    for split, known in facts.splits.items():
        for name, num_bytes in known["files"].items():
            if filesystem.file_size(str(out / split / name)) != num_bytes:
                raise SourceError(f"{out / split / name} is missing or damaged: remove {out} and prepare it again")
    return facts


def _begin(part: Path, benchmark: Benchmark, contents: Contents) -> Facts:
    """The facts of an interrupted command with the same source, else new ones."""
    facts = Facts.read(part)
    new = Facts(benchmark.name, contents.identity, contents.label_names)
    return facts if facts is not None and dataclasses.replace(facts, splits={}) == new else new


def _write_split(folder: Path, split: str, benchmark: Benchmark, contents: Contents) -> dict[str, Any]:
    known = benchmark.splits[split]
    writer = PoolWriter(folder, split, contents.label_names)
    try:
        writer.write(contents.read(split), known.num_images)
        check_counts(split, writer.counts, known, benchmark.needed())
    except SourceError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"images": known.num_images, "images_of_class": writer.counts.tolist(), "files": writer.files}


@contextmanager
def _lock(part: Path) -> Iterator[None]:
    """Keep a second process out of a folder; the lock goes with the process, however it ends."""
    with (part / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"another process writes to {part}: wait for it") from None
        try:
            yield
        finally:
            if part.exists() and not any(path.name != LOCK_FILE for path in part.iterdir()):
                shutil.rmtree(part)
