"""ImageNet-1K (ILSVRC2012): its three archives as published, or train/ and val/ with a folder for each class.

The training archive is a tar of 1,000 tars, one a class. The validation archive is a flat tar; its labels are numbers
in the development kit, whose meta.mat says which class (WordNet id) each number is. Classes are numbered by their
sorted WordNet ids, as everywhere. The validation images are what is tested on: their pool is `test`.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import scipy.io

from elfs_ray.datasets.contents import Contents, lines_of
from elfs_ray.datasets.published import TEST, TRAIN, Benchmark, SourceError
from elfs_ray.datasets.source import Source, check_md5, read_errors, read_member

FOLDERS = {TRAIN: "train", TEST: "val"}
DEVKIT = "ILSVRC2012_devkit_t12"
_WNID = re.compile(r"n\d{8}")
_TRAIN_IMAGE = re.compile(r"n\d{8}_\d+\.JPEG")
_FOLDER_IMAGE = re.compile(r"[^./][^/]*\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def open_imagenet(benchmark: Benchmark, given: Path) -> Contents:
    """The contents of a folder with the archives or with class folders, by class and name in both.

    Memory: the headers of one class's tar, or of the validation tar. Raises SourceError for anything else.
    """
    if all((given / folder).is_dir() for folder in FOLDERS.values()):
        return _open_folders(benchmark, given)
    paths = [given / archive.name for archive in benchmark.archives]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"source={given} has no {', '.join(missing)}; {benchmark.needed()}")
    for path, archive in reversed(list(zip(paths, benchmark.archives, strict=True))):
        check_md5(path, archive, benchmark)
    return _open_archives(benchmark, *paths)


def _open_folders(benchmark: Benchmark, given: Path) -> Contents:
    wnids = sorted(path.name for path in (given / FOLDERS[TRAIN]).iterdir() if _WNID.fullmatch(path.name))
    labels = {wnid: label for label, wnid in enumerate(wnids)}

    def read(split: str) -> Iterator[tuple[bytes, int]]:
        for wnid in wnids:
            folder = Source(given / FOLDERS[split] / wnid, "", benchmark.needed(), {})
            if folder.path.is_dir():
                for _, data in folder.read(_FOLDER_IMAGE.fullmatch):
                    yield data, labels[wnid]

    return Contents(wnids, read, {"folder": str(given.resolve())})


def _open_archives(benchmark: Benchmark, train: Path, val: Path, devkit: Path) -> Contents:
    wnid_of, truth = _read_devkit(devkit, benchmark)
    wnids = sorted(wnid_of.values())
    labels = {wnid: label for label, wnid in enumerate(wnids)}

    def read(split: str) -> Iterator[tuple[bytes, int]]:
        path = {TRAIN: train, TEST: val}[split]
        with read_errors(path, benchmark.needed()), tarfile.open(path, "r:") as archive:
            if split == TRAIN:
                yield from _read_train(archive, labels)
            else:
                yield from _read_val(archive, [labels[wnid_of[number]] for number in truth])

    return Contents(wnids, read, {archive.name: archive.md5 for archive in benchmark.archives})


def _read_train(archive: tarfile.TarFile, labels: dict[str, int]) -> Iterator[tuple[bytes, int]]:
    tars = {member.name.removesuffix(".tar"): member for member in archive if member.isfile()}
    for wnid in sorted(labels.keys() & tars.keys()):
        with archive.extractfile(tars[wnid]) as file, tarfile.open(fileobj=file, mode="r:") as images:  # type: ignore[union-attr]
            members = [member for member in images if member.isfile() and _TRAIN_IMAGE.fullmatch(member.name)]
            for member in sorted(members, key=lambda member: member.name):
                yield read_member(images, member), labels[wnid]


def _read_val(archive: tarfile.TarFile, labels: list[int]) -> Iterator[tuple[bytes, int]]:
    found = []
    for member in archive:
        match = _VAL_IMAGE.fullmatch(member.name)
        if match and member.isfile() and 1 <= int(match[1]) <= len(labels):
            found.append((labels[int(match[1]) - 1], member.name, member))
    for label, _, member in sorted(found, key=lambda entry: entry[:2]):
        yield read_member(archive, member), label


def _read_devkit(path: Path, benchmark: Benchmark) -> tuple[dict[int, str], list[int]]:
    """(WordNet id of each class number, class number of each validation image in turn)."""
    meta, truth = f"{DEVKIT}/data/meta.mat", f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
    files = dict(Source(path, "", benchmark.needed(), {}).read({meta, truth}.__contains__))
    if len(files) < 2:
        raise SourceError(f"{path} has no {meta} and {truth}; {benchmark.needed()}")
    synsets = scipy.io.loadmat(io.BytesIO(files[meta]), simplify_cells=True)["synsets"]
    # Those with children are groups of classes.
    wnid_of = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets if not one["num_children"]}
    return wnid_of, [int(line) for line in lines_of(files[truth])]
