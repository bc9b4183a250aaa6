"""Checks of a config before anything starts: each key by itself, keys beside each other, and against the pool."""

import math
import operator
from collections.abc import Sequence
from typing import Any

from elfs_ray.config.declaration import Bounds, ConfigError, fields_of
from elfs_ray.config.run import Config
from elfs_ray.config.temi import TEMI_NEIGHBORS
from elfs_ray.config.train import LINEAR, TrainConfig

MAX_NUMBER = 2**31 - 1  # where a key has no limit of its own
MAX_WORKERS = 100_000
LR_BATCH_SIZE = 256  # what train.scale_lr takes train.lr for


def scaled_lr(train: TrainConfig) -> float:
    """The learning rate at the start of training."""
    return train.lr * train.batch_size / LR_BATCH_SIZE if train.scale_lr else train.lr


def worker_range(num_workers: int | str | None, key: str) -> tuple[int, int] | None:
    """(fewest, most) of a key: 2 is (2, 2), "1-4" is (1, 4), null None. Raises ConfigError for anything else."""
    if num_workers is None:
        return None
    fewest, dash, most = str(num_workers).partition("-")
    if fewest.isdecimal() and (most.isdecimal() or not dash):
        limits = int(fewest), int(most or fewest)
        if 1 <= limits[0] <= limits[1] <= MAX_WORKERS:
            return limits
    raise ConfigError(f"{key}={num_workers!r}: needed is a number >= 1 and <= {MAX_WORKERS:,} or a range such as 1-4")


def proxy_workers(train: TrainConfig) -> int | str | None:
    """train.num_workers; one for a linear proxy, unless given, whose steps are too short to share."""
    return 1 if train.num_workers is None and train.network == LINEAR else train.num_workers


def check_temi_workers(batch_size: int, num_workers: int) -> None:
    """Raise ConfigError for a global batch of TEMI that its workers cannot share evenly."""
    if batch_size % num_workers:
        raise ConfigError(
            f"cluster.temi.batch_size={batch_size} does not divide evenly among {num_workers} workers: give a multiple "
            f"of {num_workers}, or another cluster.temi.num_workers"
        )


def check_pretraining_workers(device: str, num_workers: int) -> None:
    """Raise ConfigError for several workers of pretraining on CPUs, which could not share batch statistics."""
    if device == "cpu" and num_workers > 1:
        raise ConfigError(
            f"pretrain.num_workers={num_workers} on CPUs: several workers must share the statistics of batch norms, "
            "which GPUs alone can; give pretrain.num_workers=1, or pretrain on GPUs"
        )


def check_against_pool(config: Config, num_samples: int, num_rejected: int = 0) -> None:
    """What can be checked only once the size of the pool is known. Raises ConfigError.

    num_rejected: the images beside the samples that were found to be of no use.
    """
    try:
        _check_size(config, num_samples)
    except ConfigError as error:
        if not num_rejected:
            raise
        raise ConfigError(f"{error} ({num_rejected:,} more could not be used, see rejected/)") from error


def _check_size(config: Config, num_samples: int) -> None:
    if num_samples == 0:
        raise ConfigError(f"pool.uri={config.pool.uri!r} holds no images: check the path and pool.format")
    if config.cluster.method != "file" and num_samples < 2:
        raise ConfigError(f"pool.uri={config.pool.uri!r} holds one image: needed are at least 2, to choose among")
    if config.cluster.method != "file" and _number(config.cluster.num_clusters) > num_samples:
        raise ConfigError(
            f"cluster.num_clusters={config.cluster.num_clusters} is more than the pool's {num_samples} samples: "
            "give fewer clusters"
        )
    if (config.cluster.num_neighbors or 0) >= num_samples:
        raise ConfigError(
            f"cluster.num_neighbors={config.cluster.num_neighbors} of the pool's {num_samples} samples: needed are "
            "fewer neighbours than samples"
        )
    check_budgets(config, num_samples)


def check_balance(config: Config, num_clusters: int) -> None:
    """Raise ConfigError for more pseudo-classes than a selection can balance over."""
    from elfs_ray.methods.selection.quantiles import MAX_GROUPS

    if config.select.balance and num_clusters > MAX_GROUPS:
        raise ConfigError(
            f"select.balance=true over {num_clusters:,} clusters: needed are {MAX_GROUPS:,} at most, or "
            "select.balance=false"
        )


def check_budgets(config: Config, num_samples: int) -> None:
    """Raise ConfigError for a budget or a hard fraction that does not fit a pool of so many samples."""
    from elfs_ray.methods.selection.pruning import budget_count, window_start

    for budget, hard_fraction in zip(config.budgets, config.hard_fractions, strict=True):
        try:
            count = budget_count(budget, num_samples)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            window_start(num_samples, count, _number(hard_fraction))  # a word finds one that fits
        except ValueError as error:
            left = (num_samples - count) / num_samples
            raise ConfigError(
                f"budget={budget} keeps {count:,} of {num_samples:,} samples and leaves {left:.4g} of the pool to "
                f"drop, but select.hard_fraction={hard_fraction} of it is to be dropped as too hard: give "
                f"select.hard_fraction=auto, or {10_000 * (num_samples - count) // num_samples / 10_000:g} at most"
            ) from error


def _number(value: int | float | str) -> float:
    """A number as it is, a word such as auto as 0."""
    return 0 if isinstance(value, str) else value


def check_fields(config: Any) -> None:
    """Raise ConfigError for a value that its key does not allow, in any dataclass of options."""
    for key, spec in fields_of(type(config)):
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
    if is_number and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: needed is a finite number")
    is_limited = bounds is not None and not (bounds.at_most is None and bounds.below is None)
    if is_number and not is_limited and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{key}={value!r}: needed is a number <= {MAX_NUMBER}")


def check_relations(config: Config) -> None:
    """Checks between keys."""
    if config.evaluate.test_uri is not None and config.pool.label is None:
        raise ConfigError("evaluate.test_uri needs the true labels of the pool, too: give pool.label=...")
    if config.cluster.method == "file" and config.cluster.labels_uri is None:
        raise ConfigError("cluster.method=file needs the pseudo-labels: give cluster.labels_uri=...")
    if config.cluster.method == "temi" and config.cluster.num_neighbors == 0:
        raise ConfigError(
            "cluster.num_neighbors=0 with cluster.method=temi, which learns from neighbours: give a number, or null "
            f"for {TEMI_NEIGHBORS}"
        )
    if config.cluster.method != "file":
        check_balance(config, int(_number(config.cluster.num_clusters)))
    if config.cluster.temi.batch_size is not None:
        check_temi_workers(config.cluster.temi.batch_size, config.cluster.temi.num_workers or 1)
    needs = config.select.d2_neighbors
    if config.select.method == "d2" and config.cluster.kept_neighbors < needs:
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
    _check_pretraining(config)
    train = config.train
    for name in ("mean", "std"):
        if len(getattr(train, name)) != 3:
            raise ConfigError(f"train.{name}={getattr(train, name)}: needed are 3 numbers, one a channel")
    if min(train.std) <= 0:
        raise ConfigError(f"train.std={train.std}: needed are numbers > 0")
    if train.min_lr > scaled_lr(train):
        raise ConfigError(f"train.min_lr={train.min_lr} is above the learning rate, {scaled_lr(train)}: lower it")
    if train.nesterov and train.momentum == 0:
        raise ConfigError("train.momentum=0 with train.nesterov=true, which needs momentum: give train.nesterov=false")
    _check_linear(config)
    worker_range(train.num_workers, "train.num_workers")
    worker_range(config.embed.num_workers, "embed.num_workers")
    if train.warmup_epochs >= train.epochs and train.warmup_epochs > 0:
        raise ConfigError(f"train.warmup_epochs={train.warmup_epochs}: needed are fewer than {train.epochs} epochs")
    size = train.image_size or config.embed.proxy_image_size
    if train.augmentation in ("crop_flip", "crop") and train.crop_padding >= size:
        raise ConfigError(
            f"train.crop_padding={train.crop_padding}: images of {size} pixels can be padded by {size - 1} at most"
        )
    if train.network != LINEAR and (train.image_size or 0) > config.embed.proxy_image_size:
        raise ConfigError(
            f"train.image_size={train.image_size} is above embed.proxy_image_size={config.embed.proxy_image_size}: "
            "the network cannot see more pixels than were kept"
        )


def _check_linear(config: Config) -> None:
    if config.train.network != LINEAR:
        return
    if config.train.reading == "streamed":
        raise ConfigError(
            f"train.reading=streamed with train.network={LINEAR}, which reads no images: give train.reading=auto"
        )
    if "search" in config.hard_fractions:
        raise ConfigError(
            f"select.hard_fraction=search trains train.network on images, and {LINEAR} sees embeddings: give auto or a "
            "number"
        )


def _check_pretraining(config: Config) -> None:
    if not config.pretrains:
        return
    if config.pretrain.compile and config.pretrain.num_workers != 1:
        raise ConfigError(
            f"pretrain.compile=true with pretrain.num_workers={config.pretrain.num_workers}: batch norms that several "
            "workers share are not compiled; give pretrain.num_workers=1"
        )
    _check_warmup(config)
    embed = config.embed
    sizes = {
        "pretrain.image_size": config.pretrain.image_size,
        "embed.image_size": embed.image_size,
        "embed.resize": embed.resize,
    }
    for key, size in sizes.items():
        if size is not None and size > embed.proxy_image_size:
            raise ConfigError(
                f"{key}={size} is above embed.proxy_image_size={embed.proxy_image_size}: the encoder cannot see more "
                f"pixels than were kept; {key}=null takes what fits"
            )
    if embed.weights_sha256 is not None:
        raise ConfigError("embed.weights_sha256 is given, but the weights are trained in this run: leave it out")


def _check_warmup(config: Config) -> None:
    warmup = config.pretrain.warmup_epochs
    if not warmup:
        return
    from elfs_ray.methods.simclr.training import simclr_settings

    epochs = simclr_settings(vars(config.pretrain), config.embed.proxy_image_size).epochs
    if 0 < epochs <= warmup:
        raise ConfigError(f"pretrain.warmup_epochs={warmup}: needed are fewer than {epochs} epochs, or null")
