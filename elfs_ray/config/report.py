"""Keys of section report: the HTML report of a run."""

from dataclasses import dataclass

from elfs_ray.config.declaration import Bounds, option


@dataclass
class ReportConfig:
    """The HTML report of a run."""

    images_per_grid: int = option(
        40,
        "images on each page of the gallery, and of those left out at each end",
        unit="images",
        bounds=Bounds(at_least=1, at_most=100),
    )
