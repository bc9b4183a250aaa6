"""The five benchmarks in the layouts in which their owners publish them, with a few real pixels in them.

Each builder writes an archive (ImageNet: a folder of three) and the folder that it unpacks to, and returns the small
benchmark that describes them: torchvision's reader with the MD5s and counts of these files.
"""

import dataclasses
import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.io
from PIL import Image
from sklearn.datasets import load_sample_images

from elfs_ray.datasets import readers
from elfs_ray.datasets.benchmarks import BENCHMARKS, CINIC10, IMAGENET, STL10, Archive, Benchmark, Split

# isort: split
from torchvision.datasets.imagenet import ARCHIVE_META

CINIC10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WNIDS = ("n02119789", "n01440764", "n03014705")  # in the order of the development kit's numbers, not of the ids


@dataclass(frozen=True)
class Built:
    """A small benchmark in its published layout.

    archive: what is downloaded (a folder of archives for ImageNet). folder: the same, unpacked.
    images: (pixels or file, label) of each split, in the order in which the pool has them.
    """

    benchmark: Benchmark
    archive: Path
    folder: Path
    images: dict[str, list[tuple[np.ndarray | bytes, int]]]


def crops(num_images: int, side: int, seed: int) -> list[np.ndarray]:
    """Return (side, side, 3) uint8 crops of a photograph: all different, also when turned or mirrored."""
    photograph = load_sample_images().images[0]
    rng = np.random.default_rng(seed)
    tops, lefts = (rng.integers(0, limit - side, num_images) for limit in photograph.shape[:2])
    return [photograph[top : top + side, left : left + side] for top, left in zip(tops, lefts, strict=True)]


def shuffled_labels(num_classes: int, each: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), each)).tolist()


def image_file(pixels: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], prefix: str = "", mode: str = "w:gz") -> str:
    """Write a tar and return its MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo(prefix or ".")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return md5_of(path.read_bytes())


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def md5_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def write_both(root: Path, archive: str, files: Mapping[str, bytes], prefix: str) -> tuple[Path, Path, str]:
    """Write an archive and what it unpacks to; return both paths and the archive's MD5."""
    md5 = write_tar(root / archive, files, prefix)
    folder = root / "unpacked" / prefix
    write_folder(folder, files)
    return root / archive, folder, md5


def with_md5(dataset: type, files: Mapping[str, bytes], tgz_md5: str) -> type:
    """Return torchvision's class for a set of these files."""
    fields = {
        name: [[file, md5_of(files[file])] for file, _ in getattr(dataset, name)]
        for name in ("train_list", "test_list")
    }
    if hasattr(dataset, "meta"):
        fields["meta"] = dataset.meta | {"md5": md5_of(files[dataset.meta["filename"]])}
    return type(f"Small{dataset.__name__}", (dataset,), {"tgz_md5": tgz_md5, **fields})


def with_files(benchmark: Benchmark, md5: str, splits: dict[str, Split], **changes) -> Benchmark:
    """Return a benchmark of one archive, with the MD5 and the counts of small files."""
    archive = dataclasses.replace(benchmark.archives[0], md5=md5)
    return dataclasses.replace(benchmark, archives=(archive,), splits=splits, **changes)


def with_archive_md5(archive: Archive, key: str, md5: str) -> Archive:
    """Return an archive of ImageNet that torchvision checks by this MD5 instead of the published one."""
    assert archive.unpack is not None

    def unpack(root: str) -> None:
        with mock.patch.dict(ARCHIVE_META, {key: (archive.name, md5)}):
            archive.unpack(root)

    return dataclasses.replace(archive, md5=md5, unpack=unpack)


def cifar(name: str, root: Path) -> Built:
    """Build cifar10 with five batches of four images of each class, or cifar100 with one file of one image of each."""
    dataset, num_classes, batches = {"cifar10": (readers.CIFAR10, 10, 5), "cifar100": (readers.CIFAR100, 100, 1)}[name]
    each = {"train": 4 * batches, "test": 2} if name == "cifar10" else {"train": 1, "test": 1}
    key = "labels" if name == "cifar10" else "fine_labels"
    names = dataset.meta["key"]
    files = {dataset.meta["filename"]: pickle.dumps({names: [f"class {i}" for i in range(num_classes)]}, 2)}
    images = {}
    for seed, (split, listed) in enumerate({"train": dataset.train_list, "test": dataset.test_list}.items()):
        labels = shuffled_labels(num_classes, each[split], seed)
        images[split] = list(zip(crops(len(labels), 32, seed), labels, strict=True))
        size = len(labels) // len(listed)
        for number, (file, _) in enumerate(listed):
            part = images[split][number * size : (number + 1) * size]
            rows = np.stack([pixels.transpose(2, 0, 1).reshape(-1) for pixels, _ in part])
            entry = {
                "data": rows,
                key: [label for _, label in part],
                "coarse_labels": [label // 5 for _, label in part],
            }
            files[file] = pickle.dumps(entry, 2)
    # Not in the order of the batches, which must not depend on the order of an archive's members.
    files = dict(reversed(files.items()))
    archive, folder, md5 = write_both(root, dataset.filename, files, f"{dataset.base_folder}/")
    small = with_md5(dataset, files, md5)
    benchmark = with_files(
        BENCHMARKS[name],
        md5,
        {split: Split.even(num_classes, number) for split, number in each.items()},
        open_split=lambda root, split: readers.open_cifar(small, root, split),
    )
    return Built(benchmark, archive, folder, images)


def stl10(name: str, root: Path) -> Built:
    """Build STL10 with two training and three test images of each class, and some without a label."""
    files = {"class_names.txt": "".join(f"class {label}\n" for label in range(10)).encode()}
    images, each = {}, {"train": 2, "test": 3}
    for seed, split in enumerate(each):
        labels = shuffled_labels(10, each[split], seed)
        images[split] = list(zip(crops(len(labels), 96, seed), labels, strict=True))
        files[f"{split}_X.bin"] = b"".join(pixels.transpose(2, 1, 0).tobytes() for pixels, _ in images[split])
        files[f"{split}_y.bin"] = bytes(label + 1 for label in labels)
    files |= {"unlabeled_X.bin": files["test_X.bin"], "fold_indices.txt": b"0 1 2\n"}
    archive, folder, md5 = write_both(root, STL10.archives[0].name, files, f"{STL10.folders[0]}/")
    small = with_md5(readers.STL10, files, md5)
    benchmark = with_files(
        STL10,
        md5,
        {split: Split.even(10, number) for split, number in each.items()},
        open_split=lambda root, split: readers.open_stl10(small, root, split),
    )
    return Built(benchmark, archive, folder, images)


def cinic10(name: str, root: Path) -> Built:
    """Build CINIC10: two PNGs of each class in every split, as members in no order, without a folder around them."""
    files = {"README.md": b"CINIC-10", "imagenet-contributors.csv": b"", "train/cat/._cifar10-train-7.png": b"of a Mac"}
    images = {}
    splits = {split: Split.even(10, 2) for split in ("train", "valid", "test")}
    for seed, split in enumerate(splits):
        pngs = [image_file(pixels, "PNG") for pixels in crops(20, 32, seed)]
        images[split] = [(data, number // 2) for number, data in enumerate(pngs)]
        paths = [f"{split}/{CINIC10_CLASSES[number // 2]}/cifar10-{split}-{number}.png" for number in range(20)]
        order = np.random.default_rng(seed).permutation(20)
        files |= {paths[number]: pngs[number] for number in order}
        images[split] = [images[split][number] for number in np.argsort(paths)]
    archive, folder, md5 = write_both(root, CINIC10.archives[0].name, files, "./")
    return Built(with_files(CINIC10, md5, splits), archive, folder, images)


def imagenet(name: str, root: Path) -> Built:
    """Build ImageNet with three classes, of 2, 3 and 4 training images and of 2 validation images each."""
    label_of = {wnid: sorted(WNIDS).index(wnid) for wnid in WNIDS}
    inner, folder, train = {}, {}, []
    for number, wnid in enumerate(WNIDS):
        jpegs = {f"{wnid}_{i * 7}.JPEG": image_file(p, "JPEG") for i, p in enumerate(crops(2 + number, 80, number))}
        write_tar(root / f"{wnid}.tar", dict(reversed(jpegs.items())), mode="w:")
        inner[f"{wnid}.tar"] = (root / f"{wnid}.tar").read_bytes()
        folder |= {f"train/{wnid}/{file}": data for file, data in jpegs.items()}
        train += [(label_of[wnid], file, data) for file, data in jpegs.items()]
    truth = [1, 3, 2, 2, 1, 3]
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": image_file(p, "JPEG") for i, p in enumerate(crops(6, 80, 9))}
    wnid_of = dict(zip(val, [WNIDS[number - 1] for number in truth], strict=True))
    folder |= {f"val/{wnid_of[file]}/{file}": data for file, data in val.items()}
    devkit = {"data/meta.mat": _meta_mat(), "data/ILSVRC2012_validation_ground_truth.txt": _lines(truth)}
    contents = {
        "devkit": {"files": devkit, "prefix": "ILSVRC2012_devkit_t12/"},
        "train": {"files": inner, "mode": "w:"},
        "val": {"files": dict(reversed(val.items())), "mode": "w:"},
    }
    archives = []
    for key, archive in zip(contents, IMAGENET.archives, strict=True):
        md5 = write_tar(root / "archives" / archive.name, **contents[key])
        archives.append(with_archive_md5(archive, key, md5))
    write_folder(root / "unpacked", folder)
    images = {
        "train": [(data, label) for label, _, data in sorted(train)],
        "test": [(data, label) for label, _, data in sorted((label_of[wnid_of[f]], f, d) for f, d in val.items())],
    }
    benchmark = dataclasses.replace(
        IMAGENET,
        archives=tuple(archives),
        num_classes=3,
        splits={"train": Split(9, 2, 4), "test": Split.even(3, 2)},
    )
    return Built(benchmark, root / "archives", root / "unpacked", images)


def _lines(numbers: list[int]) -> bytes:
    return "".join(f"{number}\n" for number in numbers).encode()


def _meta_mat() -> bytes:
    """Return the development kit's `synsets`, one struct a row: the classes, then a group of classes."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [(number + 1, wnid, "a, b", "a thing", 0, np.zeros(0), 0) for number, wnid in enumerate(WNIDS)]
    rows.append((4, "n00001740", "entity", "all things", 3, np.array([1, 2, 3]), 1))
    synsets = np.zeros((len(rows), 1), dtype=[(field, object) for field in fields])
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


BUILD = {"cifar10": cifar, "cifar100": cifar, "stl10": stl10, "cinic10": cinic10, "imagenet": imagenet}
