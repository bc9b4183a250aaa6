"""index: list the pool and give every image an id."""

from dataclasses import dataclass
from typing import ClassVar

from elfs_ray.config import Config, check_against_pool
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class IndexResult(Result):
    """The number of images, the number of units (folders or files) that hold them, the format, the label names."""

    stage: ClassVar[str] = "index"
    rows: int
    units: int
    format: str
    label_names: list[str]


def _check_result(config: Config, run_dir: RunDir) -> None:
    check_against_pool(config, IndexResult.read(run_dir).rows)


STAGE = Stage(
    result=IndexResult,
    section="pool",
    global_keys=(),
    tables=lambda config: (schema.INDEX,),
    describe=lambda config, num_samples: "list the pool",
    check_result=_check_result,
)
