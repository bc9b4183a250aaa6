"""The five benchmarks in the layouts in which their owners publish them, with a few real pixels in them.

Each builder writes an archive (ImageNet: a folder of three) and the folder that it unpacks to, and returns the small
benchmark that describes them.
"""

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from sklearn.datasets import load_sample_images

from elfs_ray.datasets.published import BENCHMARKS, Archive, Benchmark, Split

WNIDS = ("n02119789", "n01440764", "n03014705")  # in the order of the development kit's numbers, not of the ids


@dataclass(frozen=True)
class Built:
    """archive: what is downloaded (a folder of archives for ImageNet); folder: the same unpacked.

    images: (pixels or file, label) of each split, in the order in which the pool has them.
    """

    benchmark: Benchmark
    archive: Path
    folder: Path
    images: dict[str, list[tuple[np.ndarray | bytes, int]]]


def crops(num_images: int, side: int, seed: int) -> list[np.ndarray]:
    """(side, side, 3) uint8 crops of a photograph: no two alike, none the same when turned or mirrored."""
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
    """Write a tar; its MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo(prefix or ".")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _finish(
    name: str, root: Path, files: Mapping[str, bytes], splits: Mapping[str, Split], images, prefix: str, **fields
) -> Built:
    known = BENCHMARKS[name]
    archive = root / known.archives[0].name
    md5 = write_tar(archive, files, prefix)
    folder = root / "unpacked" / known.folder
    write_folder(folder, files)
    archives = (dataclasses.replace(known.archives[0], md5=md5),)
    benchmark = dataclasses.replace(known, archives=archives, splits=dict(splits), **fields)
    return Built(benchmark, archive, folder, images)


def cifar(name: str, root: Path) -> Built:
    """cifar10: five batches of four images of each class; cifar100: one file of one image of each."""
    num_classes, batches = (10, 5) if name == "cifar10" else (100, 1)
    each = {"train": 4 * batches, "test": 2} if name == "cifar10" else {"train": 1, "test": 1}
    files, images = {}, {}
    for seed, split in enumerate(("train", "test")):
        labels = shuffled_labels(num_classes, each[split], seed)
        pixels = crops(len(labels), 32, seed)
        images[split] = list(zip(pixels, labels, strict=True))
        records = [
            bytes([label] if name == "cifar10" else [label // 5, label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in images[split]
        ]
        names = {
            ("cifar10", "train"): [f"data_batch_{number}.bin" for number in range(1, 6)],
            ("cifar10", "test"): ["test_batch.bin"],
        }.get((name, split), [f"{split}.bin"])
        size = len(records) // len(names)
        files |= {file: b"".join(records[i * size : (i + 1) * size]) for i, file in enumerate(names)}
    class_names = "".join(f"class {label}\n" for label in range(num_classes)).encode()
    files |= (
        {"batches.meta.txt": class_names + b"\n", "readme.html": b"<html/>"}
        if name == "cifar10"
        else {"coarse_label_names.txt": b"a\nb\n", "fine_label_names.txt": class_names}
    )
    splits = {split: Split.even(num_classes, number) for split, number in each.items()}
    # Not in the order of the batches: an archive's members have none.
    return _finish(
        name, root, dict(reversed(files.items())), splits, images, prefix=f"{BENCHMARKS[name].folder}/", pickled=None
    )


def stl10(name: str, root: Path) -> Built:
    """Two and three images of each class, and some without a label."""
    files = {"class_names.txt": "\n".join(f"class {label}" for label in range(10)).encode()}
    images, splits = {}, {"train": Split.even(10, 2), "test": Split.even(10, 3)}
    for seed, (split, known) in enumerate(splits.items()):
        labels = shuffled_labels(10, known.most_of_class, seed)
        images[split] = list(zip(crops(len(labels), 96, seed), labels, strict=True))
        files[f"{split}_X.bin"] = b"".join(pixels.transpose(2, 1, 0).tobytes() for pixels, _ in images[split])
        files[f"{split}_y.bin"] = bytes(label + 1 for label in labels)
    files |= {"unlabeled_X.bin": files["test_X.bin"], "fold_indices.txt": b"0 1 2\n"}
    known = BENCHMARKS[name].file_md5
    md5 = {file: hashlib.md5(files[file]).hexdigest() for file in known}
    return _finish(name, root, files, splits, images, prefix=f"{BENCHMARKS[name].folder}/", file_md5=md5)


def cinic10(name: str, root: Path) -> Built:
    """Two PNGs of each class in every split; members in no order, no folder around them."""
    from elfs_ray.datasets.cinic10 import CLASSES

    files = {"README.md": b"CINIC-10", "imagenet-contributors.csv": b"", "train/cat/._cifar10-train-7.png": b"of a Mac"}
    images = {}
    splits = {split: Split.even(10, 2) for split in ("train", "valid", "test")}
    for seed, split in enumerate(splits):
        own = [image_file(pixels, "PNG") for pixels in crops(20, 32, seed)]
        images[split] = [(data, number // 2) for number, data in enumerate(own)]
        paths = [f"{split}/{CLASSES[number // 2]}/cifar10-{split}-{number}.png" for number in range(20)]
        order = np.random.default_rng(seed).permutation(20)
        files |= {paths[number]: own[number] for number in order}
        images[split] = [images[split][number] for number in np.argsort(paths)]
    return _finish(name, root, files, splits, images, prefix="./")


def imagenet(name: str, root: Path) -> Built:
    """Three classes, of 2, 3 and 4 training images and 2 validation images each."""
    label_of = {wnid: sorted(WNIDS).index(wnid) for wnid in WNIDS}
    inner, folder, train = {}, {}, []
    for number, wnid in enumerate(WNIDS):
        own = {f"{wnid}_{i * 7}.JPEG": image_file(p, "JPEG") for i, p in enumerate(crops(2 + number, 80, number))}
        write_tar(root / f"{wnid}.tar", dict(reversed(own.items())), mode="w:")
        inner[f"{wnid}.tar"] = (root / f"{wnid}.tar").read_bytes()
        folder |= {f"train/{wnid}/{file}": data for file, data in own.items()}
        train += [(label_of[wnid], file, data) for file, data in own.items()]
    truth = [1, 3, 2, 2, 1, 3]
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": image_file(p, "JPEG") for i, p in enumerate(crops(6, 80, 9))}
    wnid_of = dict(zip(val, [WNIDS[number - 1] for number in truth], strict=True))
    folder |= {f"val/{wnid_of[file]}/{file}": data for file, data in val.items()}
    devkit = {"data/meta.mat": _meta_mat(), "data/ILSVRC2012_validation_ground_truth.txt": _lines(truth)}
    known = [archive.name for archive in BENCHMARKS[name].archives]
    md5 = [
        write_tar(root / "archives" / known[0], inner, mode="w:"),
        write_tar(root / "archives" / known[1], dict(reversed(val.items())), mode="w:"),
        write_tar(root / "archives" / known[2], devkit, prefix="ILSVRC2012_devkit_t12/"),
    ]
    write_folder(root / "unpacked", folder)
    images = {
        "train": [(data, label) for label, _, data in sorted(train)],
        "test": [(data, label) for label, _, data in sorted((label_of[wnid_of[f]], f, d) for f, d in val.items())],
    }
    benchmark = dataclasses.replace(
        BENCHMARKS[name],
        archives=tuple(Archive(*pair) for pair in zip(known, md5, strict=True)),
        num_classes=3,
        splits={"train": Split(9, 2, 4), "test": Split.even(3, 2)},
    )
    return Built(benchmark, root / "archives", root / "unpacked", images)


def _lines(numbers: list[int]) -> bytes:
    return "".join(f"{number}\n" for number in numbers).encode()


def _meta_mat() -> bytes:
    """`synsets`, one struct a row, as in the development kit: the classes, then a group of them."""
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
