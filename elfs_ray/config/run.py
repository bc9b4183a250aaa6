"""The whole config of a run: its global keys, and a section for each stage."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from elfs_ray.config.cluster import ClusterConfig
from elfs_ray.config.declaration import Bounds, label_option, option
from elfs_ray.config.duplicates import DUPLICATE_NEIGHBORS, DuplicatesConfig
from elfs_ray.config.embed import SELF_SUPERVISED, EmbedConfig
from elfs_ray.config.evaluate import LINEAR_PROBE, EvaluateConfig
from elfs_ray.config.pool import PoolConfig
from elfs_ray.config.pretrain import PretrainConfig
from elfs_ray.config.report import ReportConfig
from elfs_ray.config.select import USES_HARD_FRACTION, HardFraction, SelectConfig
from elfs_ray.config.train import TrainConfig

Budget = int | float
"""A number of samples (int) or a fraction of the embedded samples (float): 1 is one sample, 1.0 is all of them."""
if TYPE_CHECKING:
    Budgets = Budget | list[Budget]
else:
    # OmegaConf 2.3 knows no union with a list in it, so it is told Any; check_fields refuses all other values.
    Budgets = Any


@dataclass
class Config:
    """The config of a run."""

    run_dir: str = option(
        MISSING, "folder for tables and report; local path, s3:// or gs://", decides=False, is_path=True
    )
    budget: Budgets = option(
        MISSING,
        "how many images to select: a fraction of the embedded images (0.1, 1.0) or a number (500); a list such as "
        "[0.1,0.3] makes a coreset for each, the first in coreset/, the others in coreset-<budget>/",
        unit="fraction or images",
        bounds=Bounds(above=0),
    )
    seed: int = option(0, "seed of all random choices", bounds=Bounds(at_least=0, below=2**63))
    on_change: str = option(
        "refuse",
        "what to do with a stage that was made with another config or is damaged: refuse to run, or rerun it and the "
        "stages that depend on it",
        choices=("refuse", "rerun"),
        decides=False,
    )
    on_pool_change: str = option(
        "auto",
        "what to do if the pool has changed since the run listed it: extend the run by new images and leave out those "
        "that are gone, keep to the images that were listed, or refuse to run; auto extends, but keeps where extending "
        "would repeat a training, and refuses if more than half of the images are gone or changed",
        choices=("auto", "extend", "keep", "refuse"),
        decides=False,
    )
    until: str | None = option(None, "last stage to run; null runs all stages", decides=False)
    ray_address: str | None = option(
        None,
        "address of a Ray cluster; null means RAY_ADDRESS, else a cluster that runs on this machine, else a new one, "
        "which up to 5,000 images without a GPU do not need; 'local' uses no cluster that exists",
        decides=False,
    )
    label_selector: str | None = label_option("the stages", "any node")
    ray_logs: bool = option(False, "also show what Ray's workers print", decides=False)
    pool: PoolConfig = field(default_factory=PoolConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def pretrains(self) -> bool:
        """Return whether the run trains its own encoder."""
        return self.embed.encoder == SELF_SUPERVISED and self.embed.weights is None

    @property
    def needs_dynamics(self) -> bool:
        """Return whether the run trains a proxy network for its selection."""
        return self.select.uses_dynamics

    @property
    def needs_clusters(self) -> bool:
        """Return whether the run gives pseudo-labels: to train on them, or for its selection."""
        return self.needs_dynamics or self.select.uses_clusters

    @property
    def needs_neighbors(self) -> bool:
        """Return whether the run finds nearest neighbours: for its clusters, its selection or its near-duplicates."""
        uses_them = self.needs_clusters or self.select.method == "d2"
        return self.duplicates.threshold is not None or (self.cluster.kept_neighbors > 0 and uses_them)

    @property
    def kept_neighbors(self) -> int:
        """Return how many nearest neighbours of each sample the run keeps, in a pool that has as many."""
        return self.cluster.kept_neighbors or (DUPLICATE_NEIGHBORS if self.duplicates.threshold is not None else 0)

    @property
    def keeps_copies(self) -> bool:
        """Return whether the run keeps small copies of the images: to train a proxy, an encoder or an evaluation."""
        evaluates_on_images = self.evaluate.test_uri is not None and self.evaluate.network not in ("auto", LINEAR_PROBE)
        return self.needs_dynamics or self.pretrains or evaluates_on_images

    @property
    def budgets(self) -> list[Budget]:
        """Return the budgets as a list, also when there is only one."""
        return self.budget if isinstance(self.budget, list) else [self.budget]

    @property
    def hard_fractions(self) -> list[HardFraction]:
        """Return the hard fraction of each budget, a number or the word for how to choose it; 0 for other methods."""
        if self.select.method not in USES_HARD_FRACTION:
            return [0.0] * len(self.budgets)
        fractions = self.select.hard_fraction
        return fractions if isinstance(fractions, list) else [fractions] * len(self.budgets)
