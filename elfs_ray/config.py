"""Every key a job takes: one dataclass a stage, loaded and merged by OmegaConf, checked before anything starts.

A key is declared once, by `option`: its default, what it means, its unit, the values it may have, and whether it
decides the stage's result. Keys that do not (numbers of workers, batch sizes that only change speed) may differ between
a run and its continuation.
"""

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, UnsupportedValueType

STAGE_NAMES = ("index", "embed", "cluster", "train", "select", "report")
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


LR_BATCH_SIZE = 256  # what train.scale_lr takes train.lr for

POSITIVE = Bounds(at_least=1)
FRACTION = Bounds(at_least=0, at_most=1)


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
        "pixels, efficientnet_lite0, swav_resnet50, torchvision/<model>, timm/<model>, or file",
    )
    weights: str | None = option(
        None,
        "local file of the encoder's weights; random:<seed> for an untrained network; null takes the library's own",
    )
    weights_sha256: str | None = option(None, "SHA-256 that the weights file must have")
    image_size: int | None = option(
        None, "side of the square that the encoder sees; null takes its own", unit="pixels", bounds=POSITIVE
    )
    resize: int | None = option(
        None,
        "short side before that square is cut from the centre; null takes image_size",
        unit="pixels",
        bounds=POSITIVE,
    )
    proxy_image_size: int = option(
        32, "short side of the copies that the proxy network trains on", unit="pixels", bounds=Bounds(at_least=8)
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
    num_workers: int | None = option(
        None, "encoders at once; null takes one a GPU, or one a CPU", bounds=POSITIVE, decides=False
    )


@dataclass
class TemiConfig:
    """Deep clustering by TEMI; a key that is null takes the profile's value."""

    profile: str = option("paper", "paper: the published settings; cpu: minutes on 2 cores", choices=("paper", "cpu"))
    num_heads: int | None = option(None, "heads trained side by side (paper 50, cpu 8)", unit="heads", bounds=POSITIVE)
    num_epochs: int | None = option(None, "passes over the pool (paper 200, cpu 10)", unit="epochs", bounds=POSITIVE)
    num_warmup_epochs: int | None = option(
        None, "epochs of linear warm-up (paper 20, cpu 1)", unit="epochs", bounds=Bounds(at_least=0)
    )
    batch_size: int | None = option(
        None, "global batch, a multiple of the workers (paper 1024, cpu 256)", unit="images", bounds=Bounds(at_least=2)
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
    hidden_dim: int | None = option(None, "width of the hidden layer (512)", bounds=POSITIVE)
    bottleneck_dim: int | None = option(None, "width of the bottleneck (256)", bounds=POSITIVE)
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
    temi: TemiConfig = field(default_factory=TemiConfig)


@dataclass
class TrainConfig:
    """The proxy network, trained on pseudo-labels while its training dynamics are recorded."""

    network: str = option("resnet18", "resnet18 (3x3 stem), resnet34, resnet50, small_cnn")
    epochs: int = option(200, "passes over the pool", unit="epochs", bounds=POSITIVE)
    batch_size: int = option(
        256, "global batch, whatever the number of workers", unit="images", bounds=Bounds(at_least=2)
    )
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
        bounds=Bounds(at_least=8),
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
        "share of the whole pool dropped from the hard end (beta), for double_end and stratified; [...] gives one for "
        "each budget; with balance it is one of each pseudo-class",
        unit="fraction",
        bounds=Bounds(at_least=0, below=1),
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
    batch_size: int = option(256, "images a step", unit="images", bounds=Bounds(at_least=2))
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
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def budgets(self) -> list[int | float]:
        """One or more budgets, as a list."""
        return self.budget if isinstance(self.budget, list) else [self.budget]

    @property
    def hard_fractions(self) -> list[float]:
        """The hard fraction of each budget; 0 where the method has none."""
        if self.select.method not in USES_HARD_FRACTION:
            return [0.0] * len(self.budgets)
        given = self.select.hard_fraction
        return given if isinstance(given, list) else [given] * len(self.budgets)


def load_config(
    yaml_path: str | Path | None = None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then those of `base` (nested, as in YAML), then a YAML file, then `key=value` overrides; checked.

    Raises ConfigError for an unknown key, a value of the wrong type or outside its bounds, or a missing key.
    """
    merged = OmegaConf.structured(Config)
    OmegaConf.set_struct(merged, True)
    if base is not None:
        merged = _merge(merged, OmegaConf.create(dict(base)), "the run directory's config")
    if yaml_path is not None:
        if not Path(yaml_path).is_file():
            raise ConfigError(f"config file {str(yaml_path)!r} does not exist: give the path of a YAML file")
        merged = _merge(merged, _load_yaml(yaml_path), str(yaml_path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), override)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    _check_fields(config)
    _check_relations(config)
    return config


def describe_keys(yaml_path: str | Path | None = None) -> Iterator[tuple[str, str, str]]:
    """(key, default with its unit, meaning) of every key, with the defaults of a YAML file where one is given."""
    merged = OmegaConf.structured(Config)
    if yaml_path is not None:
        merged = _merge(merged, _load_yaml(yaml_path), str(yaml_path))
    for key, spec in _fields(Config):
        value = None if OmegaConf.is_missing(*_parent(merged, key)) else OmegaConf.select(merged, key)
        required = OmegaConf.is_missing(*_parent(merged, key))
        default = "required" if required else "null" if value is None else str(value)
        meaning = spec.metadata["help"]
        if spec.metadata["choices"]:
            meaning += f" [{', '.join(spec.metadata['choices'])}]"
        if spec.metadata["bounds"]:
            meaning += f" [{spec.metadata['bounds'].describe()}]"
        unit = "" if required else spec.metadata["unit"]
        if required and spec.metadata["unit"]:
            meaning += f" ({spec.metadata['unit']})"
        yield key, f"{default} {unit}".strip(), meaning


def deciding_keys(section: Any) -> dict[str, Any]:
    """The keys of one section (a dataclass above) that decide its stage's result, with their values."""
    keys: dict[str, Any] = {}
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if dataclasses.is_dataclass(value):
            keys |= {f"{spec.name}.{key}": nested for key, nested in deciding_keys(value).items()}
        elif spec.metadata["decides"]:
            keys[spec.name] = value
    return keys


def scaled_lr(train: TrainConfig) -> float:
    """The learning rate at the start of training."""
    return train.lr * train.batch_size / LR_BATCH_SIZE if train.scale_lr else train.lr


def worker_range(num_workers: int | str | None) -> tuple[int, int] | None:
    """(fewest, most) of train.num_workers: 2 is (2, 2), "1-4" is (1, 4). Raises ConfigError for anything else."""
    if num_workers is None:
        return None
    fewest, dash, most = str(num_workers).partition("-")
    if fewest.isdecimal() and (most.isdecimal() or not dash):
        limits = int(fewest), int(most or fewest)
        if 1 <= limits[0] <= limits[1]:
            return limits
    raise ConfigError(f"train.num_workers={num_workers!r}: needed is a number >= 1 or a range such as 1-4")


def check_temi_workers(batch_size: int, num_workers: int) -> None:
    """Raise ConfigError for a global batch of TEMI that its workers cannot share evenly."""
    if batch_size % num_workers:
        raise ConfigError(
            f"cluster.temi.batch_size={batch_size} does not divide evenly among {num_workers} workers: give a multiple "
            f"of {num_workers}, or another cluster.temi.num_workers"
        )


def check_against_pool(config: Config, num_samples: int) -> None:
    """What can be checked only once the size of the pool is known. Raises ConfigError."""
    if num_samples == 0:
        raise ConfigError(f"pool.uri={config.pool.uri!r} holds no images: check the path and pool.format")
    if config.cluster.method != "file" and _number(config.cluster.num_clusters) > num_samples:
        raise ConfigError(
            f"cluster.num_clusters={config.cluster.num_clusters} is more than the pool's {num_samples} samples: "
            "give fewer clusters"
        )
    from elfs_ray.methods.pruning import budget_count, window_start

    try:
        for budget, hard_fraction in zip(config.budgets, config.hard_fractions, strict=True):
            window_start(num_samples, budget_count(budget, num_samples), hard_fraction)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _number(value: int | float | str) -> float:
    """A number as it is, a word such as auto as 0."""
    return 0 if isinstance(value, str) else value


def _load_yaml(path: str | Path) -> DictConfig:
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list: needed are keys with values")
    return loaded


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override: write key=value (see --help for the keys)")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise ConfigError(f"{override!r} cannot be read: {error}. Quote values with spaces or colons.") from error


def _merge(merged: DictConfig, added: DictConfig, source: str) -> DictConfig:
    known = [key for key, _ in _fields(Config)]
    try:
        result = OmegaConf.merge(merged, added)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(getattr(error, "full_key", None) or error)
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every key"
        raise ConfigError(f"{source}: no key named {key!r}; {hint}") from error
    except (OmegaConfBaseException, UnsupportedValueType, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or source
        raise ConfigError(f"{source}: bad value for {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, DictConfig)
    return result


def _fields(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key below a section, dotted, in the order of declaration."""
    for spec in dataclasses.fields(section):
        if spec.metadata:
            yield prefix + spec.name, spec
        else:
            assert isinstance(spec.type, type)
            yield from _fields(spec.type, f"{prefix}{spec.name}.")


def _parent(merged: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(merged, section) if section else merged), name


def _check_fields(config: Config) -> None:
    for key, spec in _fields(Config):
        value = operator.attrgetter(key)(config)
        if value is None and spec.type is not Any:
            continue
        if value == "":
            raise ConfigError(f"{key} is empty: {spec.metadata['help']}")
        if value == []:
            raise ConfigError(f"{key}=[] is an empty list: give at least one value")
        for item in value if isinstance(value, list) else [value]:
            _check_value(key, item, spec.metadata["bounds"], spec.metadata["choices"])


def _check_value(key: str, value: Any, bounds: Bounds | None, choices: Sequence[str]) -> None:
    needed = [f"a number {bounds.describe()}"] if bounds else []
    needed += [f"one of {', '.join(choices)}"] if choices else []
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if needed and not is_number and not (choices and isinstance(value, str)):
        raise ConfigError(f"bad value for {key}: {value!r}; needed is {' or '.join(needed)}")
    if (is_number and bounds and not bounds.allow(value)) or (choices and not is_number and value not in choices):
        raise ConfigError(f"{key}={value!r}: needed is {' or '.join(needed)}")


def _check_relations(config: Config) -> None:
    """Checks between keys."""
    if config.cluster.method == "file" and config.cluster.labels_uri is None:
        raise ConfigError("cluster.method=file needs the pseudo-labels: give cluster.labels_uri=...")
    if config.cluster.temi.batch_size is not None:
        check_temi_workers(config.cluster.temi.batch_size, config.cluster.temi.num_workers or 1)
    needs, has = config.select.d2_neighbors, config.cluster.num_neighbors
    if config.select.method == "d2" and (50 if has is None and config.cluster.method == "temi" else has or 0) < needs:
        raise ConfigError(
            f"select.method=d2 needs select.d2_neighbors={needs} nearest neighbours: give cluster.num_neighbors={needs}"
        )
    if len({str(budget) for budget in config.budgets}) < len(config.budgets):
        raise ConfigError(f"budget={config.budget} names a budget twice: each has a coreset of its own")
    if len(config.hard_fractions) != len(config.budgets):
        raise ConfigError(
            f"select.hard_fraction={config.select.hard_fraction} has {len(config.hard_fractions)} values for "
            f"{len(config.budgets)} budgets: give one for each, or a single one for all"
        )
    train = config.train
    for name in ("mean", "std"):
        if len(getattr(train, name)) != 3:
            raise ConfigError(f"train.{name}={getattr(train, name)}: needed are 3 numbers, one a channel")
    if min(train.std) <= 0:
        raise ConfigError(f"train.std={train.std}: needed are numbers > 0")
    if train.min_lr > scaled_lr(train):
        raise ConfigError(f"train.min_lr={train.min_lr} is above the learning rate, {scaled_lr(train)}: lower it")
    worker_range(train.num_workers)
    if train.warmup_epochs >= train.epochs and train.warmup_epochs > 0:
        raise ConfigError(f"train.warmup_epochs={train.warmup_epochs}: needed are fewer than {train.epochs} epochs")
    if train.image_size is not None and train.image_size > config.embed.proxy_image_size:
        raise ConfigError(
            f"train.image_size={train.image_size} is above embed.proxy_image_size={config.embed.proxy_image_size}: "
            "the network cannot see more pixels than were kept"
        )
