"""duplicates: find near-duplicates, and one image of each group that stands for the others."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from elfs_ray.config import MEASURED_ENCODER, Config, ConfigError
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices

MAX_EXAMPLES = 50


@dataclass(frozen=True)
class DuplicatesResult(Result):
    """The number of near-duplicates, of the images that stand for them, and of all images.

    examples: some pairs (near-duplicate, its representative, similarity), the least similar first.
    """

    stage: ClassVar[str] = "duplicates"
    rows: int
    representatives: int
    samples: int
    examples: list[tuple[int, int, float]]


def _advice(config: Config, devices: "Devices") -> list[str]:
    if config.embed.encoder == MEASURED_ENCODER:
        return []
    return [
        f"duplicates.threshold={config.duplicates.threshold} with {config.embed.encoder}: similarities differ between "
        "encoders. See in the report whether the near-duplicates are some, or give another threshold, or null"
    ]


def _check_result(config: Config, run_dir: RunDir) -> None:
    from elfs_ray.methods.selection.pruning import budget_count

    result = DuplicatesResult.read(run_dir)
    for budget in config.budgets:
        if budget_count(budget, result.samples) > result.samples - result.rows:
            raise ConfigError(
                f"budget={budget} of {result.samples:,} samples, of which {result.rows:,} are near-duplicates of "
                "others: give a smaller budget, a higher duplicates.threshold, or duplicates.threshold=null"
            )


STAGE = Stage(
    result=DuplicatesResult,
    section="duplicates",
    global_keys=(),
    is_part_of=lambda config: config.duplicates.threshold is not None,
    inputs=lambda config: ("embed", "neighbors"),
    tables=lambda config: (schema.DUPLICATES,),
    describe=lambda config, num_samples: f"images at least {config.duplicates.threshold} similar",
    advice=_advice,
    check_result=_check_result,
)
