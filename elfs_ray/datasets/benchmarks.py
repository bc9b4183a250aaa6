"""Describe the five benchmarks: their archives, their counts, and how to read them.

torchvision reads the files in their published order. CIFAR and STL10 number their classes themselves; those of CINIC10
and ImageNet are numbered by the sorted names of their folders.

The names, MD5s and addresses of the archives are those of torchvision, copied here because importing torchvision takes
seconds and `--help` prints them. Only what opens an archive imports it, inside the functions below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN, VALID, TEST = "train", "valid", "test"


class SourceError(ValueError):
    """A source that is not what was published. The message says what to give instead and where to get it."""


@dataclass(frozen=True)
class Archive:
    """A file that the owner publishes.

    url: None where the owner requires a login. unpack: function that checks the MD5 of the archive in a folder and
    unpacks it there, raising RuntimeError for another MD5; None for a tar.gz that only has to be extracted.
    """

    name: str
    md5: str
    url: str | None = None
    unpack: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Split:
    """The number of images in a split, in its smallest class and in its largest class."""

    num_images: int
    fewest_of_class: int
    most_of_class: int

    @classmethod
    def even(cls, num_classes: int, each: int) -> "Split":
        """Return the counts of a split whose classes all have `each` images."""
        return cls(num_classes * each, each, each)


@dataclass(frozen=True)
class Benchmark:
    """A published dataset with a training and a test split.

    folders: what its archives unpack to. open_split: takes the folder around these and the name of a split, returns a
    torchvision dataset of (bytes of an image file, label) with its `classes` and `targets`.
    """

    name: str
    page: str
    archives: tuple[Archive, ...]
    folders: tuple[str, ...]
    num_classes: int
    splits: dict[str, Split]
    open_split: Callable[[Path, str], Any]

    @property
    def valid_sources(self) -> str:
        """Return what `source` may be and where to get it; every message about a bad source ends with it."""
        archives = ", ".join(archive.name for archive in self.archives)
        folders = "/, ".join(self.folders) + "/"
        if any(archive.url is None for archive in self.archives):
            return (
                f"source=FOLDER with {archives}, which {self.page} offers after signing in, or with {folders} "
                "that hold a folder for each class"
            )
        return f"source={archives} from {self.page}, a folder with it or with {folders}, or source=download"


def _readers() -> Any:
    """Import `readers`, and torchvision with it, only where an archive or a folder is opened."""
    from elfs_ray.datasets import readers

    return readers


def _cifar(num_classes: int, md5: str, folder: str, open_split: Callable[[Path, str], Any]) -> Benchmark:
    name = f"cifar-{num_classes}"
    archive = Archive(f"{name}-python.tar.gz", md5, f"https://www.cs.toronto.edu/~kriz/{name}-python.tar.gz")
    return Benchmark(
        name=f"cifar{num_classes}",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        archives=(archive,),
        folders=(folder,),
        num_classes=num_classes,
        splits={
            TRAIN: Split.even(num_classes, 50_000 // num_classes),
            TEST: Split.even(num_classes, 10_000 // num_classes),
        },
        open_split=open_split,
    )


CIFAR10 = _cifar(
    10,
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    lambda root, split: _readers().open_cifar(_readers().CIFAR10, root, split),
)
CIFAR100 = _cifar(
    100,
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
    lambda root, split: _readers().open_cifar(_readers().CIFAR100, root, split),
)

STL10 = Benchmark(
    name="stl10",
    page="https://cs.stanford.edu/~acoates/stl10/",
    archives=(
        Archive(
            "stl10_binary.tar.gz",
            "91f7769df0f17e558f3565bffb0c7dfb",
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        ),
    ),
    folders=("stl10_binary",),
    num_classes=10,
    # The 100,000 unlabelled images are left out: nothing could be evaluated on them.
    splits={TRAIN: Split.even(10, 500), TEST: Split.even(10, 800)},
    open_split=lambda root, split: _readers().open_stl10(_readers().STL10, root, split),
)

CINIC10 = Benchmark(
    name="cinic10",
    page="https://datashare.ed.ac.uk/handle/10283/3192",
    archives=(
        Archive(
            "CINIC-10.tar.gz",
            "6ee4d0c996905fe93221de577967a372",
            "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
        ),
    ),
    folders=(TRAIN, VALID, TEST),
    num_classes=10,
    splits={name: Split.even(10, 9_000) for name in (TRAIN, VALID, TEST)},
    open_split=lambda root, split: _readers().open_image_folder(root / split),
)

IMAGENET = Benchmark(
    name="imagenet",
    page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
    archives=(
        # Unpacked in this order: the development kit says which class each validation image is of.
        Archive(
            "ILSVRC2012_devkit_t12.tar.gz",
            "fa75699e90414af021442c21a62c3abf",
            unpack=lambda folder: _readers().parse_devkit_archive(folder),
        ),
        Archive(
            "ILSVRC2012_img_train.tar",
            "1d675b47d978889d74fa0da5fadfb00e",
            unpack=lambda folder: _readers().parse_train_archive(folder),
        ),
        Archive(
            "ILSVRC2012_img_val.tar",
            "29b22e2961454d5413ddabcf34fc5622",
            unpack=lambda folder: _readers().parse_val_archive(folder),
        ),
    ),
    folders=("train", "val"),
    num_classes=1_000,
    # The labels of the test images were never published, so models are tested on the validation images.
    splits={TRAIN: Split(1_281_167, 732, 1_300), TEST: Split.even(1_000, 50)},
    open_split=lambda root, split: _readers().open_image_folder(root / {TRAIN: "train", TEST: "val"}[split]),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (CIFAR10, CIFAR100, STL10, CINIC10, IMAGENET)}
