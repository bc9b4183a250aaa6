"""List the stages in order. A new stage is a folder of stages/ and a line here; its keys go into config/, the columns
of its tables into storage/schema.py, and later stages name it in their `inputs`.

index ──► embed ──► cluster ──► train ──► select ──► report
index ──► embed ──► select ──► report                       for a selection from embeddings alone
embed ──► neighbors ──► cluster                             for TEMI, or with cluster.num_neighbors
embed ──► neighbors ──► duplicates ──► select               with duplicates.threshold
index ──► copy ──► pretrain ──► embed ──► ...               for an encoder that is trained on the pool itself
"""

from elfs_ray.config import Config, ConfigError
from elfs_ray.stages import cluster, copy, duplicates, embed, index, neighbors, pretrain, report, select, train
from elfs_ray.stages.stage import Stage

STAGES = (
    index.STAGE,
    copy.STAGE,
    pretrain.STAGE,
    embed.STAGE,
    neighbors.STAGE,
    duplicates.STAGE,
    cluster.STAGE,
    train.STAGE,
    select.STAGE,
    report.STAGE,
)


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Return the stages of a run in order, up to config.until. Raises ConfigError if the run has no such stage."""
    stages = tuple(stage for stage in STAGES if stage.is_part_of(config))
    if config.until is None:
        return stages
    names = [stage.name for stage in stages]
    if config.until not in names:
        raise ConfigError(f"until={config.until!r}: must be one of {', '.join(names)}, the stages of this run")
    return stages[: names.index(config.until) + 1]
