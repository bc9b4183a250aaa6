"""Every key a job takes: one dataclass a section of the config, one file each; run.py puts them together.

A key is declared once, by `option`. Keys that do not decide a stage's result (numbers of workers, batch sizes that only
change speed) may differ between a run and its continuation.
"""

from elfs_ray.config_keys.cluster import ClusterConfig
from elfs_ray.config_keys.declaration import Bounds, ConfigError, fields_of, option
from elfs_ray.config_keys.embed import SELF_SUPERVISED, EmbedConfig
from elfs_ray.config_keys.evaluate import EvaluateConfig
from elfs_ray.config_keys.pool import PoolConfig
from elfs_ray.config_keys.pretrain import PretrainConfig
from elfs_ray.config_keys.report import ReportConfig
from elfs_ray.config_keys.run import STAGE_NAMES, Config
from elfs_ray.config_keys.select import FIND_HARD_FRACTION, USES_HARD_FRACTION, SelectConfig
from elfs_ray.config_keys.temi import TemiConfig
from elfs_ray.config_keys.train import LINEAR, TrainConfig

__all__ = [
    "FIND_HARD_FRACTION",
    "LINEAR",
    "SELF_SUPERVISED",
    "STAGE_NAMES",
    "USES_HARD_FRACTION",
    "Bounds",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "EmbedConfig",
    "EvaluateConfig",
    "PoolConfig",
    "PretrainConfig",
    "ReportConfig",
    "SelectConfig",
    "TemiConfig",
    "TrainConfig",
    "fields_of",
    "option",
]
