"""The whole config: the keys of a run, and the sections of its stages."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from elfs_ray.config.cluster import ClusterConfig
from elfs_ray.config.declaration import Bounds, option
from elfs_ray.config.embed import SELF_SUPERVISED, EmbedConfig
from elfs_ray.config.evaluate import EvaluateConfig
from elfs_ray.config.pool import PoolConfig
from elfs_ray.config.pretrain import PretrainConfig
from elfs_ray.config.report import ReportConfig
from elfs_ray.config.select import USES_HARD_FRACTION, HardFraction, SelectConfig
from elfs_ray.config.train import TrainConfig

Budget = int | float
"""A number of samples, or a fraction of the embedded ones: 1 is one sample, 1.0 all."""
if TYPE_CHECKING:
    Budgets = Budget | list[Budget]
else:
    Budgets = Any  # OmegaConf has no union with a list; `load_config` lets nothing else through


@dataclass
class Config:
    """A whole run."""

    run_dir: str = option(
        MISSING, "where tables and report go; local path, s3:// or gs://", decides=False, is_path=True
    )
    budget: Budgets = option(
        MISSING,
        "samples to label: a fraction of the embedded images (0.1, 1.0) or an integer count; [0.1,0.3] gives a coreset "
        "for each, the first in coreset/, the others in coreset-<budget>/",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    seed: int = option(0, "every random choice follows from it", bounds=Bounds(at_least=0, below=2**63))
    on_change: str = option(
        "refuse",
        "when a stage was made with another config or is damaged: refuse, or rerun it and what depends on it",
        choices=("refuse", "rerun"),
        decides=False,
    )
    until: str | None = option(None, "the last stage to run; null runs them all", decides=False)
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
    def budgets(self) -> list[Budget]:
        """One or more budgets, as a list."""
        return self.budget if isinstance(self.budget, list) else [self.budget]

    @property
    def hard_fractions(self) -> list[HardFraction]:
        """The hard fraction of each budget, or the word for how it is found; 0 where the method has none."""
        if self.select.method not in USES_HARD_FRACTION:
            return [0.0] * len(self.budgets)
        fractions = self.select.hard_fraction
        return fractions if isinstance(fractions, list) else [fractions] * len(self.budgets)
