"""index: list the pool and give every image an id."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from elfs_ray.config import Config, check_against_pool
from elfs_ray.pool.files import Remarks
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class IndexResult(Result):
    """The listing of a pool in numbers.

    rows, units: the number of ids, and of the units (folders or files) that hold the images.
    passed_over, warnings: see pool/files.Remarks.
    ends: the number of ids after the first listing, and after each later one that appended to index/; none in a run
        that was made before such ends were recorded.
    gone: the number of images that have left the pool, which are in gone/.
    """

    stage: ClassVar[str] = "index"
    rows: int
    units: int
    format: str
    label_names: list[str]
    passed_over: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    gone: int = 0

    @property
    def present(self) -> int:
        """Return the number of images that are in the pool."""
        return self.rows - self.gone

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Return the first id of each listing, and the first one after it."""
        return list(pairwise([0, *(self.ends or [self.rows])]))

    @property
    def remarks(self) -> Remarks:
        return Remarks(Counter(self.passed_over), self.warnings)


def _check_result(config: Config, run_dir: RunDir) -> None:
    check_against_pool(config, IndexResult.read(run_dir).present)


STAGE = Stage(
    result=IndexResult,
    section="pool",
    global_keys=(),
    tables=lambda config: (schema.INDEX,),
    describe=lambda config, num_samples: "list the pool",
    check_result=_check_result,
)
