"""Read the unpacked benchmarks with torchvision, as datasets of (bytes of an image file, label).

Each reader takes the folder around what an archive unpacks to, and the name of a split. Its dataset also has `classes`
and `targets`. Importing this module takes seconds: import it where an archive is opened.
"""

from pathlib import Path
from typing import Any

from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision
from elfs_ray.pool.images import encode_png

# isort: split
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.imagenet import parse_devkit_archive, parse_train_archive, parse_val_archive

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "open_cifar",
    "open_image_folder",
    "open_stl10",
    "parse_devkit_archive",
    "parse_train_archive",
    "parse_val_archive",
]


def open_cifar(dataset: type[CIFAR10], root: Path, split: str) -> CIFAR10:
    """Open a split of CIFAR10 or of CIFAR100, whose class in torchvision is a subclass of CIFAR10.

    This reads the Python version, and pickles can run code. torchvision checks the MD5 of every file before it
    unpickles one. Raises RuntimeError for a file that is missing or changed.
    """
    return dataset(str(root), train=split == "train", transform=encode_png)


def open_stl10(dataset: type[STL10], root: Path, split: str) -> Any:
    """Open a split of STL10's labelled images. Raises RuntimeError for a file that is missing or changed."""
    images: Any = dataset(str(root), split=split, transform=encode_png)
    images.targets = images.labels  # every other dataset calls them `targets`
    return images


def open_image_folder(folder: Path) -> ImageFolder:
    """Open a folder of class folders: the image files, byte for byte, sorted by class and name.

    Raises FileNotFoundError where it has no class folder, or a class folder has no image.
    """

    def is_image(path: str) -> bool:
        # The archiver of macOS adds a hidden ._x.png to x.png, which is not an image.
        return path.lower().endswith(IMG_EXTENSIONS) and not Path(path).name.startswith(".")

    return ImageFolder(str(folder), loader=lambda path: Path(path).read_bytes(), is_valid_file=is_image)
