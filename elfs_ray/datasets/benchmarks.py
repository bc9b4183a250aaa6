"""Describe the five benchmarks: their archives, their counts, and how torchvision reads them.

torchvision knows the archives' names, MD5s and addresses, and reads the files in their published order. CIFAR and STL10
number their classes themselves; those of CINIC10 and ImageNet are numbered by the sorted names of their folders.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.imagenet import ARCHIVE_META, parse_devkit_archive, parse_train_archive, parse_val_archive

TRAIN, VALID, TEST = "train", "valid", "test"


class SourceError(ValueError):
    """Say that a source is not what was published, what is needed instead, and where to get it."""


@dataclass(frozen=True)
class Archive:
    """A file that the owner publishes.

    url: None where the owner asks for a login first. unpack: torchvision's function that checks and unpacks the archive
    in the folder where it lies; None for a tar.gz that only has to be extracted.
    """

    name: str
    md5: str
    url: str | None = None
    unpack: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Split:
    """Count the images of a split, and those of its smallest and its largest class."""

    num_images: int
    fewest_of_class: int
    most_of_class: int

    @classmethod
    def even(cls, num_classes: int, each: int) -> "Split":
        return cls(num_classes * each, each, each)


@dataclass(frozen=True)
class Benchmark:
    """Describe a benchmark.

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
    def needed(self) -> str:
        """Say what to give and where to get it, as the end of every message about a bad source."""
        archives = ", ".join(archive.name for archive in self.archives)
        folders = "/, ".join(self.folders) + "/"
        if any(archive.url is None for archive in self.archives):
            return (
                f"needed: source=FOLDER with {archives}, which {self.page} offers after signing in, or with {folders} "
                "that hold a folder for each class"
            )
        return f"needed: source={archives} from {self.page}, a folder with it or with {folders}, or source=download"


def encode_png(image: Image.Image) -> bytes:
    """Return the image as a PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def open_image_folder(folder: Path) -> ImageFolder:
    """Return the image files of class folders, as they are, by class and name."""

    def is_image(path: str) -> bool:
        # A Mac's archiver adds a hidden ._x.png to x.png, which is no image.
        return path.lower().endswith(IMG_EXTENSIONS) and not Path(path).name.startswith(".")

    return ImageFolder(str(folder), loader=lambda path: Path(path).read_bytes(), is_valid_file=is_image)


def cifar(dataset: type[CIFAR10], num_classes: int, train: int, test: int) -> Benchmark:
    """Describe CIFAR10 or CIFAR100, with `train` and `test` images of each class.

    What is read is the owner's Python version. Pickles can run code: torchvision checks the MD5 of every file before it
    unpickles one.
    """
    return Benchmark(
        name=f"cifar{num_classes}",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        archives=(Archive(dataset.filename, dataset.tgz_md5, dataset.url),),
        folders=(dataset.base_folder,),
        num_classes=num_classes,
        splits={TRAIN: Split.even(num_classes, train), TEST: Split.even(num_classes, test)},
        open_split=lambda root, split: dataset(str(root), train=split == TRAIN, transform=encode_png),
    )


def stl10(dataset: type[STL10], train: int, test: int) -> Benchmark:
    """Describe STL10's labelled images, `train` and `test` of each class; its 100,000 unlabelled ones are left out."""

    def open_split(root: Path, split: str) -> Any:
        images: Any = dataset(str(root), split=split, transform=encode_png)
        images.targets = images.labels  # the name that the other datasets have for them
        return images

    return Benchmark(
        name="stl10",
        page="https://cs.stanford.edu/~acoates/stl10/",
        archives=(Archive(dataset.filename, dataset.tgz_md5, dataset.url),),
        folders=(dataset.base_folder,),
        num_classes=10,
        splits={TRAIN: Split.even(10, train), TEST: Split.even(10, test)},
        open_split=open_split,
    )


def _imagenet_archive(key: str, unpack: Callable[[str], None]) -> Archive:
    name, md5 = ARCHIVE_META[key]
    return Archive(name, md5, unpack=unpack)


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
    open_split=lambda root, split: open_image_folder(root / split),
)

IMAGENET = Benchmark(
    name="imagenet",
    page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
    archives=(
        # The development kit first: it says which class each validation image is of.
        _imagenet_archive("devkit", parse_devkit_archive),
        _imagenet_archive("train", parse_train_archive),
        _imagenet_archive("val", parse_val_archive),
    ),
    folders=("train", "val"),
    num_classes=1_000,
    # The labels of the test images were never published: the validation images are tested on.
    splits={TRAIN: Split(1_281_167, 732, 1_300), TEST: Split.even(1_000, 50)},
    open_split=lambda root, split: open_image_folder(root / {TRAIN: "train", TEST: "val"}[split]),
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        cifar(CIFAR10, 10, 5_000, 1_000),
        cifar(CIFAR100, 100, 500, 100),
        stl10(STL10, 500, 800),
        CINIC10,
        IMAGENET,
    )
}
