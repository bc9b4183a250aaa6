"""Every key of an evaluation of finished runs (jobs/evaluate.py): the section evaluate of a run's config, and more."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from elfs_ray.config import Config, EvaluateConfig
from elfs_ray.config.declaration import Bounds, option
from elfs_ray.storage.run_dir import RunDir

RUNS_OWN = "run"  # the hard fraction that a run selected with


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
    """An evaluation of finished runs, at budgets that need not be theirs."""

    runs: list[str] = option(MISSING, "run directories of one pool, complete up to select", is_path=True)
    out: str = option(MISSING, "where selections, trainings and results go; local path, s3:// or gs://", is_path=True)
    test_uri: str = option(
        MISSING, "labelled images to test on, stored as the pool is; no selection sees them", is_path=True
    )
    methods: list[str] = option(
        ["random", "prototypicality", "d2", "aum_hardest", "elfs"],
        EvaluateConfig.__dataclass_fields__["methods"].metadata["help"],
    )
    budgets: list[Any] = option(
        [0.1, 0.2, 0.3, 0.5, 0.7],
        "samples to train on: fractions of the embedded images or integer counts",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    hard_fraction: Any = option(
        RUNS_OWN,
        "elfs: the hard fraction, or auto or search; [...] gives one for each budget; run takes the run's own",
        unit="fraction",
        choices=(RUNS_OWN, "auto", "search"),
        bounds=Bounds(at_least=0, below=1),
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to use; null takes RAY_ADDRESS, else a cluster on this machine, else starts one; 'local' always "
        "starts one",
    )
    ray_logs: bool = option(False, "show what Ray's workers print, too")
    pool: LabelConfig = field(default_factory=LabelConfig)


def keys_of_job(config: Config) -> EvaluateRunsConfig:
    """Return the evaluation of one run by its own job: at all of its budgets, into evaluate/ of its run directory."""
    assert config.evaluate.test_uri is not None
    return EvaluateRunsConfig(
        **vars(config.evaluate),
        runs=[config.run_dir],
        out=RunDir(config.run_dir).path("evaluate"),
        budgets=config.budgets,
        hard_fraction=RUNS_OWN,
        ray_address=config.ray_address,
        ray_logs=config.ray_logs,
        pool=LabelConfig(config.pool.label),
    )
