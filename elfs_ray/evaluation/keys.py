"""The keys of `elfs-ray evaluate`: those of section evaluate, the runs to compare and where to write; their checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from elfs_ray.config import LINEAR_PROBE, Config, ConfigError, EvaluateConfig
from elfs_ray.config.declaration import Bounds, option
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

AS_IN_RUN = "run"  # value of hard_fraction: take the one that the run selected with


@dataclass
class LabelConfig:
    """Where the pool's true labels are."""

    label: str | None = option(
        None,
        "a Parquet column of integers, 'folder' for the name of an image's folder, 'cls' for WebDataset; null takes "
        "the labels that the first run copied",
    )


@dataclass
class EvaluateRunsConfig(EvaluateConfig):
    """An evaluation of finished runs, at any budgets."""

    runs: list[str] = option(MISSING, "run directories of one pool, complete up to select", is_path=True)
    out: str = option(MISSING, "folder for selections, trainings and results: local path, s3:// or gs://", is_path=True)
    test_uri: str = option(
        MISSING, "labelled images to test on, in the same format as the pool; no selection sees them", is_path=True
    )
    budgets: list[Any] = option(
        [0.1, 0.2, 0.3, 0.5, 0.7],
        "samples to train on: fractions of the embedded images or integer counts",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    hard_fraction: Any = option(
        AS_IN_RUN,
        "for run and elfs: the hard fraction, or auto or search; [...] gives one for each budget; run takes the run's",
        unit="fraction",
        choices=(AS_IN_RUN, "auto", "search"),
        bounds=Bounds(at_least=0, below=1),
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to use; null takes RAY_ADDRESS, else a cluster on this machine, else starts one, which up to "
        "5,000 images without a GPU do not need; 'local' uses no cluster that exists",
    )
    ray_logs: bool = option(False, "show what Ray's workers print, too")
    pool: LabelConfig = field(default_factory=LabelConfig)


def network_on(network: str, device: str, has_copies: bool) -> str:
    """Return what learns on a device, cpu or cuda, where the key `network` says auto.

    has_copies: whether the run keeps copies of its images, which a network learns from.
    """
    if network != "auto":
        return network
    return "resnet18" if device == "cuda" and has_copies else LINEAR_PROBE


def keys_of_job(config: Config) -> EvaluateRunsConfig:
    """Return the keys with which a job evaluates its own run: all its budgets, with results in evaluate/ of the run."""
    assert config.evaluate.test_uri is not None
    return EvaluateRunsConfig(
        **vars(config.evaluate),
        runs=[config.run_dir],
        out=RunDir(config.run_dir).path(schema.EVALUATE_DIR),
        budgets=config.budgets,
        hard_fraction=AS_IN_RUN,
        ray_address=config.ray_address,
        ray_logs=config.ray_logs,
        pool=LabelConfig(config.pool.label),
    )


def refuse_duplicates(key: str, values: Sequence[Any]) -> None:
    """Raise ConfigError if a list has an item twice."""
    if len({str(value) for value in values}) < len(values):
        raise ConfigError(f"{key}={list(values)} names one twice")


def check_image_size(key: str, size: int | None, copy_size: int) -> None:
    """Raise ConfigError if networks would learn from larger images than the run keeps copies of."""
    if size is not None and size > copy_size:
        raise ConfigError(
            f"{key}={size}: the run keeps copies of {copy_size} pixels, so give {copy_size} at most, or run the "
            f"pipeline with embed.proxy_image_size={size}"
        )


def check_neighbor_search(device: str, key: str, ray_address: str | None) -> None:
    """Raise ConfigError if nearest neighbours, which measure the embeddings, cannot be searched anywhere."""
    # Late, so that `--help` does not import Ray.
    from elfs_ray.methods.numeric.faiss_build import check_faiss, device_of_search
    from elfs_ray.runtime.cluster import find_devices

    resolved = find_devices(ray_address).resolve(device, key)
    try:
        check_faiss("an evaluation, which searches nearest neighbours,", device_of_search(resolved))
    except ValueError as error:
        raise ConfigError(str(error)) from error
