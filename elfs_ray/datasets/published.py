"""What the owners of the benchmarks publish: archives with their MD5, images of each split and class, addresses.

MD5 is what they give. It tells a file that is cut short or another from the right one; it is no defence against a
forger, and none is needed: nothing in an archive is run, and no path in one is followed.
"""

from dataclasses import dataclass

TRAIN, VALID, TEST = "train", "valid", "test"


class SourceError(ValueError):
    """A source that is not what was published; the message says what it is, what is needed and where that is had."""


@dataclass(frozen=True)
class Archive:
    """A file of the owner's page. url: where it can be had directly; None where the owner asks for a login first."""

    name: str
    md5: str
    url: str | None = None


@dataclass(frozen=True)
class Split:
    """The images of a split, and the fewest and the most of one class."""

    num_images: int
    fewest_of_class: int
    most_of_class: int

    @classmethod
    def even(cls, num_classes: int, each: int) -> "Split":
        return cls(num_classes * each, each, each)


@dataclass(frozen=True)
class Benchmark:
    """A published set. folder: what its archive unpacks to; file_md5: of files in it, where those are known."""

    name: str
    page: str
    folder: str
    archives: tuple[Archive, ...]
    num_classes: int
    splits: dict[str, Split]
    file_md5: dict[str, str] | None = None
    pickled: Archive | None = None  # the same set as Python pickles, which can run code and are refused
    pickled_folder: str = ""

    @property
    def downloads(self) -> bool:
        """Whether the owner lets anybody download it."""
        return all(archive.url for archive in self.archives)

    def needed(self) -> str:
        """What to give, and where to get it: the end of every message about a bad source."""
        names = ", ".join(archive.name for archive in self.archives)
        if self.name == "imagenet":
            return (
                f"needed: source=FOLDER with {names}, to be had at {self.page} after signing in there, or with train/ "
                "and val/ that hold a folder for each class"
            )
        return f"needed: source={names} of {self.page}, the folder that it unpacks to, or source=download"


_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR_FILES = "https://www.cs.toronto.edu/~kriz/"

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="cifar10",
            page=_CIFAR_PAGE,
            folder="cifar-10-batches-bin",
            archives=(
                Archive(
                    "cifar-10-binary.tar.gz",
                    "c32a1d4ab5d03f1284b67883e8d87530",
                    _CIFAR_FILES + "cifar-10-binary.tar.gz",
                ),
            ),
            num_classes=10,
            splits={TRAIN: Split.even(10, 5_000), TEST: Split.even(10, 1_000)},
            pickled=Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            pickled_folder="cifar-10-batches-py",
        ),
        Benchmark(
            name="cifar100",
            page=_CIFAR_PAGE,
            folder="cifar-100-binary",
            archives=(
                Archive(
                    "cifar-100-binary.tar.gz",
                    "03b5dce01913d631647c71ecec9e9cb8",
                    _CIFAR_FILES + "cifar-100-binary.tar.gz",
                ),
            ),
            num_classes=100,
            splits={TRAIN: Split.even(100, 500), TEST: Split.even(100, 100)},
            pickled=Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            pickled_folder="cifar-100-python",
        ),
        Benchmark(
            name="stl10",
            page="https://cs.stanford.edu/~acoates/stl10/",
            folder="stl10_binary",
            archives=(
                Archive(
                    "stl10_binary.tar.gz",
                    "91f7769df0f17e558f3565bffb0c7dfb",
                    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                ),
            ),
            num_classes=10,
            splits={TRAIN: Split.even(10, 500), TEST: Split.even(10, 800)},
            file_md5={
                "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
                "train_y.bin": "5a34089d4802c674881badbb80307741",
                "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
                "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
            },
        ),
        Benchmark(
            name="cinic10",
            page="https://datashare.ed.ac.uk/handle/10283/3192",
            folder="CINIC-10",
            archives=(
                Archive(
                    "CINIC-10.tar.gz",
                    "6ee4d0c996905fe93221de577967a372",
                    "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
                ),
            ),
            num_classes=10,
            splits={name: Split.even(10, 9_000) for name in (TRAIN, VALID, TEST)},
        ),
        Benchmark(
            name="imagenet",
            page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
            folder="",
            archives=(
                Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"),
                Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"),
                Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
            ),
            num_classes=1_000,
            splits={TRAIN: Split(1_281_167, 732, 1_300), TEST: Split.even(1_000, 50)},
        ),
    )
}
