"""copy: make a small copy of every image, before an encoder is trained on the pool."""

from dataclasses import dataclass
from typing import ClassVar

from elfs_ray.config import Config, check_against_pool
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class CopyResult(Result):
    """The number of images copied and of those that could not be decoded."""

    stage: ClassVar[str] = "copy"
    rows: int
    rejected: int


def _check_result(config: Config, run_dir: RunDir) -> None:
    result = CopyResult.read(run_dir)
    check_against_pool(config, result.rows, result.rejected)


STAGE = Stage(
    result=CopyResult,
    section="embed",
    section_keys=("proxy_image_size", "proxy_jpeg_quality", "max_image_pixels", "block_images"),
    global_keys=(),
    is_estimated=True,
    grows=True,
    is_part_of=lambda config: config.pretrains,
    inputs=lambda config: ("index",),
    tables=lambda config: (schema.PROXY_IMAGES,),
    describe=lambda config, num_samples: f"copies of {config.embed.proxy_image_size} pixels",
    check_result=_check_result,
)
