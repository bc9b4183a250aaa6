"""All config keys: a dataclass for each section, in a file of its own; run.py combines them into `Config`.

A key is declared once, by `option`. A run may be resumed with other values of keys that do not decide a stage's result,
such as numbers of workers.
"""

from elfs_ray.config.checks import (
    check_against_pool,
    check_balance,
    check_budgets,
    check_pretraining_workers,
    check_temi_workers,
    proxy_workers,
    scaled_lr,
    worker_range,
)
from elfs_ray.config.cluster import NEIGHBOR_KEYS, ClusterConfig
from elfs_ray.config.declaration import Bounds, ConfigError, fields_of, option
from elfs_ray.config.duplicates import MEASURED_ENCODER, DuplicatesConfig
from elfs_ray.config.embed import SELF_SUPERVISED, EmbedConfig
from elfs_ray.config.evaluate import (
    EVALUATED_METHODS,
    LINEAR_PROBE,
    PAPERS_METHOD,
    EvaluateConfig,
    name_in_tables,
)
from elfs_ray.config.files import DIGEST, digests_of_files
from elfs_ray.config.labels import label_selector, parse_label_selector
from elfs_ray.config.loading import deciding_keys, describe_keys, expand_home, load_config, load_keys
from elfs_ray.config.pool import PoolConfig
from elfs_ray.config.pretrain import PretrainConfig
from elfs_ray.config.report import ReportConfig
from elfs_ray.config.run import Budget, Config
from elfs_ray.config.select import BY_COVERAGE, FIND_HARD_FRACTION, USES_HARD_FRACTION, HardFraction, SelectConfig
from elfs_ray.config.temi import PCA_SAMPLES, TemiConfig
from elfs_ray.config.train import LINEAR, TrainConfig

__all__ = [
    "BY_COVERAGE",
    "DIGEST",
    "EVALUATED_METHODS",
    "FIND_HARD_FRACTION",
    "LINEAR",
    "LINEAR_PROBE",
    "MEASURED_ENCODER",
    "NEIGHBOR_KEYS",
    "PAPERS_METHOD",
    "PCA_SAMPLES",
    "SELF_SUPERVISED",
    "USES_HARD_FRACTION",
    "Bounds",
    "Budget",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DuplicatesConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "HardFraction",
    "PoolConfig",
    "PretrainConfig",
    "ReportConfig",
    "SelectConfig",
    "TemiConfig",
    "TrainConfig",
    "check_against_pool",
    "check_balance",
    "check_budgets",
    "check_pretraining_workers",
    "check_temi_workers",
    "deciding_keys",
    "describe_keys",
    "digests_of_files",
    "expand_home",
    "fields_of",
    "label_selector",
    "load_config",
    "load_keys",
    "name_in_tables",
    "option",
    "parse_label_selector",
    "proxy_workers",
    "scaled_lr",
    "worker_range",
]
