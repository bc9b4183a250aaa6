"""select: compute scores from training dynamics and coresets from scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from elfs_ray.config import Config, ConfigError
from elfs_ray.runtime.resources import Request, request_gpu_tasks
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class CoresetResult:
    """One coreset: its counts, its range of scores, and examples for the report (sample ids).

    num_hard and num_easy count the samples pruned from each end, num_not_drawn those left out for no such reason. The
    scores are in the column `score` of the table at `score_table`; `hard_side`, low or high, is the end with the hard
    samples. coverage: for the methods coverage and auto, the mean similarity of the pool to its nearest sample in this
    coreset and in a random one, as "coreset" and "random", and whether it covers "classes_first".
    """

    rows: int
    num_hard: int
    num_easy: int
    num_not_drawn: int
    hardest_kept: float
    easiest_kept: float
    score_min: float
    score_max: float
    kept_examples: list[int]
    hardest_examples: list[int]
    easiest_examples: list[int]
    hard_fraction: float
    score: str
    hard_side: str
    score_table: str
    hard_fraction_evidence: Mapping[str, Any] | None = None
    coverage: Mapping[str, float] | None = None


@dataclass(frozen=True)
class SelectResult(Result):
    """The rows of the first coreset, the number of samples it was chosen from, and every coreset by its table.

    `search` holds the keys select.search_*, for later selections from the same run, left_out the numbers of images that
    could not be chosen, as "labelled", "excluded", "gone" and "near_duplicates".
    """

    stage: ClassVar[str] = "select"
    rows: int
    samples: int
    coresets: Mapping[str, CoresetResult]
    search: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, int] | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        coresets = {table: CoresetResult(**coreset) for table, coreset in fields["coresets"].items()}
        return cls(**{**fields, "coresets": coresets})


def _tables(config: Config) -> tuple[str, ...]:
    scores = (schema.SCORES,) if config.select.uses_dynamics else ()
    return (*scores, *schema.coreset_tables(config.budgets))


def _files(config: Config) -> tuple[str, ...]:
    return tuple(map(schema.coreset_text_file, schema.coreset_tables(config.budgets)))


def _describe(config: Config, num_samples: int) -> str:
    select = config.select
    balanced = ", balanced over pseudo-labels" if select.balance else ""
    source = f"by {select.score}" if select.uses_dynamics else "without training"
    if select.method == "auto":
        from elfs_ray.methods.clustering_trust import LEAST_TRUST

        source += (
            f": covers each pseudo-class first if {LEAST_TRUST:.0%} of pseudo-labels look right, then the whole pool"
        )
    return f"{select.method} {source}{balanced}"


def _inputs(config: Config) -> tuple[str, ...]:
    finds_duplicates = config.duplicates.threshold is not None
    neighbors = ("neighbors",) if config.select.method == "d2" or finds_duplicates else ()
    # A selection that does not need them still passes their labels on.
    clusters = ("cluster",) if config.needs_clusters else ()
    dynamics = ("train",) if config.select.uses_dynamics else ()
    duplicates = ("duplicates",) if finds_duplicates else ()
    return ("index", "embed", *neighbors, *duplicates, *clusters, *dynamics)


def _requests(config: Config, devices: "Devices") -> list[Request]:
    if "search" not in config.hard_fractions or devices.resolve(config.train.device, "train.device") != "cuda":
        return []
    return [request_gpu_tasks(devices, "train", "training task")]


def _check_listed(config: Config, run_dir: RunDir) -> None:
    files = {key: path for key, path in config.select.files_of_names.items() if path is not None}
    if not files:
        return
    import numpy as np

    from elfs_ray.methods.selection.pruning import budget_count
    from elfs_ray.stages.index.records import gone_ids
    from elfs_ray.stages.select.named_images import read_named_images

    index = IndexResult.read(run_dir)
    num_samples = index.present
    named = [read_named_images(key, path, run_dir) for key, path in files.items()]
    num_left = index.rows - len(np.unique(np.concatenate([*named, gone_ids(run_dir)])))
    for budget in config.budgets:
        if budget_count(budget, num_samples) > num_left:
            raise ConfigError(
                f"budget={budget} of {num_samples:,} samples, but only {num_left:,} are not in "
                f"{' or '.join(f'{key}={path!r}' for key, path in files.items())} yet: give a smaller budget"
            )


STAGE = Stage(
    result=SelectResult,
    section="select",
    global_keys=("seed", "budget"),
    is_estimated=True,
    inputs=_inputs,
    tables=_tables,
    files=_files,
    describe=_describe,
    requests=_requests,
    check_listed=_check_listed,
)
