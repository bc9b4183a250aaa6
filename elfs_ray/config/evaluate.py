"""Keys of section evaluate: how good a coreset is, measured by training on it with true labels."""

from dataclasses import dataclass, field
from typing import Any

from elfs_ray.config.declaration import BATCH, POSITIVE, PROXY_SIDE, Bounds, compile_option, option, precision_option

EVALUATED_METHODS = (
    *("run", "auto", "coverage"),
    *("random", "prototypicality", "d2", "zcore", "kmeans_centres", "typiclust", "aum_hardest"),
    *("elfs", "elfs_auto", "elfs_search", "dual", "badge", "aum_ccs", "el2n", "forgetting", "full"),
)
LINEAR_PROBE = "linear_probe"  # the one that learns from embeddings instead of images
PAPERS_METHOD = "double_end"  # the select.method that is ELFS as in the paper
PUBLISHED_POOLS = ("cifar10", "cifar100", "imagenet")


def name_in_tables(method: str) -> str:
    """Return how the tables of an evaluation name the selection of a run with this select.method."""
    return "elfs" if method == PAPERS_METHOD else method


@dataclass
class BadgeConfig:
    """Rounds of active learning by BADGE."""

    rounds: int = option(4, "number of rounds from each budget to the next larger one", unit="rounds", bounds=POSITIVE)
    iterations: int | None = option(
        None,
        "steps of the training in each round; null means a quarter of evaluate.iterations",
        unit="steps",
        bounds=POSITIVE,
    )


@dataclass
class ProxyConfig:
    """Training of the supervised proxy for aum_ccs, el2n and forgetting, with the train keys of the first run."""

    num_workers: int | None = option(
        None, "number of data-parallel workers; null means one for each GPU, or one on CPUs", bounds=POSITIVE
    )
    ccs_hard_fraction: Any = option(
        0.1,
        "for aum_ccs: fraction of the whole pool to drop from the hard end; a list gives one for each budget",
        unit="fraction",
        bounds=Bounds(at_least=0, below=1),
    )


@dataclass
class EvaluateConfig:
    """Learning from the selection of each method with true labels, for each budget and seed.

    Settings of networks without a key here, such as augmentation and weight decay, are those of the proxy network. A
    linear probe has no settings: it ignores the keys from image_size to compile.
    """

    test_uri: str | None = option(
        None,
        "labelled test images, in the format of the pool, never seen by a selection; null means no evaluation",
        is_path=True,
    )
    methods: list[str] = option(
        ["run", "random"],
        f"{', '.join(EVALUATED_METHODS)}; run is the selection that the run made, and is named after its method; keys "
        "of select may follow a method that selects from a run, as in elfs+score=el2n+hard_fraction=0.2+balance=true",
    )
    num_seeds: int = option(
        3, "number of trainings for each selection; random also selects anew for each", bounds=POSITIVE
    )
    network: str = option(
        "auto",
        "linear_probe: logistic regression on the run's embeddings, in seconds; a network trained from scratch: "
        "resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50 or small_cnn; auto: resnet18 on GPUs, if "
        "the run keeps copies of its images, else linear_probe",
    )
    image_size: int | None = option(
        None,
        "side of the square images that a network from scratch learns from; null means the size of the run's copies, "
        "embed.proxy_image_size",
        unit="pixels",
        bounds=PROXY_SIDE,
    )
    iterations: int = option(40_000, "steps of each training, whatever the budget", unit="steps", bounds=POSITIVE)
    batch_size: int = option(256, "images in one step", unit="images", bounds=BATCH)
    lr: float = option(0.1, "SGD learning rate at the start of the cosine decay", bounds=Bounds(above=0))
    num_tests: int = option(10, "number of tests during each training, the last one at its end", bounds=POSITIVE)
    precision: str = precision_option()
    compile: bool = compile_option()
    published: str | None = option(
        None, "show the paper's numbers for this pool next to the measured ones", choices=PUBLISHED_POOLS
    )
    device: str = option(
        "auto", "device on which trainings run; auto uses GPUs if the cluster has any", choices=("auto", "cpu", "cuda")
    )
    gpus_per_training: float = option(
        0.25, "fraction of a GPU for each training; 0.25 runs four on one GPU", unit="GPUs", bounds=Bounds(above=0)
    )
    cpus_per_training: int = option(
        1, "CPUs for each training, which uses as many threads if it has no GPU", bounds=POSITIVE
    )
    badge: BadgeConfig = field(default_factory=BadgeConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
