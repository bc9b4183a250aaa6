"""Checks of a config: each key by itself, keys against each other, and the config against the size of the pool.

All of them run before any work starts, so that a job fails within seconds rather than after hours of embedding.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

from elfs_ray.config.cluster import ClusterConfig
from elfs_ray.config.declaration import Bounds, ConfigError, fields_of
from elfs_ray.config.labels import label_selector
from elfs_ray.config.run import Config
from elfs_ray.config.select import BY_COVERAGE
from elfs_ray.config.temi import PCA_SAMPLES, TEMI_NEIGHBORS
from elfs_ray.config.train import LINEAR, TrainConfig

# For keys without an upper limit of their own: a typo is refused here and does not overflow somewhere in a stage.
MAX_NUMBER = 2**31 - 1
MAX_WORKERS = 100_000
LR_BATCH_SIZE = 256  # with train.scale_lr, train.lr is the learning rate of a batch of this size


def scaled_lr(train: TrainConfig) -> float:
    """Return the learning rate at the start of training."""
    return train.lr * train.batch_size / LR_BATCH_SIZE if train.scale_lr else train.lr


def worker_range(num_workers: int | str | None, key: str) -> tuple[int, int] | None:
    """Return the fewest and the most workers that a key allows: (2, 2) for 2, (1, 4) for "1-4", None for null.

    Raises ConfigError for anything else.
    """
    if num_workers is None:
        return None
    fewest, dash, most = str(num_workers).partition("-")
    if fewest.isdecimal() and (most.isdecimal() or not dash):
        limits = int(fewest), int(most or fewest)
        if 1 <= limits[0] <= limits[1] <= MAX_WORKERS:
            return limits
    raise ConfigError(f"{key}={num_workers!r}: must be a number from 1 to {MAX_WORKERS:,} or a range such as 1-4")


def proxy_workers(train: TrainConfig) -> int | str | None:
    """Return train.num_workers, where null means one worker for a linear proxy.

    The steps of a linear proxy are so short that exchanging gradients would take longer than the steps themselves.
    """
    return 1 if train.num_workers is None and train.network == LINEAR else train.num_workers


def check_temi_workers(batch_size: int, num_workers: int) -> None:
    """Raise ConfigError for a global batch of TEMI that its workers cannot share evenly."""
    if batch_size % num_workers:
        raise ConfigError(
            f"cluster.temi.batch_size={batch_size} does not divide evenly among {num_workers} workers: give a multiple "
            f"of {num_workers}, or another cluster.temi.num_workers"
        )


def check_pretraining_workers(device: str, num_workers: int) -> None:
    """Raise ConfigError for several pretraining workers on CPUs."""
    # Workers must share the statistics of their batch norms, and torch's SyncBatchNorm runs on GPUs only.
    if device == "cpu" and num_workers > 1:
        raise ConfigError(
            f"pretrain.num_workers={num_workers} on CPUs: pretraining with several workers needs synchronised batch "
            "norm, which only GPUs support; give pretrain.num_workers=1, or pretrain on GPUs"
        )


def check_against_pool(config: Config, num_samples: int, num_rejected: int = 0) -> None:
    """Check all that depends on the size of the pool.

    num_rejected: images of the pool that are not among the samples because they could not be used.

    Raises ConfigError.
    """
    try:
        _check_size(config, num_samples)
    except ConfigError as error:
        if not num_rejected:
            raise
        # A budget that fits the listing may fail here, and would seem miscounted without this hint.
        raise ConfigError(f"{error} ({num_rejected:,} more could not be used, see rejected/)") from error


def _check_size(config: Config, num_samples: int) -> None:
    if num_samples == 0:
        raise ConfigError(f"pool.uri={config.pool.uri!r} holds no images: check the path and pool.format")
    fits_clusters = config.needs_clusters and config.cluster.method != "file"
    if fits_clusters and num_samples < 2:
        raise ConfigError(f"pool.uri={config.pool.uri!r} holds one image: a selection needs at least 2")
    if fits_clusters and _as_number(config.cluster.num_clusters) > num_samples:
        raise ConfigError(
            f"cluster.num_clusters={config.cluster.num_clusters} is more than the pool's {num_samples} samples: "
            "give fewer clusters"
        )
    if fits_clusters:
        _check_auto_and_temi(config.cluster, num_samples)
    if config.select.method == "d2" and config.select.d2_neighbors >= num_samples:
        raise ConfigError(
            f"select.d2_neighbors={config.select.d2_neighbors} with a pool of {num_samples} samples: must be less than "
            "the number of samples"
        )
    for key, needs_two in (
        ("select.method=zcore", config.select.method == "zcore"),
        (f"duplicates.threshold={config.duplicates.threshold}", config.duplicates.threshold is not None),
    ):
        if needs_two and num_samples < 2:
            raise ConfigError(f"pool.uri={config.pool.uri!r} holds one image: {key} needs at least 2")
    if config.needs_neighbors and (config.cluster.num_neighbors or 0) >= num_samples:
        raise ConfigError(
            f"cluster.num_neighbors={config.cluster.num_neighbors} with a pool of {num_samples} samples: must be less "
            "than the number of samples"
        )
    check_budgets(config, num_samples)


def _check_auto_and_temi(cluster: ClusterConfig, num_samples: int) -> None:
    if cluster.num_clusters == "auto":
        from elfs_ray.methods.kmeans.num_clusters import MIN_ROWS_PER_CLUSTER

        if num_samples < 2 * MIN_ROWS_PER_CLUSTER:
            raise ConfigError(
                f"cluster.num_clusters=auto with a pool of {num_samples} samples: needs at least "
                f"{2 * MIN_ROWS_PER_CLUSTER} to estimate it; give a number"
            )
    if cluster.method != "temi":
        return
    for key, limit in (("pca_dim", min(num_samples, PCA_SAMPLES)), ("num_workers", num_samples)):
        value = getattr(cluster.temi, key)
        if value is not None and value > limit:
            raise ConfigError(
                f"cluster.temi.{key}={value} with a pool of {num_samples} samples: give {limit} at most, or null"
            )


def check_balance(config: Config, num_clusters: int) -> None:
    """Raise ConfigError for more pseudo-classes than a selection can balance over."""
    from elfs_ray.methods.selection.quantiles import MAX_GROUPS

    if config.select.balance and num_clusters > MAX_GROUPS:
        raise ConfigError(
            f"select.balance=true with {num_clusters:,} clusters: give at most {MAX_GROUPS:,} clusters, or "
            "select.balance=false"
        )


def check_budgets(config: Config, num_samples: int) -> None:
    """Raise ConfigError for a budget or a hard fraction that does not fit a pool of `num_samples`."""
    from elfs_ray.methods.selection.pruning import budget_count, window_start

    for budget, hard_fraction in zip(config.budgets, config.hard_fractions, strict=True):
        try:
            count = budget_count(budget, num_samples)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if hard_fraction == "search" and count < 2:
            raise ConfigError(
                f"budget={budget} keeps 1 of {num_samples:,} samples, and select.hard_fraction=search trains on the "
                "coreset: give a budget of 2 at least, or select.hard_fraction=auto"
            )
        try:
            # `auto` and `search` only ever choose fractions that fit, so they are checked as 0.
            window_start(num_samples, count, _as_number(hard_fraction))
        except ValueError as error:
            left = (num_samples - count) / num_samples
            # Rounded down to four digits: rounding up would advise a fraction that is refused again.
            largest = 10_000 * (num_samples - count) // num_samples / 10_000
            raise ConfigError(
                f"budget={budget} keeps {count:,} of {num_samples:,} samples and leaves {left:.4g} of the pool to "
                f"drop, but select.hard_fraction={hard_fraction} asks to drop more than that: give "
                f"select.hard_fraction=auto, or {largest:g} at most"
            ) from error


def _as_number(value: int | float | str) -> float:
    """Return a number unchanged, and 0 for a word such as auto."""
    return 0 if isinstance(value, str) else value


def check_fields(config: Any) -> None:
    """Raise ConfigError for a value that its key does not allow, in any dataclass of options."""
    for key, spec in fields_of(type(config)):
        value = operator.attrgetter(key)(config)
        # Where the type is known, OmegaConf has already refused null for keys that cannot be null. Keys declared as Any
        # (budget, hard_fraction) have only this check.
        if value is None and spec.type is not Any:
            continue
        if value == "":
            raise ConfigError(f"{key} is empty: {spec.metadata['help']}")
        if value == []:
            raise ConfigError(f"{key}=[] is an empty list: give at least one value")
        items = value if isinstance(value, list) else [value]
        if spec.metadata["is_path"] and not all(isinstance(item, str) and item for item in items):
            raise ConfigError(f"bad value for {key}: {value!r}; must be a path or a list of paths")
        for item in items:
            _check_value(key, item, spec.metadata["bounds"], spec.metadata["choices"])


def _check_value(key: str, value: Any, bounds: Bounds | None, choices: Sequence[str]) -> None:
    allowed = [f"a number {bounds.describe()}"] if bounds else []
    allowed += [f"one of {', '.join(choices)}"] if choices else []
    # bool is a subclass of int in Python: without the second test, budget=true would be a budget of 1.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if allowed and not is_number and not (choices and isinstance(value, str)):
        raise ConfigError(f"bad value for {key}: {value!r}; must be {' or '.join(allowed)}")
    if (is_number and bounds and not bounds.allow(value)) or (choices and not is_number and value not in choices):
        raise ConfigError(f"{key}={value!r}: must be {' or '.join(allowed)}")
    if is_number and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: must be a finite number")
    is_limited = bounds is not None and not (bounds.at_most is None and bounds.below is None)
    if is_number and not is_limited and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{key}={value!r}: must be a number <= {MAX_NUMBER}")


def check_relations(config: Config) -> None:
    """Check keys against each other, section by section. Raises ConfigError."""
    if config.evaluate.test_uri is not None and config.pool.label is None:
        raise ConfigError("evaluate.test_uri also needs the true labels of the pool: give pool.label=...")
    _check_clustering(config)
    _check_selection(config)
    _check_pretraining(config)
    _check_optimizer(config.train)
    _check_linear_proxy(config)
    worker_range(config.train.num_workers, "train.num_workers")
    worker_range(config.embed.num_workers, "embed.num_workers")
    _check_proxy_images(config)
    for section in ("embed", "cluster", "train", "pretrain"):
        label_selector(config, section)


def _check_clustering(config: Config) -> None:
    cluster = config.cluster
    if cluster.method == "file" and cluster.labels_uri is None:
        raise ConfigError("cluster.method=file needs the pseudo-labels: give cluster.labels_uri=...")
    if cluster.method == "temi" and cluster.num_neighbors == 0:
        raise ConfigError(
            "cluster.num_neighbors=0 with cluster.method=temi, which learns from neighbours: give a number, or null "
            f"for {TEMI_NEIGHBORS}"
        )
    # The number of clusters in a file is known only after stage cluster has read it, which checks it then.
    if cluster.method != "file":
        check_balance(config, int(_as_number(cluster.num_clusters)))
    if cluster.temi.batch_size is not None:
        check_temi_workers(cluster.temi.batch_size, cluster.temi.num_workers or 1)


def _check_selection(config: Config) -> None:
    num_neighbors = config.select.d2_neighbors
    if config.select.method == "d2" and config.cluster.kept_neighbors < num_neighbors:
        raise ConfigError(
            f"select.method=d2 needs select.d2_neighbors={num_neighbors} nearest neighbours: give "
            f"cluster.num_neighbors={num_neighbors}"
        )
    if config.select.method in BY_COVERAGE and config.select.balance:
        raise ConfigError(
            f"select.balance=true with select.method={config.select.method}, which covers every kind of image anyway: "
            "give select.balance=false"
        )
    # Compared as text: 1 (one sample) and 1.0 (the whole pool) are equal numbers but different budgets.
    if len({str(budget) for budget in config.budgets}) < len(config.budgets):
        raise ConfigError(f"budget={config.budget} lists a budget twice: give each budget once")
    if len(config.hard_fractions) != len(config.budgets):
        raise ConfigError(
            f"select.hard_fraction={config.select.hard_fraction} has {len(config.hard_fractions)} values for "
            f"{len(config.budgets)} budgets: give one for each, or a single one for all"
        )


def _check_optimizer(train: TrainConfig) -> None:
    for name in ("mean", "std"):
        if len(getattr(train, name)) != 3:
            raise ConfigError(f"train.{name}={getattr(train, name)}: must be 3 numbers, one for each channel")
    if min(train.std) <= 0:
        raise ConfigError(f"train.std={train.std}: must be numbers > 0")
    if train.min_lr > scaled_lr(train):
        raise ConfigError(f"train.min_lr={train.min_lr} is above the learning rate, {scaled_lr(train)}: lower it")
    if train.nesterov and train.momentum == 0:
        raise ConfigError("train.momentum=0 with train.nesterov=true, which needs momentum: give train.nesterov=false")
    if train.warmup_epochs >= train.epochs and train.warmup_epochs > 0:
        raise ConfigError(f"train.warmup_epochs={train.warmup_epochs}: must be less than train.epochs={train.epochs}")


def _check_linear_proxy(config: Config) -> None:
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


def _check_proxy_images(config: Config) -> None:
    train, kept_size = config.train, config.embed.proxy_image_size
    size = train.image_size or kept_size
    # Reflection cannot pad an image by its full side or more.
    if train.augmentation in ("crop_flip", "crop") and train.crop_padding >= size:
        raise ConfigError(
            f"train.crop_padding={train.crop_padding}: images of {size} pixels can be padded by {size - 1} at most"
        )
    if train.network != LINEAR and (train.image_size or 0) > kept_size:
        raise ConfigError(
            f"train.image_size={train.image_size} is above embed.proxy_image_size={kept_size}: the network cannot see "
            "more pixels than were kept"
        )


def _check_pretraining(config: Config) -> None:
    if not config.pretrains:
        return
    # Several workers would compile kernels that round the shared batch statistics differently.
    if config.pretrain.compile and config.pretrain.num_workers != 1:
        raise ConfigError(
            f"pretrain.compile=true with pretrain.num_workers={config.pretrain.num_workers}: only a single worker can "
            "compile its network; give pretrain.num_workers=1"
        )
    _check_pretraining_warmup(config)
    embed = config.embed
    sizes = {
        "pretrain.image_size": config.pretrain.image_size,
        "embed.image_size": embed.image_size,
        "embed.resize": embed.resize,
    }
    for key, size in sizes.items():
        # Stage copy runs before pretraining, so here the encoder, too, reads the copies instead of the originals.
        if size is not None and size > embed.proxy_image_size:
            raise ConfigError(
                f"{key}={size} is above embed.proxy_image_size={embed.proxy_image_size}: the encoder cannot see more "
                f"pixels than were kept; {key}=null takes the largest size that fits"
            )
    if embed.weights_sha256 is not None:
        raise ConfigError("embed.weights_sha256 is set, but this run trains the weights itself: leave it out")


def _check_pretraining_warmup(config: Config) -> None:
    warmup = config.pretrain.warmup_epochs
    if not warmup:
        return
    from elfs_ray.methods.simclr.training import simclr_settings

    # pretrain.epochs may be null: the profile then decides.
    epochs = simclr_settings(vars(config.pretrain), config.embed.proxy_image_size).epochs
    if 0 < epochs <= warmup:
        raise ConfigError(f"pretrain.warmup_epochs={warmup}: must be less than {epochs} epochs, or null")
