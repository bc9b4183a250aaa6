"""Keys of section pool: where the images are and how they are stored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from elfs_ray.config.declaration import option

if TYPE_CHECKING:
    Uris = str | list[str]
else:
    # OmegaConf 2.3 knows no union with a list in it, so it is told Any; check_fields refuses all other values.
    Uris = Any


@dataclass
class PoolConfig:
    """The images to select from."""

    uri: Uris = option(
        MISSING,
        "folder of images, Parquet file(s) or WebDataset tar(s); local path, s3:// or gs://; a glob pattern such as "
        "data/train-*, or a list such as [2023,2024]",
        is_path=True,
    )
    format: str = option(
        "auto",
        "how the pool is stored; auto detects it, and refuses a pool of several kinds",
        choices=("auto", "folder", "parquet", "webdataset"),
    )
    image_column: str | None = option(
        None,
        "for Parquet: column of image bytes, Hugging Face image structs or uris; null means 'image' if there is one, "
        "else 'uri'. For WebDataset: suffix of the members that are images, such as jpg or left.png, or a pattern; "
        "null means any, but one for each key",
    )
    label: str | None = option(
        None,
        "where true labels are, for evaluate alone: the name of a Parquet column of integers, 'folder' for the "
        "name of each image's folder, 'cls' for WebDataset; null means no labels",
    )

    @property
    def uris(self) -> list[str]:
        """Return the uris as a list, also when there is only one."""
        return self.uri if isinstance(self.uri, list) else [self.uri]
