"""pool.*: the images to choose from."""

from dataclasses import dataclass

from omegaconf import MISSING

from elfs_ray.config.declaration import option


@dataclass
class PoolConfig:
    """The images to choose from."""

    uri: str = option(
        MISSING, "folder of images, Parquet file(s) or WebDataset tar(s); local path, s3:// or gs://", is_path=True
    )
    format: str = option("auto", "how the pool is stored", choices=("auto", "folder", "parquet", "webdataset"))
    image_column: str | None = option(
        None, "Parquet: column of image bytes, Hugging Face image structs or uris; null takes 'image', else 'uri'"
    )
    label: str | None = option(
        None,
        "where true labels are, copied for evaluate alone: a Parquet column of integers, 'folder' for the name of an "
        "image's folder, 'cls' for WebDataset; null copies none",
    )
