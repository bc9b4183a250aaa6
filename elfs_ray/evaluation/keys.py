"""Every key of an evaluation of finished runs (jobs/evaluate.py)."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from elfs_ray.config.declaration import BATCH, POSITIVE, Bounds, option, precision_option

METHODS = {
    "random": "drawn uniformly, anew for each seed",
    "prototypicality": "farthest from their k-means centroid",
    "d2": "D2 pruning over the run's neighbours, without labels",
    "zcore": "ZCore: covers the embeddings; once for all seeds",
    "aum_hardest": "lowest AUM of the pseudo-labels",
    "elfs": "what the run selects by, at each budget",
    "elfs_auto": "the same, the hard fraction chosen from the run's records",
    "elfs_search": "the same, the hard fraction searched by short trainings on pseudo-labels",
    "dual": "DUAL with Beta sampling, on pseudo-labels, anew for each seed",
    "badge": "BADGE: labels bought round by round, the network trained on those bought so far; once for all seeds",
    "aum_ccs": "true labels: CCS over AUM, anew for each seed",
    "el2n": "true labels: highest EL2N",
    "forgetting": "true labels: most forgotten",
    "full": "all images, once whatever the budgets",
}
PUBLISHED_POOLS = ("cifar10", "cifar100", "imagenet")


@dataclass
class LabelConfig:
    """Where the pool's true labels are."""

    label: str | None = option(
        None,
        "a Parquet column of integers, 'folder' for the name of an image's folder, 'cls' for WebDataset; null takes "
        "the labels that the first run copied",
    )


@dataclass
class BadgeConfig:
    """BADGE's rounds."""

    rounds: int = option(4, "rounds from each budget to the next larger one", unit="rounds", bounds=POSITIVE)
    iterations: int | None = option(
        None, "steps of a round's training; null takes a quarter of iterations", unit="steps", bounds=POSITIVE
    )


@dataclass
class ProxyConfig:
    """The supervised proxy of aum_ccs, el2n and forgetting: the first run's network and settings, linear ones, too."""

    num_workers: int | None = option(
        None, "data-parallel workers; null takes one a GPU, or one CPU worker", bounds=POSITIVE
    )
    ccs_hard_fraction: Any = option(
        0.1,
        "aum_ccs: share of the whole pool dropped as too hard; [...] gives one for each budget",
        unit="fraction",
        bounds=Bounds(at_least=0, below=1),
    )


@dataclass
class ComparisonConfig:
    """Training from scratch with true labels on what each method selects of a pool, at each budget, with each seed."""

    runs: list[str] = option(MISSING, "run directories of one pool, complete up to select", is_path=True)
    out: str = option(MISSING, "where selections, trainings and results go; local path, s3:// or gs://", is_path=True)
    test_uri: str = option(
        MISSING, "labelled images to test on, stored as the pool is; no selection sees them", is_path=True
    )
    methods: list[str] = option(
        ["random", "prototypicality", "d2", "aum_hardest", "elfs"],
        f"{', '.join(METHODS)}; a method of the runs can be given other keys of select, as in "
        "elfs+score=el2n+hard_fraction=0.2+balance=true",
    )
    budgets: list[Any] = option(
        [0.1, 0.2, 0.3, 0.5, 0.7],
        "samples to train on: fractions of the embedded images or integer counts",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    hard_fraction: Any = option(
        "run",
        "elfs: the hard fraction, or auto or search; [...] gives one for each budget; run takes the run's own",
        unit="fraction",
        choices=("run", "auto", "search"),
        bounds=Bounds(at_least=0, below=1),
    )
    seeds: int = option(3, "trainings of each selection", bounds=POSITIVE)
    network: str = option("resnet18", "resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50, small_cnn")
    iterations: int = option(40_000, "steps of every training, whatever the budget", unit="steps", bounds=POSITIVE)
    batch_size: int = option(256, "images a step", unit="images", bounds=BATCH)
    lr: float = option(0.1, "SGD learning rate at the start of the cosine", bounds=Bounds(above=0))
    num_tests: int = option(10, "tests of each training, the last at its end", bounds=POSITIVE)
    precision: str = precision_option()
    published: str | None = option(
        None, "put the paper's numbers of this pool beside the measured ones", choices=PUBLISHED_POOLS
    )
    device: str = option(
        "auto", "where trainings run; auto takes GPUs if the cluster has any", choices=("auto", "cpu", "cuda")
    )
    gpus_per_training: float = option(
        0.25, "share of a GPU that each training holds: 0.25 packs four on one", unit="GPUs", bounds=Bounds(above=0)
    )
    cpus_per_training: int = option(1, "CPUs that each training holds; threads without a GPU", bounds=POSITIVE)
    ray_address: str | None = option(
        None,
        "Ray cluster to use; null takes RAY_ADDRESS, else a cluster on this machine, else starts one; 'local' always "
        "starts one",
    )
    ray_logs: bool = option(False, "show what Ray's workers print, too")
    pool: LabelConfig = field(default_factory=LabelConfig)
    badge: BadgeConfig = field(default_factory=BadgeConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
