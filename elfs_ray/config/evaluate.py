"""evaluate.*: how good a coreset is, measured by training on it with true labels."""

from dataclasses import dataclass, field
from typing import Any

from elfs_ray.config.declaration import BATCH, POSITIVE, Bounds, option, precision_option

EVALUATED_METHODS = (
    *("random", "prototypicality", "d2", "zcore", "aum_hardest", "elfs", "elfs_auto", "elfs_search", "dual"),
    *("badge", "aum_ccs", "el2n", "forgetting", "full"),
)
PUBLISHED_POOLS = ("cifar10", "cifar100", "imagenet")


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
class EvaluateConfig:
    """Train from scratch with true labels on what each method selects, at each budget, with each seed.

    What is not said here, such as augmentation and weight decay, is as the proxy network was trained.
    """

    test_uri: str | None = option(
        None,
        "labelled images to test on, stored as the pool is, which no selection sees; null evaluates nothing",
        is_path=True,
    )
    methods: list[str] = option(
        ["elfs", "random"],
        f"{', '.join(EVALUATED_METHODS)}; a method that selects from a run takes other keys of select behind it, as in "
        "elfs+score=el2n+hard_fraction=0.2+balance=true",
    )
    num_seeds: int = option(3, "trainings of each selection; random selects anew for each", bounds=POSITIVE)
    network: str = option("resnet18", "resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50, small_cnn")
    iterations: int = option(40_000, "steps of every training, whatever the budget", unit="steps", bounds=POSITIVE)
    batch_size: int = option(256, "images a step", unit="images", bounds=BATCH)
    lr: float = option(0.1, "SGD learning rate at the start of the cosine", bounds=Bounds(above=0))
    num_tests: int = option(10, "tests of each training, the last at its end", bounds=POSITIVE)
    precision: str = precision_option()
    published: str | None = option(
        None, "put the paper's numbers of this pool next to the measured ones", choices=PUBLISHED_POOLS
    )
    device: str = option(
        "auto", "where trainings run; auto takes GPUs if the cluster has any", choices=("auto", "cpu", "cuda")
    )
    gpus_per_training: float = option(
        0.25, "share of a GPU that each training holds: 0.25 packs four on one", unit="GPUs", bounds=Bounds(above=0)
    )
    cpus_per_training: int = option(1, "CPUs that each training holds; threads without a GPU", bounds=POSITIVE)
    badge: BadgeConfig = field(default_factory=BadgeConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
