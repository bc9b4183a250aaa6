"""report: write a page and a file of metrics about the run."""

from dataclasses import dataclass
from typing import ClassVar

from elfs_ray.config import Config
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema


@dataclass(frozen=True)
class ReportResult(Result):
    """The size of the page, in bytes."""

    stage: ClassVar[str] = "report"
    bytes: int


def _inputs(config: Config) -> tuple[str, ...]:
    encoder = ("copy", "pretrain") if config.pretrains else ()
    neighbors = ("neighbors",) if config.needs_neighbors else ()
    duplicates = ("duplicates",) if config.duplicates.threshold is not None else ()
    clusters = ("cluster",) if config.needs_clusters else ()
    dynamics = ("train",) if config.needs_dynamics else ()
    return ("index", *encoder, "embed", *neighbors, *duplicates, *clusters, *dynamics, "select")


STAGE = Stage(
    result=ReportResult,
    section="report",
    global_keys=(),
    is_on_driver=True,
    inputs=_inputs,
    files=lambda config: (schema.REPORT_FILE, schema.METRICS_FILE),
    describe=lambda config, num_samples: f"{schema.REPORT_FILE} and {schema.METRICS_FILE}",
)
