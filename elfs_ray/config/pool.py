"""Keys of section pool: where the images are and how they are stored."""

from dataclasses import dataclass

from omegaconf import MISSING

from elfs_ray.config.declaration import option


@dataclass
class PoolConfig:
    """The images to select from."""

    uri: str = option(
        MISSING, "folder of images, Parquet file(s) or WebDataset tar(s); local path, s3:// or gs://", is_path=True
    )
    format: str = option(
        "auto", "how the pool is stored; auto detects it", choices=("auto", "folder", "parquet", "webdataset")
    )
    image_column: str | None = option(
        None,
        "for Parquet: column of image bytes, Hugging Face image structs or uris; null means 'image' if there is one, "
        "else 'uri'",
    )
    label: str | None = option(
        None,
        "where true labels are, for evaluate alone: the name of a Parquet column of integers, 'folder' for the "
        "name of each image's folder, 'cls' for WebDataset; null means no labels",
    )
