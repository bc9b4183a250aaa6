"""Every key a job takes: one dataclass a stage.

A key is declared once, by `option`: its default, what it means, its unit, the values it may have, and whether it
decides the stage's result. Keys that do not (numbers of workers, batch sizes that only change speed) may differ between
a run and its continuation.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

STAGE_NAMES = ("index", "copy", "pretrain", "embed", "cluster", "train", "select", "report")
PRETRAINING = ("copy", "pretrain")  # stages of a run that trains its own encoder
SELF_SUPERVISED = "self_supervised"
SELECT_METHODS = (
    "double_end",
    "hardest",
    "easiest",
    "stratified",
    "random",
    "dual_beta",
    "prototypicality",
    "d2",
    "zcore",
)
USES_HARD_FRACTION = ("double_end", "stratified")
FIND_HARD_FRACTION = ("auto", "search")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key, what it was given and what it needs."""


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key may have; None where there is no limit."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        signs = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)

    def allow(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(
    default: Any,
    help_text: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    bounds: Bounds | None = None,
    decides: bool = True,
) -> Any:
    """Declare a config key. `decides` says whether its value changes the stage's tables."""
    metadata = {"help": help_text, "unit": unit, "choices": tuple(choices), "bounds": bounds, "decides": decides}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


POSITIVE = Bounds(at_least=1)
SIDE = Bounds(at_least=1, at_most=8192)
PROXY_SIDE = Bounds(at_least=8, at_most=4096)
BATCH = Bounds(at_least=2, at_most=1 << 20)
WIDTH = Bounds(at_least=1, at_most=1 << 16)


@dataclass
class PoolConfig:
    """The images to choose from."""

    uri: str = option(
        MISSING, "folder of images, Parquet file(s) or WebDataset tar(s); local path, s3:// or gs://", decides=True
    )
    format: str = option("auto", "how the pool is stored", choices=("auto", "folder", "parquet", "webdataset"))
    image_column: str | None = option(
        None, "Parquet: column of image bytes, Hugging Face image structs or uris; null takes 'image', else 'uri'"
    )
    label: str | None = option(
        None,
        "where true labels are, copied for evaluate alone: a Parquet column of integers, 'folder' for the name of an "
        "image's folder, 'cls' for WebDataset; null copies none",
    )


@dataclass
class EmbedConfig:
    """Embeddings of every image, and its copy at the proxy network's resolution."""

    encoder: str = option(
        "timm/vit_base_patch16_224.dino",
        "pixels, efficientnet_lite0, swav_resnet50, torchvision/<model>, timm/<model>, file, or self_supervised: "
        "trained on the pool itself, see pretrain",
    )
    weights: str | None = option(
        None,
        "local file of the encoder's weights; random:<seed> for an untrained network; null takes the library's own, "
        "for self_supervised it trains them",
    )
    weights_sha256: str | None = option(None, "SHA-256 that the weights file must have")
    image_size: int | None = option(
        None, "side of the square that the encoder sees; null takes its own", unit="pixels", bounds=SIDE
    )
    resize: int | None = option(
        None,
        "short side before that square is cut from the centre; null takes image_size",
        unit="pixels",
        bounds=SIDE,
    )
    proxy_image_size: int = option(
        32, "short side of the copies that the proxy network trains on", unit="pixels", bounds=PROXY_SIDE
    )
    proxy_jpeg_quality: int = option(
        92, "JPEG quality of copies above 64 pixels (smaller ones are PNG)", bounds=Bounds(at_least=1, at_most=95)
    )
    max_image_pixels: int = option(100_000_000, "larger images are rejected", unit="pixels", bounds=POSITIVE)
    block_images: int | None = option(
        None, "images in one file of the table; null takes about 64 MiB of pixels", unit="images", bounds=POSITIVE
    )
    batch_size: int = option(128, "images in one pass of the encoder", unit="images", bounds=POSITIVE)
    device: str = option(
        "auto",
        "where encoders run; auto takes GPUs if the cluster has any",
        choices=("auto", "cpu", "cuda"),
        decides=False,
    )
    num_workers: int | str | None = option(
        None,
        "encoders at once, or a range such as 2-16: as many as there is room for, and work begins with the fewest; "
        "null takes one a GPU, or one a CPU",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None, "CPUs set aside for each encoder; null takes 1", unit="CPUs", bounds=POSITIVE, decides=False
    )
    memory_gib: float | None = option(
        None,
        "memory set aside for each encoder; null sets none aside",
        unit="GiB",
        bounds=Bounds(above=0),
        decides=False,
    )


@dataclass
class PretrainConfig:
    """An encoder trained on the pool itself by SimCLR, with encoder=self_supervised; null takes the profile's value."""

    profile: str = option("gpu", "gpu: published settings; cpu: half an hour on 2 cores", choices=("gpu", "cpu"))
    network: str | None = option(
        None,
        "the encoder: resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50, small_cnn (gpu resnet18, cpu "
        "small_cnn)",
    )
    epochs: int | None = option(
        None,
        "passes over the pool (gpu 400, cpu 16); 0 leaves the network untrained",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    batch_size: int | None = option(
        None, "global batch, all of it negatives (gpu 512, cpu 256)", unit="images", bounds=Bounds(at_least=2)
    )
    lr: float | None = option(
        None, "SGD learning rate for a batch of 256, scaled with the batch (gpu 0.12, cpu 0.3)", bounds=Bounds(above=0)
    )
    warmup_epochs: int | None = option(
        None, "epochs of linear warm-up before the cosine (gpu 10, cpu 1)", unit="epochs", bounds=Bounds(at_least=0)
    )
    momentum: float | None = option(None, "SGD momentum (0.9)", bounds=Bounds(at_least=0, below=1))
    weight_decay: float | None = option(None, "SGD weight decay (5e-4)", bounds=Bounds(at_least=0))
    temperature: float | None = option(
        None, "of the softmax over similarities (gpu 0.5, cpu 0.2)", bounds=Bounds(above=0)
    )
    hidden_dim: int | None = option(None, "width of the projector's hidden layer (512)", bounds=POSITIVE)
    projection_dim: int | None = option(None, "width of what the loss compares (128)", bounds=POSITIVE)
    min_crop_area: float | None = option(
        None, "smallest share of an image that a view shows (0.2)", bounds=Bounds(above=0, at_most=1)
    )
    color_strength: float | None = option(
        None, "of brightness, contrast, saturation and hue (0.5); 0 keeps colours", bounds=Bounds(at_least=0, at_most=1)
    )
    grey_probability: float | None = option(
        None, "share of views without colour (0.2)", bounds=Bounds(at_least=0, at_most=1)
    )
    blur_probability: float | None = option(
        None, "share of blurred views; null takes 0 up to 64 pixels, else 0.5", bounds=Bounds(at_least=0, at_most=1)
    )
    flip: bool | None = option(None, "mirror every second view (true); false for what has a handedness, as digits")
    image_size: int | None = option(
        None,
        "side of the square that the encoder sees; null takes embed.proxy_image_size",
        unit="pixels",
        bounds=Bounds(at_least=8),
    )
    precision: str = option("auto", "auto is bf16 on GPUs and fp32 on CPUs", choices=("auto", "fp32", "bf16", "fp16"))
    reading: str = option(
        "auto",
        "memory: decoded once, centre squares; streamed: decoded in every epoch, crops of the whole photograph; auto: "
        "streamed for pools above a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    device: str = option(
        "auto",
        "where pretraining runs; auto takes GPUs if the cluster has any",
        choices=("auto", "cpu", "cuda"),
        decides=False,
    )
    num_workers: int | None = option(
        None, "data-parallel workers; null takes one a GPU, or one CPU worker", bounds=POSITIVE, decides=False
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker; null takes 1 beside a GPU that has its images in memory, else an equal share of all",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = option(
        None,
        "memory set aside for each worker; null sets none aside",
        unit="GiB",
        bounds=Bounds(above=0),
        decides=False,
    )
    max_failures: int = option(
        5, "failed workers after which pretraining gives up; -1 never does", bounds=Bounds(at_least=-1), decides=False
    )


@dataclass
class TemiConfig:
    """Deep clustering by TEMI; a key that is null takes the profile's value."""

    profile: str = option("paper", "paper: the published settings; cpu: minutes on 2 cores", choices=("paper", "cpu"))
    num_heads: int | None = option(None, "heads trained side by side (paper 50, cpu 8)", unit="heads", bounds=WIDTH)
    num_epochs: int | None = option(None, "passes over the pool (paper 200, cpu 10)", unit="epochs", bounds=POSITIVE)
    num_warmup_epochs: int | None = option(
        None, "epochs of linear warm-up (paper 20, cpu 1)", unit="epochs", bounds=Bounds(at_least=0)
    )
    batch_size: int | None = option(
        None, "global batch, a multiple of the workers (paper 1024, cpu 256)", unit="images", bounds=BATCH
    )
    learning_rate: float | None = option(
        None, "of AdamW for a batch of 256, scaled with the batch (paper 1e-4, cpu 1e-3)", bounds=Bounds(above=0)
    )
    weight_decay: float | None = option(None, "AdamW weight decay (1e-4)", bounds=Bounds(at_least=0))
    temperature: float | None = option(None, "of the softmax (0.1)", bounds=Bounds(above=0))
    beta: float | None = option(None, "exponent of the agreement (0.6)", bounds=Bounds(above=0, at_most=1))
    teacher_momentum: float | None = option(
        None, "of the teacher's moving average (paper 0.996, cpu 0.9)", bounds=Bounds(at_least=0, below=1)
    )
    marginal_momentum: float | None = option(
        None, "of the marginal's moving average (0.9)", bounds=Bounds(at_least=0, below=1)
    )
    hidden_dim: int | None = option(None, "width of the hidden layer (512)", bounds=WIDTH)
    bottleneck_dim: int | None = option(None, "width of the bottleneck (256)", bounds=WIDTH)
    pca_dim: int | None = option(
        None, "principal components before the heads (paper: none, cpu 128); 0 for none", bounds=Bounds(at_least=0)
    )
    precision: str = option(
        "auto", "auto is bf16 on GPUs and fp32 on CPUs", choices=("auto", "fp32", "bf16", "fp16"), decides=True
    )
    num_workers: int | None = option(
        None, "data-parallel workers; null takes one a GPU, or one CPU worker", bounds=POSITIVE, decides=False
    )
    max_failures: int = option(
        5, "failed workers after which training gives up; -1 never does", bounds=Bounds(at_least=-1), decides=False
    )


@dataclass
class ClusterConfig:
    """Pseudo-labels."""

    method: str = option(
        "kmeans",
        "kmeans; temi: deep clustering after it; file: pseudo-labels made elsewhere",
        choices=("kmeans", "temi", "file"),
    )
    num_clusters: int | str = option(
        MISSING,
        "the expected number of classes, or auto for an estimate",
        unit="clusters",
        choices=("auto",),
        bounds=Bounds(at_least=2),
    )
    labels_uri: str | None = option(
        None, "method=file: Parquet with pseudo_label (integers from 0) and sample_id or uri, for every embedded image"
    )
    max_iterations: int = option(100, "Lloyd iterations of each try, at most", bounds=POSITIVE)
    tolerance: float = option(
        1e-4, "stop when the objective improves by a smaller share than this", bounds=Bounds(at_least=0, below=1)
    )
    num_tries: int = option(3, "seedings; the one with the lowest objective is kept", bounds=POSITIVE)
    spherical: bool = option(False, "normalise centroids to unit length")
    num_neighbors: int | None = option(
        None,
        "nearest neighbours kept in neighbors/; null takes 50 for temi and 0, none, for others",
        bounds=Bounds(at_least=0),
    )
    neighbor_search: str = option(
        "auto",
        "exact; ivf: an inverted file, approximate, on CPUs; auto: exact up to 200,000 images on CPUs and on GPUs",
        choices=("auto", "exact", "ivf"),
    )
    neighbor_recall: float = option(
        0.95,
        "share of the exact neighbours that ivf has to find, measured on a sample",
        bounds=Bounds(above=0, at_most=1),
    )
    device: str = option(
        "auto",
        "where assignment, neighbours and TEMI run; auto takes GPUs if the cluster has any",
        choices=("auto", "cpu", "cuda"),
        decides=False,
    )
    num_workers: int | None = option(
        None, "shards in memory at once; null takes one a GPU, or one a CPU", bounds=POSITIVE, decides=False
    )
    memory_gib: float | None = option(
        None, "memory set aside for each shard; null sets none aside", unit="GiB", bounds=Bounds(above=0), decides=False
    )
    temi: TemiConfig = field(default_factory=TemiConfig)


@dataclass
class TrainConfig:
    """The proxy network, trained on pseudo-labels while its training dynamics are recorded."""

    network: str = option("resnet18", "resnet18 (3x3 stem), resnet34, resnet50, small_cnn")
    epochs: int = option(200, "passes over the pool", unit="epochs", bounds=POSITIVE)
    batch_size: int = option(256, "global batch, whatever the number of workers", unit="images", bounds=BATCH)
    micro_batch_size: int | None = option(
        None,
        "images a worker takes at once, accumulated to its part of the batch; null takes all",
        unit="images",
        bounds=Bounds(at_least=2),
    )
    lr: float = option(0.1, "SGD learning rate at the start", bounds=Bounds(above=0))
    scale_lr: bool = option(False, "take lr as that of a batch of 256 and scale it with the batch")
    min_lr: float = option(1e-4, "learning rate at the end of the cosine", bounds=Bounds(at_least=0))
    warmup_epochs: int = option(0, "epochs of linear warm-up", unit="epochs", bounds=Bounds(at_least=0))
    momentum: float = option(0.9, "SGD momentum", bounds=Bounds(at_least=0, below=1))
    weight_decay: float = option(5e-4, "SGD weight decay", bounds=Bounds(at_least=0))
    nesterov: bool = option(True, "Nesterov momentum")
    augmentation: str = option(
        "crop_flip",
        "crop_flip: reflect-padded random crop and flip; crop: no flip; resized_crop_flip: as for ImageNet; none",
        choices=("crop_flip", "crop", "resized_crop_flip", "none"),
    )
    crop_padding: int = option(4, "padding before the random crop", unit="pixels", bounds=Bounds(at_least=0))
    image_size: int | None = option(
        None,
        "side of the square that the network sees; null takes embed.proxy_image_size",
        unit="pixels",
        bounds=PROXY_SIDE,
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each channel, of pixels scaled to 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each channel")
    precision: str = option("auto", "auto is bf16 on GPUs and fp32 on CPUs", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "compile the network with torch.compile; a minute at the start of every worker")
    reading: str = option(
        "auto",
        "memory: decoded once, centre squares; streamed: decoded in every epoch, random resized crops of the whole "
        "photograph; auto: streamed for resized_crop_flip and for pools above a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    early_stop_dynamics: float | None = option(
        None,
        "stop once the rank correlation of the AUM between an epoch and the one before is above this (0.999, say); "
        "null trains every epoch",
        bounds=Bounds(above=0, below=1),
    )
    device: str = option(
        "auto",
        "where training runs; auto takes GPUs if the cluster has any",
        choices=("auto", "cpu", "cuda"),
        decides=False,
    )
    num_workers: int | str | None = option(
        None,
        "data-parallel workers, or a range such as 1-4 that follows what the cluster has; null takes one a GPU, or one "
        "CPU worker",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker: threads, and processes that decode streamed images; null takes 1 beside a GPU that has "
        "its images in memory, else an equal share of all",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = option(
        None,
        "memory set aside for each worker; null sets none aside",
        unit="GiB",
        bounds=Bounds(above=0),
        decides=False,
    )
    max_failures: int = option(
        5,
        "failed workers after which training gives up; -1 never does, and nodes taken back are not counted",
        bounds=Bounds(at_least=-1),
        decides=False,
    )


@dataclass
class SelectConfig:
    """Scores and the coreset."""

    method: str = option(
        "double_end",
        "how scores become a coreset; prototypicality, d2 and zcore are label-free rivals that need no training",
        choices=SELECT_METHODS,
    )
    score: str = option(
        "aum",
        "what orders the samples; dual_beta, prototypicality, d2 and zcore have their own",
        choices=("aum", "forgetting", "el2n", "correctness", "coarse_entropy", "dual", "prototypicality"),
    )
    hard_fraction: Any = option(
        MISSING,
        "share of the whole pool dropped from the hard end (beta), for double_end and stratified; auto chooses it from "
        "what the run has, search by short trainings; [...] gives one for each budget; with balance it is one of each "
        "pseudo-class",
        unit="fraction",
        choices=FIND_HARD_FRACTION,
        bounds=Bounds(at_least=0, below=1),
    )
    search_step: float = option(
        0.1, "search: hard fractions tried are its multiples", unit="fraction", bounds=Bounds(above=0, at_most=0.5)
    )
    search_iterations: int = option(2_000, "search: steps of every training", unit="steps", bounds=POSITIVE)
    search_holdout: float = option(
        0.1,
        "search: share of the pool to test on, by its pseudo-labels; 10,000 images at most",
        unit="fraction",
        bounds=Bounds(above=0, at_most=0.5),
    )
    balance: bool = option(False, "the same budget for each pseudo-class, as far as it has images; better below 5%")
    num_strata: int = option(
        50, "stratified: strata of equal score range", unit="strata", bounds=Bounds(at_least=1, at_most=63)
    )
    dual_exponent: float = option(
        4.0,
        "dual_beta: how fast it leans to easy images (CIFAR10 5.5, CIFAR100 4, ImageNet 11)",
        bounds=Bounds(above=0),
    )
    d2_neighbors: int = option(10, "d2: neighbours of each image in its graph", bounds=POSITIVE)
    zcore_draws: int = option(
        1_000_000, "zcore: random points that the pool has to cover", unit="draws", bounds=POSITIVE
    )


@dataclass
class ReportConfig:
    """What a person looks at."""

    images_per_grid: int = option(
        40, "images shown of each group", unit="images", bounds=Bounds(at_least=1, at_most=100)
    )


@dataclass
class EvaluateConfig:
    """Training from scratch with true labels, on the coreset and on random samples; other keys are those of train."""

    test_uri: str | None = option(None, "labelled images to test on, stored as the pool is; never seen by a selection")
    network: str = option("resnet18", "resnet18 (3x3 stem), resnet34, resnet50, small_cnn")
    iterations: int = option(40_000, "steps of every training, whatever the budget", unit="steps", bounds=POSITIVE)
    batch_size: int = option(256, "images a step", unit="images", bounds=BATCH)
    lr: float = option(0.1, "SGD learning rate at the start", bounds=Bounds(above=0))
    num_seeds: int = option(3, "trainings of each selection; each seed draws other random samples", bounds=POSITIVE)


@dataclass
class Config:
    """A whole run."""

    run_dir: str = option(MISSING, "where tables and report go; local path, s3:// or gs://", decides=False)
    budget: Any = option(
        MISSING,
        "samples to label: a fraction of the embedded images (0.1, 1.0) or an integer count; [0.1,0.3] gives a coreset "
        "for each, the first in coreset/, the others in coreset-<budget>/",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    seed: int = option(0, "every random choice follows from it", bounds=Bounds(at_least=0, below=2**63))
    on_change: str = option(
        "refuse",
        "when a complete stage was made with another config: refuse, or rerun it and what depends on it",
        choices=("refuse", "rerun"),
        decides=False,
    )
    until: str = option("report", "the last stage to run", choices=STAGE_NAMES, decides=False)
    ray_address: str | None = option(
        None,
        "Ray cluster to use; null takes RAY_ADDRESS, else a cluster on this machine, else starts one; 'local' always "
        "starts one",
        decides=False,
    )
    ray_logs: bool = option(False, "show what Ray's workers print, too", decides=False)
    pool: PoolConfig = field(default_factory=PoolConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def pretrains(self) -> bool:
        """Whether the run trains its own encoder."""
        return self.embed.encoder == SELF_SUPERVISED and self.embed.weights is None

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages of this run, in their order."""
        return tuple(name for name in STAGE_NAMES if self.pretrains or name not in PRETRAINING)

    @property
    def budgets(self) -> list[int | float]:
        """One or more budgets, as a list."""
        return self.budget if isinstance(self.budget, list) else [self.budget]

    @property
    def hard_fractions(self) -> list[float | str]:
        """The hard fraction of each budget, or the word for how it is found; 0 where the method has none."""
        if self.select.method not in USES_HARD_FRACTION:
            return [0.0] * len(self.budgets)
        given = self.select.hard_fraction
        return given if isinstance(given, list) else [given] * len(self.budgets)


def fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key below a section, dotted, in the order of declaration."""
    for spec in dataclasses.fields(section):
        if spec.metadata:
            yield prefix + spec.name, spec
        else:
            assert isinstance(spec.type, type)
            yield from fields_of(spec.type, f"{prefix}{spec.name}.")
